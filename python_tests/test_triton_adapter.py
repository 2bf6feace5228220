"""bottleneck_adapter's Triton kernels compiled ahead of time; test_triton.py interprets them."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton: nothing run, it is not installed", allow_module_level=True)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CASES = [  # rows, bottleneck, options: one kernel, two kernels, few rows, more than a block of bottlenecks
    (8192, 64, {"norm": "layer_norm", "scale": (4096,)}),
    (8192, 16, {"p": 0.0, "activation": "relu"}),
    (512, 48, {"norm": "rms_norm", "on": "output", "activation": "gelu_tanh"}),
    (8, 256, {"scale": (1,), "on": "output", "activation": "silu"}),
    (2048, 300, {"N": 1024, "scale": (1024,), "activation": "tanh"}),
    (40, 5, {"K": 67, "N": 131, "norm": "layer_norm", "scale": (131,), "activation": "sigmoid"}),
]


def _call(M, pair, E, norm="none", on="bottleneck", scale=(), activation="gelu", K=4096, N=None, p=0.1):
    """One bottleneck_adapter, forward and backward with every gradient, on meta tensors of real size; N None: serial.

    `scale`: of a learned scale, the shape; its gate and dropout go with it."""
    from peft_kernels.ops.bottleneck_adapter.triton_kernel import FUNCTIONS

    def empty(*shape, dtype=pair[1]):
        return torch.empty(shape, dtype=dtype, device="meta")

    serial, N, learned = N is None, N or K, scale != ()
    x, residual = empty(M, K, dtype=pair[0]), None if N is None else empty(M, N, dtype=pair[0])
    optional = empty(*scale) if learned else None, empty(M) if learned else None
    optional += empty(K) if norm != "none" else None, empty(K) if norm == "layer_norm" else None
    factors = empty(E, K), empty(N, E), empty(N)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    numbers = (activation, 1.5, norm, 1e-5, p, on, seed)
    y, h = FUNCTIONS["bottleneck_adapter"](x, residual, factors[0], empty(E), *factors[1:], *optional, *numbers)
    needs = [True] * 5 + [tensor is not None for tensor in optional]
    FUNCTIONS["bottleneck_adapter_backward"](y, x, h, *factors, *optional, *numbers, serial, needs)


def _compile(arch, pair, M, E, options):
    from triton_compiler import Recorder, assert_fits

    with Recorder(arch) as compiled:
        _call(M, pair, E, **options)
    fits_one_block = (64 if pair[0].itemsize == 2 else 32) >= E
    forward = {"_fused_kernel"} if M == 8192 and fits_one_block else {"_shrink_kernel", "_expand_kernel"}
    backward = {"_value_kernel", "_slope_kernel", "_input_kernel", "_sum_kernel", "_down_kernel", "_up_kernel"}
    assert {k.name for k in compiled} - {"_statistics_kernel"} == forward | backward
    assert_fits(arch, f"M={M}, E={E}, {pair}, {options}", compiled)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch):
    _compile(arch, (BF16, BF16), *CASES[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, F32), (F32, BF16), (F16, BF16), (F64, F64)],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiled_ahead_of_time(arch, pair):
    for case in CASES:
        _compile(arch, pair, *case)


def test_rows_do_not_compile_again():
    from triton_compiler import Recorder

    with Recorder(90) as compiled:
        _call(256, (BF16, BF16), 16, K=512, p=0.0, activation="relu")
        first = [kernel.name for kernel in compiled]
        for M in (17, 1041):
            _call(M, (BF16, BF16), 16, K=512, p=0.0, activation="relu")
    assert [kernel.name for kernel in compiled] == first
