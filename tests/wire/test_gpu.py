"""The reference codec writes the same bytes, and sums to the same bits, on a GPU as on a CPU."""

import oracles
import pytest
import torch

from megatron_comp.wire.codec import Codec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CODECS = [
    *oracles.PRESETS,
    "int4:32:fp16:hadamard",
    "int2:32:bf16:asym:spike",
    "fp6_e3m2:16:e5m3:search",
    "int8:8:fp32",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_equal_bits(codec, dtype):
    codec, shape = Codec.parse(codec), (37, 4096 + 33)
    tensors = [oracles.random_tensor(shape, dtype, seed=seed) for seed in range(3)]
    tensors[1][5, 100], tensors[2][7, 9] = torch.nan, torch.inf
    messages = torch.stack([codec.encode(x) for x in tensors])
    on_gpu = torch.stack([codec.encode(x.cuda()) for x in tensors])
    assert torch.equal(on_gpu.cpu(), messages)
    total, total_on_gpu = (codec.decode_sum(m, shape, dtype) for m in (messages, on_gpu))
    torch.testing.assert_close(total_on_gpu.cpu(), total, rtol=0, atol=0, equal_nan=True)
