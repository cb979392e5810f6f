# SPDX-License-Identifier: Apache-2.0
"""What a test sees of the order in which things are computed and sent."""

from torch.utils._python_dispatch import TorchDispatchMode


class Order(TorchDispatchMode):
    """What comes after what: `m`ultiplications, e`x`changes of bytes, `a`ll-reduces."""

    def __init__(self):
        super().__init__()
        self.order = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.order += {"mm": "m", "_allgather_base_": "x", "alltoall_base_": "x", "allreduce_": "a"}.get(name, "")
        return function(*args, **(kwargs or {}))
