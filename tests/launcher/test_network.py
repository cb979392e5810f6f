# SPDX-License-Identifier: Apache-2.0
"""Networks that `ranks.start` takes and launch/slow_network.sh: what a rank finds there, and that none is left."""

import json
import os
import signal
import subprocess
import sys

import pytest
from network import SAY_NAMESPACE, namespaces, need_network, wait_until_gone
from slurm import ROOT, launch_environment

from megatron_comp.launcher import network, ranks

# Rank 0 exchanges so many bytes with each of two others at once, and all leave how long it took until theirs had come:
# both directions of its link carry twice as much as theirs.
NBYTES = 1_500_000
EXCHANGE = f"""
import json, os, socket, sys, threading, time

def receive(peer):
    left = {NBYTES}
    while left:
        left -= len(peer.recv(min(left, 1 << 16)))

rank, place = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], 5000)
if rank == 0:
    server = socket.create_server(place)
    peers = [server.accept()[0] for _ in range(2)]
    for peer in peers:
        peer.sendall(b"x")
while rank:
    try:
        peers = [socket.create_connection(place)]
        break
    except OSError:
        time.sleep(0.05)
if rank:
    peers[0].recv(1)
start = time.perf_counter()
threads = [threading.Thread(target=peer.sendall, args=(bytes({NBYTES}),)) for peer in peers]
threads += [threading.Thread(target=receive, args=(peer,)) for peer in peers]
for thread in threads:
    thread.start()
for thread in threads[len(peers):]:
    thread.join()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME", "MEGATRON_COMP_LINK")
said = dict(seconds=time.perf_counter() - start, **{{name: os.environ[name] for name in names}})
json.dump(said, open(sys.argv[1] + "/" + str(rank), "w"))
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def interfaces():
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


# Rates.


@pytest.mark.parametrize(
    "text, bits", [("100mbit", 100e6), ("2.5gbit", 2.5e9), ("300kbit", 300e3), ("unshaped", None), ("1000gbit", 1e12)]
)
def test_rates(text, bits):
    assert network.bits_per_second(text) == bits


@pytest.mark.parametrize("text", ["100", "mbit", "0mbit", "99kbit", "2tbit", "-1gbit", "1gbit; reboot", "1 gbit", ""])
def test_what_is_no_rate(text):
    with pytest.raises(ValueError, match="allowed are 100kbit to 1000gbit, as in 100mbit, or unshaped"):
        network.bits_per_second(text)


def test_bursts():
    """256 KB were measured to do up to 1 Gbit/s, 2 MB at 10 Gbit/s."""
    assert network.burst_bytes(100e6) == network.burst_bytes(1e9) == 256 * 1024
    assert network.burst_bytes(10e9) >= 2 << 20


@pytest.mark.parametrize(
    "text, machines", [("3", (1, 1, 1)), ("2x3", (3, 3)), ("2+3", (2, 3)), ("1+2+1", (1, 2, 1)), ("1x4", (4,))]
)
def test_machines(text, machines):
    assert network.machines_of(text) == machines


@pytest.mark.parametrize("text, seconds", [("1ms", 1e-3), ("200us", 2e-4), ("0.5ms", 5e-4), ("0", 0.0), ("1s", 1.0)])
def test_round_trips(text, seconds):
    assert network.seconds_of(text) == pytest.approx(seconds)


def test_the_name_of_a_network_tells_its_slowest_link():
    assert network.Network([2, 2], "100mbit").environment["MEGATRON_COMP_LINK"] == "100mbit"
    name = network.Network([2, 2], "1gbit,300mbit", "1ms").environment["MEGATRON_COMP_LINK"]
    assert name == "1gbit,300mbit@1ms" and network.slowest_rate(name) == 300e6
    assert network.slowest_rate("unshaped@1ms") is None and network.slowest_rate("unshaped,1gbit") == 1e9


# What cannot be.


def test_a_command_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs the command ip"):
        ranks.start(2, ["true"], network.Network([1, 1], "100mbit"))


@pytest.mark.slow_network
def test_a_kernel_without_tbf(monkeypatch, tmp_path):
    need_network()
    tc = tmp_path / "tc"
    tc.write_text("#!/bin/sh\necho 'Error: Specified qdisc kind is unknown.' >&2\nexit 2\n")
    tc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(
        ValueError, match="cannot make such a network: tc qdisc add .*: Error: Specified qdisc kind is unk"
    ):
        ranks.start(2, ["true"], network.Network([1, 1], "100mbit"))
    assert set(os.listdir("/proc/self/fd")) == before


def slow_network(*arguments, prefix=(), **environment):
    command = [*prefix, "bash", "launch/slow_network.sh", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=launch_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores SIGINT, and so does all that it starts: also a whole test run.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_without_root():
    """Where the tests run as root, it is root without the right to make namespaces."""
    prefix = () if os.geteuid() else ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--")
    script = slow_network(2, "100mbit", "--", "true", prefix=prefix)
    out, errors = script.communicate(timeout=100)
    assert script.returncode == 2 and not out
    assert (
        errors.startswith("slow_network: a network with links of a given rate needs root: ") and errors.count("\n") == 1
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["2", "100mbit", "true"], "usage: slow_network.sh MACHINES RATE [--rtt TIME] -- COMMAND"),
        (["2", "100mbit", "--"], "usage: slow_network.sh MACHINES RATE [--rtt TIME] -- COMMAND"),
        (["2", "100mbit", "--rtt", "--", "true"], "usage: slow_network.sh MACHINES RATE [--rtt TIME] -- COMMAND"),
        (
            ["2", "100mbit", "--ttl", "1ms", "--", "true"],
            "usage: slow_network.sh MACHINES RATE [--rtt TIME] -- COMMAND",
        ),
        (["two", "100mbit", "--", "true"], "'two' are no machines: 4 are four of one rank"),
        (["2x", "100mbit", "--", "true"], "'2x' are no machines"),
        (["2x0", "100mbit", "--", "true"], "a network of 0 ranks"),
        (["2+0", "100mbit", "--", "true"], "a network of 2 ranks: allowed are 1 to 200, and one or more to a machine"),
        (["2", "1gbit,1gbit,1gbit", "--", "true"], "3 rates for 2 machines"),
        (["2", "100mbit", "--rtt", "1", "--", "true"], "'1' is no round trip: allowed are 0 to 1s"),
        (["2", "100mbit", "--rtt", "2s", "--", "true"], "'2s' is no round trip"),
        (["0", "100mbit", "--", "true"], "a network of 0 ranks: allowed are 1 to 200"),
        (["2", "fast", "--", "true"], "'fast' is no rate of a link"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    from megatron_comp.launcher import slow_network

    assert slow_network.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"slow_network: {message}") and error.count("\n") == 1


def test_dry_run():
    out, errors = slow_network(2, "100mbit", "--", "echo", "a b", DRY_RUN=1).communicate(timeout=60)
    assert out == f"{sys.executable} -m megatron_comp.launcher.slow_network 2 100mbit -- echo a\\ b \n", errors


# What is.


@pytest.mark.slow_network
@pytest.mark.parametrize("rate", ["40mbit", "unshaped"])
def test_both_directions_of_a_link_have_the_rate(tmp_path, rate):
    need_network()
    before = interfaces()
    assert ranks.start(3, [sys.executable, "-c", EXCHANGE, str(tmp_path)], network.Network([1] * 3, rate)) == 0
    assert interfaces() == before
    said = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    first, *others = (each.pop("seconds") for each in said)
    for rank, each in enumerate(said):
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
        assert each == expected | {"GLOO_SOCKET_IFNAME": "e0", "MEGATRON_COMP_LINK": rate}
    at_40_mbit = 8 * (2 * NBYTES - network.burst_bytes(40e6)) / 40e6
    if rate == "unshaped":
        assert first < at_40_mbit
    else:  # never faster than the rate, but for the first burst; nor, headers and a busy machine counted, much slower
        assert at_40_mbit < first < 3 * at_40_mbit and at_40_mbit < max(others)


# The last rank answers the first, which says how long it took, and how long so many bytes took each way; all say where
# they are.
PING = """
import json, os, socket, statistics, sys, time
rank, last, place = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1, (os.environ["MASTER_ADDR"], 5000)
said = {"host": socket.gethostname(), "link": os.environ["MEGATRON_COMP_LINK"]}
NBYTES = 3_000_000
def receive(peer, left):
    while left:
        left -= len(peer.recv(min(left, 1 << 20)))
