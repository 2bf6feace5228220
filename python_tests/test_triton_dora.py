"""DoRA's Triton kernels compiled ahead of time for three architectures. test_triton.py has them interpreted."""

import importlib.util

import pytest
import torch

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton: nothing run, it is not installed", allow_module_level=True)


def _call(M, pair, R, adapters=0, K=4096, N=4096):
    """dora_norm, and dora_scale with every gradient, on meta tensors of real size; adapters: of a mixed batch."""
    from peft_kernels.ops.lora_linear.triton_dora_norm import FUNCTIONS as NORM
    from peft_kernels.ops.lora_linear.triton_dora_scale import FUNCTIONS as SCALE

    def empty(*shape, dtype=pair[0]):
        return torch.empty(shape, dtype=dtype, device="meta")

    norm = NORM["dora_norm"](empty(N, K), empty(R, K, dtype=pair[1]), empty(N, R, dtype=pair[1]), 1.5)
    ids = empty(M, dtype=torch.int32) if adapters else None
    norm = empty(adapters, N, dtype=norm.dtype) if adapters else norm
    magnitude = empty(*norm.shape, dtype=pair[1])
    y = SCALE["dora_scale"](empty(M, N), magnitude, norm, empty(N), empty(M, N), ids)
    SCALE["dora_scale_backward"](y, y, magnitude, norm, ids, [True] * 3)


def _compile(arch, *case):
    from triton_compiler import Recorder, assert_fits

    with Recorder(arch) as compiled:
        _call(*case)
    kernels = {"_products_kernel", "_finish_kernel", "_scale_kernel", "_backward_kernel", "_sum_partials_kernel"}
    assert {k.name for k in compiled} == kernels
    assert_fits(arch, f"{case}", compiled)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch):
    _compile(arch, 8192, (BF16, F32), 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, F32), (F32, BF16), (F16, BF16), (F64, F64)],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiled_ahead_of_time(arch, pair):
    for M, R, adapters in ((8192, 16, 0), (512, 64, 3), (1, 5, 0)):
        _compile(arch, M, pair, R, adapters)
    _compile(arch, 40, pair, 5, 3, 67, 131)
