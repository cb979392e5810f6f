# SPDX-License-Identifier: Apache-2.0
"""A switch in user space that holds every frame back for a while: latency where the kernel has no netem.

What `network.py` starts in the switch's namespace, in place of a bridge: it reads the frames of every port and sends
each, after its delay, to the port that its receiver was seen on, or to all others. Frames travel with the header that
says how far their segments and checksums still have to be made, so that the kernel may hand over 64 KB at once.
"""

import os
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
HEADER = 10  # struct virtio_net_hdr
BUFFER = 16 << 20
LARGEST = 1 << 17
# What a frame takes to be handed on, beyond its delay: measured as 60 us each way.
OVERHEAD = 60e-6
BATCH = 16  # frames that are read of one port before others have their turn


def open_port(name: str) -> socket.socket:
    """All frames that come in by an interface."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        port.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    for option in (PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING):
        port.setsockopt(SOL_PACKET, option, 1)
    port.setblocking(False)
    port.bind((name, ETH_P_ALL))
    return port


def relay(names: list[str], delay: float) -> None:
    """Between these interfaces, for ever. delay: seconds that a small frame takes from one to another."""
    delay = max(0.0, delay - OVERHEAD)
    ports = [open_port(name) for name in names]
    seen: dict[bytes, socket.socket] = {}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()  # all wait for as long, so the first is due first
    print("ready", flush=True)
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select(ports, [], [], wait)
        for port in readable:
            for _ in range(BATCH):
                try:
                    frame = port.recv(LARGEST)
                except BlockingIOError:
                    break
                due = time.monotonic() + delay
                to, sender = frame[HEADER : HEADER + 6], frame[HEADER + 6 : HEADER + 12]
                seen[sender] = port
                for target in [seen[to]] if to in seen else [other for other in ports if other is not port]:
                    waiting.append((due, target, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, frame = waiting.popleft()
            with suppress(OSError):  # a full queue drops what comes, as that of any switch does
                target.send(frame)


if __name__ == "__main__":
    with suppress(OSError):  # on a busy machine others would hold frames back longer than asked
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    relay(sys.argv[2:], float(sys.argv[1]))
