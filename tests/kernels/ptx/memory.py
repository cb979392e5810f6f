# SPDX-License-Identifier: Apache-2.0
"""A device's global memory and a block's shared memory: every access is checked.

Places are bytes. An access of `size` bytes by n threads: addresses [n], data uint8 [n, size].
"""

import numpy as np

WARP = 32  # threads


class Fault(Exception):
    """What the kernel must not do: on a GPU it would be an error, a wrong byte, or luck."""


class Unknown(Exception):
    """PTX that the emulator does not know: it says nothing about the kernel."""


class Global:
    """Tensors at their own addresses. One launch's stores and loads are kept, to be compared when it has ended."""

    def __init__(self) -> None:
        self.segments = []
        self.begin()

    def begin(self) -> None:
        """A new launch: whatever the ones before it stored is there for good."""
        self.stores, self.loads = [], []

    def map(self, name: str, address: int, data: np.ndarray, writable: bool) -> None:
        """uint8 `data` is what the kernel finds at `address` up."""
        self.segments.append((name, address, data, writable))

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        _, data, places, writable = self._places(addresses, size, "load")
        if writable:
            self.loads.append((addresses, size, threads))
        return data[places]

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        name, data, places, writable = self._places(addresses, values.shape[1], "store")
        if not writable:
            raise Fault(f"store to {name}, an input")
        data[places] = values
        self.stores.append((addresses, values, threads))

    def end(self) -> None:
        """Faults if the result depends on which thread comes first.

        No barrier orders two blocks, and the kernels here order no global access inside of one, so any two threads
        count: they must not store different bytes to one place, nor may one load what another stores.
        """
        if not self.stores:
            return
        places, values, threads = (np.concatenate(parts) for parts in zip(*map(_each_byte, self.stores)))
        order = np.argsort(places, kind="stable")
        places, values, threads = places[order], values[order], threads[order]
        same = (places[1:] == places[:-1]) & (threads[1:] != threads[:-1])
        if (wrong := same & (values[1:] != values[:-1])).any():
            raise Fault(f"threads store different bytes to one place: {self._name(places[1:][wrong][0])}")
        for addresses, size, readers in self.loads:
            read = addresses[:, None] + np.arange(size, dtype=np.uint64)
            at = np.minimum(np.searchsorted(places, read), len(places) - 1)
            if ((places[at] == read) & (threads[at] != readers[:, None])).any():
                raise Fault("a thread loads what another one stores in the same launch")

    def _places(self, addresses, size, what):
        """(name, data, places [n, size] in it, writable) of the one tensor that all of the access is in."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"misaligned {what} of {size} bytes")
        low, high = int(addresses.min()), int(addresses.max()) + size
        for name, address, data, writable in self.segments:
            if address <= low and high <= address + len(data):
                places = (addresses - np.uint64(address)).astype(np.int64)
                return name, data, places[:, None] + np.arange(size), writable
        raise Fault(f"{what} out of bounds, from {self._name(low)} to {self._name(high)}")

    def _name(self, address) -> str:
        """The place in words: bytes from the start of the tensor that is nearest."""
        name, start, data, _ = min(self.segments, key=lambda s: abs(int(address) - s[1]))
        return f"byte {int(address) - start} of the {len(data)} of {name}"


def _each_byte(store):
    addresses, values, threads = store
    size = values.shape[1]
    places = addresses[:, None] + np.arange(size, dtype=np.uint64)
    return places.ravel(), values.ravel(), np.repeat(threads, size)


class Shared:
    """The shared memory of blocks that run together, each of which has its own.

    A warp runs in step with itself; another one does so only between barriers.
    """

    NOBODY = -1

    def __init__(self, size: int, warps: int, blocks: int) -> None:
        """size: of one block's, in bytes. warps: of one block."""
        self.size, self.warps = size, warps
        self.data = np.zeros((blocks, size), np.uint8)
        self.known = np.zeros((blocks, size), bool)
        self.writer, self.reader = np.full((2, blocks, size), self.NOBODY)  # warps, as numbered in their block

    def part(self, chosen: np.ndarray) -> "Shared":
        """That of those of the blocks for which `chosen` is true, as it is now."""
        part = Shared(self.size, self.warps, 0)
        part.data, part.known = self.data[chosen], self.known[chosen]
        part.writer, part.reader = self.writer[chosen], self.reader[chosen]
        return part

    def barrier(self) -> None:
        self.writer[:] = self.reader[:] = self.NOBODY

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """threads: bool, which of all the threads of all the blocks these addresses are of."""
        places, warps = self._places(addresses, size, threads)
        if not self.known[places].all():
            raise Fault("shared memory is read before anything was written there")
        self._alone(self.writer[places], warps, "read after another warp's write")
        self.reader[places] = warps
        return self.data[places]

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        places, warps = self._places(addresses, values.shape[1], threads)
        self._alone(self.writer[places], warps, "write after another warp's write")
        self._alone(self.reader[places], warps, "write after another warp's read")
        self.data[places] = values
        if (self.data[places] != values).any():
            raise Fault("threads write different bytes to one place of shared memory")
        self.writer[places], self.known[places] = warps, True

    def _places(self, addresses, size, threads):
        """((blocks, bytes), warps), each [n, size] or [n, 1]."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"misaligned access of {size} bytes of shared memory")
        places = addresses.astype(np.int64)[:, None] + np.arange(size)
        if places.min() < 0 or places.max() >= self.size:
            raise Fault(f"bytes {places.min()} to {places.max()} of {self.size} of shared memory")
        blocks, warps = np.divmod(np.flatnonzero(threads) // WARP, self.warps)
        return (blocks[:, None], places), warps[:, None]

    def _alone(self, others, warps, what):
        if ((others != self.NOBODY) & (others != warps)).any():
            raise Fault(f"race in shared memory: a {what}, with no barrier between")
