"""What the grids are to reach, as data.

CPU: geometric means of forward+backward over the frozen linear, on two cores. GPU: the operator of the cuda backend,
replayed from a CUDA graph, on a Hopper GPU, of hopper.BACKEND where kernels made for it are to reach them; the bytes
that it keeps for the backward; what a pool of adapters adds to a layer and to a decoding step of a model.
"""

import math
from dataclasses import dataclass

import torch

from benchmarks import hopper
from benchmarks.record import Row
from benchmarks.tables import BOTH, OP, VARIANTS, cell, means, select, variant


@dataclass(frozen=True)
class Target:
    """The patched layer's geometric mean over all cells, and over those with M >= 16, of one variant of the adapter."""

    title: str
    widened: bool  # fp32 adapters on a 16-bit base; else adapters in the base's dtype
    p: str
    every_cell: float
    from_16_rows: float


TARGETS = (
    Target("no dropout", False, "0", 0.98, 1.06),
    Target("dropout 0.1", False, "0.1", 1.00, 1.08),
    Target("fp32 adapters on bf16", True, "0", 1.02, 1.10),
)


@dataclass(frozen=True)
class CudaTarget:
    """The largest ratio to the frozen linear at K = N = 4096, r = 16 over all of `Ms`, adapters in bf16."""

    title: str
    direction: str
    Ms: tuple[int, ...]
    p: str
    limit: float
    backend: str = "cuda"


CUDA_TARGETS = (
    CudaTarget("forward+backward, M = 8192, 4096 x 4096, r = 16, dropout 0.1", BOTH, (8192,), "0.1", 1.16),
    CudaTarget("forward, M = 1 and 16, 4096 x 4096, r = 16, no dropout", "forward", (1, 16), "0", 1.5),
    CudaTarget("likewise, M = 8192, with kernels made for Hopper", BOTH, (8192,), "0.1", 1.05, hopper.BACKEND),
    CudaTarget("likewise, M = 1 and 16, with kernels made for Hopper", "forward", (1, 16), "0", 1.05, hopper.BACKEND),
)


@dataclass(frozen=True)
class PoolTarget:
    """Of batched_lora_ with kernels made for Hopper, at K = N = 4096, r = 16, for 64 rows of so many adapters, from a
    graph: what is added to the base layer, in microseconds, or that over what the arm `than` adds."""

    title: str
    adapters: int
    limit: float
    than: str = ""


_ROWS = 64
POOL_TARGETS = (
    PoolTarget("batched_lora_, 64 rows of 64 adapters, 4096 x 4096, r = 16: us added to the layer", 64, 5.4),
    PoolTarget("batched_lora_, 64 rows of 1 adapter, likewise", 1, 3.0),
    PoolTarget("batched_lora_, 64 adapters: us added, over those of SGLang's triton_v2", 64, 1 / 1.5, "sglang_v2"),
)


@dataclass(frozen=True)
class DecodingTarget:
    """The largest ratio of a decoding step through a pool to that of the base, in bf16 from a graph, with kernels made
    for Hopper."""

    title: str
    rows: int
    adapters: int
    limit: float


DECODING_TARGETS = (
    DecodingTarget("a decoding step of 8B-sized layers, 64 rows of 16 adapters: over the base", 64, 16, 1.18),
)

# for the tables: (wider adapters, p) -> both limits in words
LIMITS = {(t.widened, t.p): f"{t.every_cell:.2f}; {t.from_16_rows:.2f}" for t in TARGETS}


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """(met, sentence) for every target."""
    found = []
    for target in TARGETS:
        every, count, wide, wide_count = means(rows, "patched", (target.widened, target.p))
        found.append(_verdict(target, every, target.every_cell, f"{count} cells"))
        found.append(_verdict(target, wide, target.from_16_rows, f"{wide_count} cells with M >= 16"))
    slower = slower_than_peft(rows)
    met = bool(select(rows, "patched", BOTH)) and not slower  # nothing compared is nothing met
    found.append((met, "no cell slower than PEFT beyond the A/A spread" + "".join(f"; {s}" for s in slower)))
    return found


def _verdict(target: Target, value: float, limit: float, where: str) -> tuple[bool, str]:
    met = value <= limit  # False for the NaN of no cells
    outcome = "met" if met else "no such cells" if math.isnan(value) else f"missed by {value - limit:.3f}"
    return met, f"{target.title}, {where}: {value:.3f} against {limit:.2f}, {outcome}"


