"""prefix_attention's Triton kernels compiled ahead of time for three architectures: ptxas takes them and keeps them in
registers and shared memory. What they compute: triton_prefix_samples.py, run by test_triton.py.
"""

import importlib.util

import pytest
import torch

from peft_kernels.ops.prefix_attention.samples import GRADIENTS

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton: nothing run, it is not installed", allow_module_level=True)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ALL = dict(window=512, over_prefix=True, softcap=30.0, p=0.1, gated=True, mask=True)
CASES = {
    "plain": dict(),
    "wide": dict(D=256),
    "narrow": dict(D=64, causal=False),
    "narrow-gated": dict(D=64, gated=True, composition="add"),
    "everything": ALL,
    "everything-narrow": dict(D=32, **ALL),
    "everything-wide": dict(D=256, **ALL),
    "everything-40": dict(D=40, **ALL),
    "everything-192": dict(D=192, **ALL),
    "decode": dict(S=1, T=2048, D=128),
    "decode-wide": dict(S=1, T=2048, D=256, **ALL),
    "few": dict(S=20, Hq=8, p=0.1),
    "packed": dict(B=1, packed=16, D=96, composition="relu", gated=True, p=0.1),
    "add-wide": dict(D=256, composition="add", gated=True, p=0.1),
    "linear": dict(composition="linear", gated=True, p=0.1),
    "linear-wide": dict(D=256, composition="linear", gated=True),
}


def _call(
    dtype, *, B=8, Hq=32, Hkv=8, S=1024, T=None, P=128, D=128, n=4, composition="merge", causal=True, window=0,
    over_prefix=False, softcap=0.0, p=0.0, gated=False, mask=False, packed=0,
):  # fmt: skip
    """One prefix_attention, forward and backward with every gradient, on meta tensors of real size."""
    from peft_kernels.ops.prefix_attention.triton_kernel import FUNCTIONS

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def vector(size):
        return empty(size, dtype=torch.int32)

    T, rows, wide = T or S, packed or B, F64 if dtype is F64 else F32
    own = [empty(B, length, H, D).transpose(1, 2) for length, H in ((S, Hq), (T, Hkv), (T, Hkv))]
    tensors = [*own, empty(n, Hkv, P, D), empty(n, Hkv, P, D), vector(rows), vector(n)]
    tensors += [empty(1, Hq, S, T), empty(1, Hq, S, P)] if mask else [None, None]
    tensors += [empty(rows, Hq, dtype=wide), empty(rows, Hq, dtype=wide)] if gated else [None, None]
    tensors += [vector(rows + 1), vector(rows + 1)] if packed else [None, None]
    numbers = (composition, D**-0.5, causal, window, over_prefix, softcap, p, empty(dtype=torch.int64) if p else None)
    out, *sums = FUNCTIONS["prefix_attention"](*tensors, *numbers)
    needs = [True] * 5 + [gated] * 2
    assert len(needs) == len(GRADIENTS)
    FUNCTIONS["prefix_attention_backward"](out, *tensors, out, *sums, *numbers, needs)


def _compile(arch, dtype, case):
    from triton_compiler import Recorder, assert_fits

    with Recorder(arch) as compiled:
        _call(dtype, **CASES[case])
    names = {"_forward_kernel", "_query_kernel", "_key_kernel", "_prefix_kernel"}
    assert {kernel.name for kernel in compiled} - {"_gate_kernel"} == names
    assert_fits(arch, f"{dtype}, {case}", compiled)
    return compiled


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch):
    compiled = _compile(arch, BF16, "plain")
    text = "".join(kernel.ptx for kernel in compiled if kernel.name == "_forward_kernel")
    assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in text


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiled_ahead_of_time(arch, dtype, case):
    if dtype is F64 and CASES[case].get("D", 128) > 64:
        pytest.skip("wide heads in fp64, which no model has, spill some ten bytes")
    _compile(arch, dtype, case)


def test_sizes_do_not_compile_again():
    from triton_compiler import Recorder

    with Recorder(90) as compiled:
        _call(BF16, D=32, Hq=2, Hkv=1, S=64)
        first = [kernel.name for kernel in compiled]
        for B, S, T, P, n in ((2, 65, 70, 7, 1), (3, 130, 200, 129, 5)):  # one row would have no pieces to add
            _call(BF16, D=32, Hq=2, Hkv=1, B=B, S=S, T=T, P=P, n=n)
    assert [kernel.name for kernel in compiled] == first
