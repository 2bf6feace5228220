"""Inputs for batched_lora: samples at the edges, each with the reason it is there, and inputs that must be refused."""

import math
from functools import partial

import torch

from peft_kernels.ops.batched_lora import route
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
    refused,
)
from peft_kernels.registry import BadInput, Sample

__all__ = ["bad_inputs", "evaluate", "problem", "samples"]


def problem(
    device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    *,
    ids: list[int],
    entries: tuple[tuple[int, int, int], ...],  # (member, adapter, rank)
    rows: tuple[int, ...] | None = None,
    K: int = 32,
    N: tuple[int, ...] = (48,),
    p: float = 0.0,
    biased: bool = False,
    lora_biased: bool = False,
) -> dict:
    """Arguments of the op; `ids` are the adapters of the rows, whose leading sizes are `rows` if they have several.

    The factors are scaled so that each adapter contributes as much as the frozen projection.
    """
    generator = torch.Generator().manual_seed(len(ids) * 1009 + K * 31 + sum(N))

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(device, to)

    adapters = 1 + max(adapter for _, adapter, _ in entries)
    ids = torch.tensor(ids, dtype=torch.int32, device=device)
    return {
        "x": draw(*((len(ids),) if rows is None else rows), K),
        "route": route.reference(ids, adapters),
        "weight": [draw(n, K, scale=K**-0.5) for n in N],
        "bias": [draw(n) if biased else None for n in N],
        "lora_A": [draw(r, K, scale=K**-0.5, to=factor_dtype) for _, _, r in entries],
        "lora_B": [draw(N[g], r, scale=r**-0.5, to=factor_dtype) for g, _, r in entries],
        "lora_bias": [draw(N[g], to=factor_dtype) if lora_biased else None for g, _, _ in entries],
        "member": [g for g, _, _ in entries],
        "adapter": [adapter for _, adapter, _ in entries],
        "scaling": [(-1.0) ** i * (1.0 + 0.25 * (i % 8)) for i in range(len(entries))],
        "dropout_p": [p] * len(entries),
        "seed": torch.tensor(0x5EED_0123_4567_89AB - K, device=device) if p else None,
    }


def _sample(id: str, why: str, ids, entries, dtypes=PAIRS, busy=False, change=lambda arguments: {}, **sizes) -> Sample:
    """A problem; `change(arguments)` returns those that are laid out differently."""

    def make(device, dtype, factor_dtype):
        arguments = problem(device, dtype, factor_dtype, ids=ids, entries=entries, **sizes)
        return arguments | change(arguments)

    return Sample(id, why, make, dtypes, busy)


def _all(ranks, members: int = 1) -> tuple:
    """Entries of adapters 0, 1, ... with these ranks, on every member."""
    return tuple((g, adapter, r) for adapter, r in enumerate(ranks) for g in range(members))


def _zipf(M: int, adapters: int) -> list[int]:
    """Popularity as it is met in practice: adapter k about 1 / k^1.5 of the rows, in no order."""
    generator = torch.Generator().manual_seed(M)
    share = torch.arange(1, adapters + 1, dtype=F64) ** -1.5
    return torch.multinomial(share, M, replacement=True, generator=generator).tolist()


def _beyond_fp16(arguments):
    """x A^T of the even adapters and dy B of the odd ones exceed 65504, before any s."""
    even = [adapter % 2 == 0 for adapter in arguments["adapter"]]
    factors = {"lora_A": (1e5, 0.1), "lora_B": (3e-3, 15000)}
    return {
        name: [tensor * by[0 if first else 1] for tensor, first in zip(arguments[name], even, strict=True)]
        for name, by in factors.items()
    }


def _nan_in(adapter: int):
    """NaN in every factor of one adapter."""

    def change(arguments):
        for name in ("lora_A", "lora_B"):
            for tensor, owner in zip(arguments[name], arguments["adapter"], strict=True):
                if owner == adapter:
                    tensor[0, 0] = math.nan
        return {}

    return change