def slower_than_peft(rows: list[Row]) -> list[str]:
    """Cells in which the patched layer takes longer than PEFT, by more than two equal frozen arms differ."""
    peft = {(cell(row), variant(row)): row for row in select(rows, "peft", BOTH)}
    found = []
    for row in select(rows, "patched", BOTH):
        other = peft.get((cell(row), variant(row)))
        if other and row.ratio_p50 / other.ratio_p50 > 1 + row.aa_spread:
            found.append(
                f"{row.dtype} M={row.M} K={row.K}, {VARIANTS[variant(row)]}: "
                f"{row.ratio_p50:.3f} against {other.ratio_p50:.3f}, spread {row.aa_spread:.3f}"
            )
    return found


def cuda_verdicts(rows: list[Row]) -> list[tuple[bool | None, str, str, str]]:
    """(met, title, limit, measured) for every target of the GPU; met is None where it was not measured."""
    ours = [row for row in rows if (row.op, row.arm) == (OP, "op") and not row.not_timed]
    found = []
    for target in CUDA_TARGETS:
        place = (target.backend, target.direction, "graph", "bfloat16", "bfloat16", 4096, 4096, "16", target.p)
        ratios = {row.M: row.ratio_p50 for row in ours if row.M in target.Ms and _place(row) == place}
        met, measured = None, ""
        if len(ratios) == len(target.Ms):
            worst = max(ratios.values())
            met, measured = worst <= target.limit, f"{worst:.3f}"
        found.append((met, target.title, f"{target.limit:.2f}", measured))
    return [*found, _saved_verdict([row for row in ours if row.backend == "cuda"])]


def pool_verdicts(rows: list) -> list[tuple[bool | None, str, str, str]]:
    """As cuda_verdicts, from the rows of batched_lora on a GPU."""
    place = ("bfloat16", "graph", _ROWS, 4096, "4096", "16")
    found = []
    for target in POOL_TARGETS:
        here = [r for r in rows if (r.dtype, r.timing, r.M, r.K, r.N, r.r) == place and not r.not_timed]
        here = [r for r in here if r.present == r.adapters == target.adapters]
        ours = _least([r.added_us for r in here if (r.arm, r.backend) == ("op", hopper.BACKEND)])
        beside = _least([r.added_us for r in here if r.arm == target.than]) if target.than else 1.0
        value = ours / beside
        met = None if math.isnan(value) else value <= target.limit
        found.append((met, target.title, f"{target.limit:.2f}", "" if met is None else f"{value:.2f}"))
    return found


def decoding_verdicts(rows: list) -> list[tuple[bool | None, str, str, str]]:
    """As cuda_verdicts, from the rows of decoder on a GPU."""
    found = []
    for target in DECODING_TARGETS:
        place = ("pool", hopper.BACKEND, "bfloat16", "graph", "decoding", 4096, target.rows, target.adapters)
        ratios = [
            r.ratio_p50 for r in rows
            if (r.arm, r.backend, r.dtype, r.timing, r.step, r.hidden, r.B, r.adapters) == place and not r.not_timed
        ]  # fmt: skip
        value = _least(ratios)
        met = None if math.isnan(value) else value <= target.limit
        found.append((met, target.title, f"{target.limit:.2f}", "" if met is None else f"{value:.3f}"))
    return found


def _least(values: list[float]) -> float:
    """NaN of nothing."""
    return min(values, default=math.nan)


def _place(row: Row) -> tuple:
    return row.backend, row.direction, row.timing, row.dtype, row.adapter_dtype, row.K, row.N, row.r, row.p


def _saved_verdict(ours: list[Row]) -> tuple[bool | None, str, str, str]:
    """Every cell keeps exactly x, h in fp32 and, with dropout, the seed."""
    over = [row.saved_bytes - kept_bytes(row) for row in ours]
    title = "bytes kept for the backward beyond x, h [M, r] in fp32 and the seed, any cell"
    return (set(over) == {0} if over else None), title, "0", f"{max(over, key=abs):,}" if over else ""


def kept_bytes(row: Row) -> int:
    """x [M, K] in the base's dtype, h [M, r] in fp32, the 8 bytes of the seed where there is dropout."""
    itemsize = getattr(torch, row.dtype).itemsize
    return itemsize * row.M * row.K + 4 * row.M * int(row.r) + 8 * (row.p != "0")
