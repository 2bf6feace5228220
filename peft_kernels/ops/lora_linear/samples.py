"""Inputs for lora_linear: samples at the edges, each with the reason it is there, and inputs that must be refused."""

from functools import partial

import torch

from peft_kernels.ops.common.projection_samples import (
    BF16,
    F16,
    F32,
    F64,
    ODD_PAIRS,
    PAIRS,
    bad_projections,
    conv1d,
    evaluate,
    inside,
    strided_weight,
)
from peft_kernels.registry import BadInput, Sample

__all__ = ["bad_inputs", "evaluate", "problem", "samples"]


def problem(
    device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (12,),
    K: int = 32,
    N: tuple[int, ...] = (48,),
    ranks: tuple[tuple[int, ...], ...] = ((4,),),
    p: float = 0.0,
    biased: bool = False,
    lora_biased: bool = False,
) -> dict:
    """Arguments of the op: one projection per entry of N, one adapter per entry of `ranks[g]`.

    The factors are scaled so that each adapter contributes as much as the frozen projection.
    """
    generator = torch.Generator().manual_seed(rows[-1] * 1009 + K * 31 + sum(N) if rows else K)

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(device, to)

    owners = [g for g, group in enumerate(ranks) for _ in group]
    flat = [r for group in ranks for r in group]
    return {
        "x": draw(*rows, K),
        "weight": [draw(n, K, scale=K**-0.5) for n in N],
        "bias": [draw(n) if biased else None for n in N],
        "lora_A": [draw(r, K, scale=K**-0.5, to=factor_dtype) for r in flat],
        "lora_B": [draw(N[g], r, scale=r**-0.5, to=factor_dtype) for g, r in zip(owners, flat, strict=True)],
        "lora_bias": [draw(N[g], to=factor_dtype) if lora_biased else None for g in owners],
        "member": owners,
        "scaling": [(-1.0) ** i * (1.0 + 0.25 * i) for i in range(len(flat))],
        "dropout_p": [p] * len(flat),
        "seed": torch.tensor(0x5EED_0123_4567_89AB - K, device=device) if p else None,
    }


def _plain(id: str, why: str, dtypes=PAIRS, busy=False, **sizes) -> Sample:
    return Sample(id, why, lambda device, dtype, factor: problem(device, dtype, factor, **sizes), dtypes, busy)


def _changed(id: str, why: str, change, dtypes=PAIRS, **sizes) -> Sample:
    """A problem with some arguments laid out differently; `change(arguments)` returns the new ones."""

    def make(device, dtype, factor_dtype):
        arguments = problem(device, dtype, factor_dtype, **sizes)
        return arguments | change(arguments)

    return Sample(id, why, make, dtypes)


def _beyond_fp16(arguments, x=0.05, up=700, s=8.0):
    """h of the first adapter and ds of the second exceed 65504, from factors and to results that do not."""
    (first_A, second_A), (first_B, second_B) = arguments["lora_A"], arguments["lora_B"]
    return {
        "x": arguments["x"] * x,
        "lora_A": [first_A * 1e5, second_A * 0.1],
        "lora_B": [first_B * 3e-3, second_B * up],
        "scaling": [s, -s],
    }


def _out_of_fp16() -> list[Sample]:
    sizes = dict(dtypes=((F16, F16), (F16, F32)), rows=(21,), K=67, N=(131,), ranks=((3, 3),), p=0.1)
    unscaled = partial(_beyond_fp16, x=1.0, up=15000, s=1.0)
    return [
        _changed("beyond-fp16", "s x A^T and s dy B past the largest fp16", _beyond_fp16, **sizes),
        _changed("beyond-fp16-unscaled", "x A^T and dy B are past it before any s", unscaled, **sizes),
    ]