if rank == 0:
    peer = socket.create_server(place).accept()[0]
while rank == last:
    try:
        peer = socket.create_connection(place)
        break
    except OSError:
        time.sleep(0.05)
if rank in (0, last):
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
if rank == 0:
    trips = []
    for _ in range(100):
        start = time.perf_counter()
        peer.sendall(b"x")
        receive(peer, 1)
        trips.append(time.perf_counter() - start)
        time.sleep(0.002)
    said["rtt"] = statistics.quantiles(trips, n=5)[0]
    start = time.perf_counter()
    peer.sendall(bytes(NBYTES))
    receive(peer, 1)
    there = time.perf_counter()
    receive(peer, NBYTES)
    said["there"], said["back"] = there - start, time.perf_counter() - there
elif rank == last:
    for _ in range(100):
        receive(peer, 1)
        peer.sendall(b"y")
    receive(peer, NBYTES)
    peer.sendall(b"z" + bytes(NBYTES))
json.dump(said, open(sys.argv[1] + "/" + str(rank), "w"))
"""


@pytest.mark.slow_network
def test_machines_of_several_ranks_with_latency(tmp_path):
    """Host names by machine, the round trip that was asked for, and the slower link's rate, both ways."""
    need_network()
    before = interfaces()
    its = network.Network([2, 1], "100mbit,30mbit", "4ms")
    assert ranks.start(3, [sys.executable, "-c", PING, str(tmp_path)], its) == 0
    assert interfaces() == before
    first, *others = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(3))
    assert [each["host"] for each in (first, *others)] == ["machine0", "machine0", "machine1"]
    assert {each["link"] for each in (first, *others)} == {"100mbit,30mbit@4ms"}
    assert 3.9e-3 < first["rtt"] < 6e-3
    shortest = 8 * (3_000_000 - network.burst_bytes(30e6)) / 30e6
    for way in ("there", "back"):  # a first burst goes for nothing at each end; headers take 4 %
        assert 0.85 * shortest < first[way] < 2 * shortest


