"""gated_product's Triton kernels compiled ahead of time, without a GPU; test_triton.py interprets them."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton: nothing run, it is not installed", allow_module_level=True)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def _compile(arch, dtype):
    """Both kernels, for every activation, of matrices of real size."""
    from triton_compiler import Recorder, assert_fits

    from peft_kernels.ops.lora_linear.gated import GATES
    from peft_kernels.ops.lora_linear.triton_gated import FUNCTIONS

    matrix = torch.empty(8192, 14336, dtype=dtype, device="meta")
    for activation in GATES:
        with Recorder(arch) as compiled:
            FUNCTIONS["gated_product"](matrix, matrix, activation)
            FUNCTIONS["gated_product_backward"](matrix, matrix, matrix, activation)
        assert [k.name for k in compiled] == ["_product_kernel", "_gradients_kernel"]
        assert_fits(arch, f"{activation}, {dtype}", compiled)
        wide = "ld.global.v2" if dtype is F64 else "ld.global.v4"
        assert all(wide in kernel.ptx for kernel in compiled), activation


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch):
    _compile(arch, BF16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiled_ahead_of_time(arch, dtype):
    _compile(arch, dtype)