def samples() -> list[Sample]:
    """Each for an edge that has broken a kernel somewhere, or would."""
    qkv = dict(N=(64, 16, 16), ranks=((8,), (2,), (5,)))
    everything = dict(p=0.1, biased=True, lora_biased=True)
    wide = dict(K=1000, N=(1024, 300), ranks=((16, 3), (8,)), p=0.1, biased=True)
    return [
        _plain("ones", "every size is 1", rows=(1,), K=1, N=(1,), ranks=((1,),)),
        _plain("aligned", "every size fills whole tiles", rows=(64,), K=128, N=(256,), ranks=((16,),)),
        _plain("ragged", "no size is a multiple of anything", rows=(37,), K=67, N=(131,), ranks=((5,),)),
        _plain("ragged-wide", "more than one block in every direction", rows=(70,), K=531, N=(283,), ranks=((19,),)),
        _plain("row", "one token: the decode path", rows=(1,), K=515, N=(130,), ranks=((16,),), biased=True),
        _plain("rows-16", "the last row count of the few-row path", rows=(16,), K=67, N=(131,), ranks=((8,),)),
        _plain("rows-17", "the first row count past it", rows=(17,), K=67, N=(131,), ranks=((8,),)),
        _plain("rank-1", "the smallest rank", rows=(19,), K=40, N=(24,), ranks=((1,),)),
        _plain("rank-33", "one more than two vectors", rows=(19,), K=40, N=(70,), ranks=((33,),), p=0.1),
        _plain("rank-512", "the largest rank, larger than K and N", rows=(9,), K=40, N=(24,), ranks=((512,),)),
        _plain("batch", "several batch dimensions", rows=(2, 3, 5), K=33, biased=True),
        _plain("vector", "no batch dimension", rows=(), K=33),
        _plain("empty", "no rows", rows=(0,), p=0.1),
        _plain("empty-batch", "no rows in a batch of sequences", rows=(2, 0), biased=True),
        _plain("bias", "base bias and adapter bias", rows=(20,), K=35, biased=True, lora_biased=True),
        _plain("dropout", "mask replay over ragged blocks", rows=(37,), K=331, N=(131,), ranks=((5,),), p=0.1),
        _plain("dropout-row", "mask replay on the few-row path", rows=(3,), K=331, N=(70,), ranks=((16,),), p=0.5),
        _plain("dropout-tiny", "p rounds to no dropout at 16 bits", p=1e-6),
        _plain("dropout-most", "nearly everything dropped", rows=(40,), p=0.9999),
        _changed("conv1d", "weight stored [K, N]", conv1d, rows=(20,), K=35, N=(131,), p=0.1),
        _changed("conv1d-row", "weight stored [K, N], few rows", conv1d, rows=(3,), K=135, N=(131,), biased=True),
        _changed("weight-strided", "no unit stride in weight", strided_weight, rows=(5,), K=35, N=(20,)),
        _changed("x-offset", "x inside a wider buffer", lambda a: {"x": inside(a["x"])}, rows=(4, 9), K=67, p=0.1),
        _changed("x-columns", "x stored column by column", lambda a: {"x": a["x"].t().contiguous().t()}, rows=(21,)),
        _changed(
            "x-expanded", "one row seen many times", lambda a: {"x": a["x"][:1].expand(19, -1)}, rows=(21,), p=0.1
        ),
        _plain("group", "q, k, v of different widths and ranks", rows=(2, 11), K=67, p=0.1, biased=True, **qkv),
        _plain("group-row", "the same for one token", rows=(1,), K=67, p=0.1, **qkv),
        _plain("group-frozen", "a member without an adapter", rows=(21,), N=(24, 40, 24), ranks=((3,), (), (5,))),
        _plain("stacked", "two active adapters on one layer", rows=(21,), ranks=((3, 6),), p=0.2, lora_biased=True),
        _plain(
            "aligned-row", "few rows of whole vectors", rows=(5,), K=128, N=(64, 24), ranks=((8,), (4,)), **everything
        ),
        _plain("aligned-tiles", "tiles of whole vectors, the last ones ragged", rows=(150,), K=264, N=(136,), p=0.1),
        _plain("rank-70", "more than one tile of ranks", rows=(19,), K=72, N=(80,), ranks=((70,),), p=0.1),
        _plain("stacked-33", "one more than a CUDA launch takes", rows=(5,), K=16, ranks=((1,) * 33,), **everything),
        _plain("group-9", "more members than a CUDA launch takes", rows=(3,), K=16, N=(8,) * 9, ranks=((2,),) * 9),
        *_out_of_fp16(),
        _plain("factors", "16-bit factors of another type", ODD_PAIRS, rows=(21,), K=67, N=(40,), ranks=((6,),), p=0.1),
        _plain("busy-row", "few rows, work for several threads", ((BF16, BF16),), busy=True, rows=(16,), **wide),
        _plain("busy", "a GEMM, work for several threads", ((BF16, BF16),), busy=True, rows=(200,), **wide),
    ]


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    return bad_projections(lambda device: problem(device, F32, F32, K=64, p=0.1))