@pytest.mark.slow_network
def test_no_relay_outlives_its_network():
    need_network()
    with network.Network([1, 1], "unshaped", "1ms") as its:
        inside = set(its._processes())
        assert len(inside) == 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in inside)


@pytest.mark.slow_network
def test_two_networks_at_once_are_apart():
    need_network()
    with network.Network([1, 1], "100mbit") as one, network.Network([1] * 3, "1gbit") as other:
        spaces = [
            subprocess.run([*net.enter(rank), "readlink", "/proc/self/ns/net"], capture_output=True, text=True).stdout
            for net, count in ((one, 2), (other, 3))
            for rank in range(count)
        ]
        assert len({*spaces, os.readlink("/proc/self/ns/net") + "\n"}) == 6
    wait_until_gone({space.strip() for space in spaces})


@pytest.mark.slow_network
def test_a_rank_that_fails_ends_the_others_and_their_children(capfd, monkeypatch, tmp_path):
    need_network()
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    # Rank 0 leaves a child behind that has a session of its own, and waits; rank 1 fails.
    code = f"""
import os, subprocess, sys, time
{SAY_NAMESPACE}
if os.environ["RANK"] == "0":
    subprocess.Popen(["sleep", "100"], start_new_session=True)
    time.sleep(100)
time.sleep(0.5)
sys.exit(3)
"""
    assert ranks.start(2, [sys.executable, "-c", code, str(tmp_path)], network.Network([1, 1], "100mbit")) == 3
    assert "error on rank 0: was killed" in capfd.readouterr().err
    wait_until_gone(namespaces(tmp_path, 2))


@pytest.mark.slow_network
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_no_network_outlives_the_script(tmp_path, number):
    need_network()
    code = f"{SAY_NAMESPACE}; import time; time.sleep(100)"
    # After SIGKILL nobody is left to remove the folder of what ranks report: let it lie in the test's own.
    script = slow_network(2, "100mbit", "--", sys.executable, "-c", code, tmp_path, TMPDIR=tmp_path)
    try:
        names = namespaces(tmp_path, 2)
        script.send_signal(number)
        script.communicate(timeout=30)
        assert script.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        wait_until_gone(names)
    finally:
        script.kill()
        script.communicate()
