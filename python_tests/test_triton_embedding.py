"""lora_embedding's Triton kernels compiled ahead of time, without a GPU; test_triton.py interprets them."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton: nothing run, it is not installed", allow_module_level=True)

OWN = {"_gather_kernel", "_columns_kernel"}
KERNELS = OWN | {"_concat_gemm_kernel", "_factor_kernel", "_sum_partials_kernel"}
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def _call(M, pair, ranks, V=128256, N=4096, ids_dtype=torch.int64, padding_idx=0):
    """Forward and backward with every gradient, on meta tensors of real size."""
    from peft_kernels.ops.lora_linear.triton_embedding import FUNCTIONS

    def empty(*shape, dtype=pair[1]):
        return torch.empty(shape, dtype=dtype, device="meta")

    residual, ids = empty(M, N, dtype=pair[0]), empty(M, dtype=ids_dtype)
    rest = [empty(r, V) for r in ranks], [empty(N, r) for r in ranks], [1.5] * len(ranks), padding_idx
    y, h = FUNCTIONS["lora_embedding"](residual, ids, *rest)
    FUNCTIONS["lora_embedding_backward"](y, ids, h, *rest, [True] * 2 * len(ranks))


def _compile(arch, *case, fitting=KERNELS, **sizes):
    from triton_compiler import Recorder, assert_fits

    with Recorder(arch) as compiled:
        _call(*case, **sizes)
    assert {k.name for k in compiled} == KERNELS
    assert_fits(arch, f"lora_embedding, {case}, {sizes}", [k for k in compiled if k.name in fitting])


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch):
    _compile(arch, 8192, (BF16, F32), (16,))
    _compile(arch, 1, (BF16, BF16), (5,), V=67, N=131, ids_dtype=torch.int32)


def test_odd_sizes_compiled_ahead_of_time():
    """Sizes of 1, which Triton compiles in as constants, and rows and pointers that lie on no 16 bytes."""
    for pair in ((BF16, BF16), (BF16, F32)):
        _compile(90, 37, pair, (3, 5), V=67, N=131, ids_dtype=torch.int32)
        _compile(90, 1, pair, (1,), V=1, N=1)


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 40, 8192])
@pytest.mark.parametrize("pair", [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiled_ahead_of_time(arch, pair, M):
    _compile(arch, M, pair, (16,))
    for ranks in ((3,) * 9, (8, 128)):  # in which what lora_add has too may spill on sm_80 and sm_100
        _compile(arch, M, pair, ranks, fitting=OWN)


def test_neither_rows_nor_padding_compile_again():
    from triton_compiler import Recorder

    with Recorder(90) as compiled:
        for M, padding_idx in ((1024, None), (1041, 1), (4096, 32)):
            _call(M, (BF16, BF16), (16,), padding_idx=padding_idx)
    names = [kernel.name for kernel in compiled]
    assert names.count("_gather_kernel") == names.count("_columns_kernel") == 1