def samples() -> list[Sample]:
    """About twenty, each for an edge that has broken a kernel somewhere."""
    qkv, ranks = dict(K=67, N=(64, 16, 24)), _all((1, 3, 16, 33))
    sites = ((0, 0, 8), (1, 1, 2), (2, 1, 5), (0, 2, 3), (2, 2, 4))  # (member, adapter, rank)
    runs, mixed = [0] * 5 + [1] * 3 + [2] * 9, [2, 0, -1, 1, 2, 2, -1, 0, 1, 2, 0]
    wide = dict(K=1000, N=(1024, 300), p=0.1, biased=True)
    return [
        _sample("base-only", "no row has an adapter", [-1] * 20, _all((4, 2)), K=35, biased=True),
        _sample("base-row", "one row without an adapter", [-1], _all((4,)), K=35),
        _sample("one", "every row has the same adapter", [1] * 21, _all((4, 5)), K=67, N=(131,)),
        _sample("distinct", "every row has its own adapter", list(range(12)), _all(range(1, 13)), K=67, p=0.1),
        _sample("runs", "rows sorted by adapter: nothing to gather", runs, _all((4, 5, 6)), K=67, p=0.1),
        _sample("interleaved", "rows of an adapter never side by side", [0, 1, 2] * 8, _all((4, 5, 6)), K=67, N=(131,)),
        _sample("mixed", "repeated ids and rows without", mixed, _all((4, 5, 6)), K=67, p=0.1, biased=True),
        _sample("zipf", "one popular adapter and a tail", _zipf(40, 9), _all([4] * 9), K=67, N=(131,), p=0.1),
        _sample("absent", "adapters that no row has", [1, 1, 3, 3, 1], _all((4, 5, 6, 7, 8)), K=35, lora_biased=True),
        _sample("sites", "adapters that touch some projections only", [0, 1, 2, 2, -1, 0, 1], sites, **qkv, p=0.1),
        _sample("sites-runs", "the same, sorted", [0, 0, 1, 1, 1, 2, 2], sites, **qkv, biased=True),
        _sample("untouched", "rows whose adapter touches nothing here", [0, 1, 1, 0, 2], ((0, 2, 3), (0, 0, 4))),
        _sample("ranks", "ranks 1, 3, 16 and 33 side by side", [3, 2, 1, 0, 3, 3, 2], ranks, K=40, N=(70,), p=0.1),
        _sample("empty", "no rows", [], _all((4, 2)), p=0.1),
        _sample("empty-batch", "no rows in a batch of sequences", [], _all((4, 2)), rows=(2, 0), biased=True),
        _sample("row", "one token: the decode path", [1], _all((8, 16)), K=515, N=(130,), biased=True, p=0.5),
        _sample("bias", "base bias and adapter bias", mixed, _all((4, 5, 6)), biased=True, lora_biased=True),
        _sample("batch", "several batch dimensions", [0, 1, -1] * 10, _all((4, 2)), rows=(2, 3, 5), K=33, biased=True),
        _sample("conv1d", "weight stored [K, N]", mixed, _all((4, 5, 6)), K=35, N=(131,), p=0.1, change=conv1d),
        _sample("tiles", "several tiles of one adapter", [0, 1] * 35 + [1] * 30, _all((19, 5)), K=531, N=(283,), p=0.1),
        _sample("x-offset", "x inside a wider buffer", mixed, _all((4, 5, 6)), change=lambda a: {"x": inside(a["x"])}),
        _sample("x-columns", "x stored column by column", runs, _all((4, 5, 6)),
                change=lambda a: {"x": a["x"].t().contiguous().t()}),
        _sample("nan-absent", "NaN in an adapter that no row has", [0, 2, -1, 0], _all((3, 4, 5)), change=_nan_in(1)),
        _sample("nan-adapter", "NaN in one adapter stays in its rows", mixed, _all((3, 4, 5)), K=67, change=_nan_in(1)),
        _sample("beyond-fp16", "x A^T and dy B past the largest fp16", mixed, _all((4, 5, 6)), ((F16, F16), (F16, F32)),
                K=67, N=(131,), p=0.1, change=_beyond_fp16),
        _sample("factors", "16-bit factors of another type", mixed, _all((4, 5, 6)), ODD_PAIRS, K=67, p=0.1),
        _sample("busy", "work for several threads", _zipf(200, 6), _all((16, 3, 8, 16, 16, 64), 2), ((BF16, BF16),),
                busy=True, **wide),
        _sample("busy-rows", "many adapters of few rows", list(range(32)), _all([16] * 32, 2), ((BF16, BF16),),
                busy=True, **wide),
    ]  # fmt: skip


def _pair(first, second):
    return lambda entries: [first, second]


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    ids = [0, -1, 0, 0, -1, 0, 0, 0, -1, 0, 0, 0]
    good = partial(problem, dtype=F32, factor_dtype=F32, ids=ids, entries=((0, 0, 4),), K=64, p=0.1)
    twice = partial(problem, dtype=F32, factor_dtype=F32, ids=ids, entries=((0, 0, 4), (0, 1, 4)), K=64)
    bad = partial(refused, good)
    foreign = "route must come from batched_lora_route for the 12 rows of x, got shape"
    return [
        *bad_projections(good),
        bad("route-dtype", TypeError, "route must have dtype int32, got int64", route=lambda r: r.long()),
        bad("route-device", TypeError, "route must be on x's device", route=lambda r: r.to("meta")),
        bad("route-shape", ValueError, f"{foreign} [1, 35]",
            route=lambda r: r[None]),
        bad("route-length", ValueError, f"{foreign} [34]",
            route=lambda r: r[:-1]),
        bad("route-ids", ValueError, f"{foreign} [12]",
            route=lambda r: route.row_ids(r, 12)),
        bad("route-rows", ValueError, f"{foreign} [33]",
            route=lambda r: route.reference(route.row_ids(r, 11), 1)),
        bad("adapter-count", ValueError, "adapter must have one entry per lora_A (1), got 2", adapter=_pair(0, 1)),
        bad("adapter-negative", ValueError, "adapter[0] must be 0 or more, got -1", adapter=lambda a: [-1]),
        refused(twice, "adapter-twice", ValueError,
            "an adapter must have one entry per member, got entries 0 and 1 of adapter 0 for member 0",
            adapter=_pair(0, 0)),
    ]  # fmt: skip
