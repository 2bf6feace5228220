"""Times the arms of a cell in interleaved rounds, each step with empty caches, as a layer of a large model finds them.

On a CPU a buffer twice the size of the last cache is read before every step; on a GPU steps are replayed from CUDA
graphs with a cold L2. Ratios are to the base layer of the same round.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gate, limits, measure, record, roofline, runs
from benchmarks.batched_lora import arms as contenders
from benchmarks.batched_lora.arms import Arm
from benchmarks.batched_lora.cells import Cell
from peft_kernels import backends, registry

LEAST_ROUNDS = {"cpu": 15, "gpu": 50, "full": 30, "quick": 5}
SECONDS = {"cpu": 5.0, "gpu": 0.5, "full": 0.3, "quick": 0.1}
FOREIGN = ("peft", "torch")  # backends that are not ours
_DEFAULT_CACHE = 32 << 20  # where the system does not say


@dataclass(frozen=True)
class Row(record.Origin):
    """One arm of one cell."""

    op: str
    arm: str
    backend: str
    dtype: str
    site: str
    M: int
    K: int
    N: str  # of each projection, joined by "+"
    adapters: int  # in the pool
    present: int  # that some row has
    popularity: str
    r: str
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio_p20: float  # to the base layer of the same round
    ratio_p50: float
    ratio_p80: float
    aa_spread: float  # how far from 1 the middle 60% of the rounds put the ratio of the two equal base arms
    gbs: float  # of the least traffic that the arm's work needs
    tflops: float
    read_gbs: float  # what this machine reads at, measured in the same process
    read_share: float  # gbs / read_gbs
    not_timed: str  # why this arm has no time (its numbers are NaN); empty where it has


@dataclass(frozen=True)
class Run(runs.Run):
    """The same with the read rate of the machine."""

    bytes_per_s: float

    @classmethod
    def here(cls, device: torch.device, rounds: int, seconds: float) -> "Run":
        return cls(device, rounds, seconds, record.provenance(device), roofline.read_rate(device))


def last_cache() -> int:
    """Bytes of the processor's largest cache."""
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in texts), default=_DEFAULT_CACHE)


def clock(device: torch.device) -> Callable[[Arm], float]:
    """ms of one step of an arm that finds nothing in a cache."""
    if device.type == "cuda":
        return limits.clock(device)
    other = torch.ones(2 * last_cache() // 4)

    def wall(arm: Arm) -> float:
        other.sum()
        start = time.perf_counter_ns()
        arm.run()
        return (time.perf_counter_ns() - start) * 1e-6

    return wall


@torch.no_grad()
def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each contender that could not be timed."""
    torch.manual_seed(0)
    arms, left_out = contenders.build(cell, run.device, kinds)
    step = clock(run.device)
    able, failed = measure.runnable(arms, step, FOREIGN)
    left_out |= {arm.name: reason for arm, reason in failed.items()}
    return rows_of(cell, measure.interleave(able, step, run.rounds, run.seconds), left_out, run)


def rows_of(cell: Cell, times: dict[Arm, list[float]], left_out: dict[str, str], run: Run) -> list[Row]:
    base, again = (arm for arm in times if arm.name in ("base", "base_again"))
    rows = []
    for arm, columns in measure.compared(times, base, again):
        gbs = arm.cost.bytes / columns["ms_p50"] * 1e-6
        rows.append(
            Row(
                **labels(cell, arm.name, arm.backend),
                **columns,
                gbs=gbs,
                tflops=arm.cost.flops / columns["ms_p50"] * 1e-9,
                read_gbs=run.bytes_per_s * 1e-9,
                read_share=gbs * 1e9 / run.bytes_per_s,
                not_timed="",
                **run.origin,
            )
        )
    nothing = record.no_numbers(Row)
    for name, reason in left_out.items():
        rows.append(Row(**labels(cell, name, ""), rounds=0, **nothing, not_timed=reason, **run.origin))
    return rows


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    ids = cell.ids()
    return {
        "op": "batched_lora",
        "arm": arm,
        "backend": backend,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "site": cell.site,
        "M": cell.M,
        "K": cell.K,
        "N": "+".join(map(str, cell.N)),
        "adapters": cell.adapters,
        "present": ids[ids >= 0].unique().numel(),
        "popularity": cell.popularity,
        "r": cell.r,
    }


def refuse_wrong_results(cells: Iterable[Cell], device: torch.device) -> int:
    """The gate: every backend that is timed through the samples, in the dtypes that are timed; how many ran.

    Raises gate.RedGateError.
    """
    names = [name for name in backends.linked("batched_lora_", device.type) if name != "reference"]
    pairs = {(cell.dtype, cell.dtype) for cell in cells}
    return gate.check(registry.ops()["batched_lora_"], names, pairs, device)


def time_cells(cells: list[Cell], kinds: tuple[str, ...], run: Run, say: Callable[[str], None], out: Path | None):
    """Cell by cell, said and written as they finish."""
    say(f"this machine reads {run.bytes_per_s / 1e9:.1f} GB/s")
    record.one_by_one(cells, lambda cell: time_cell(cell, kinds, run), described, Row, say, out)


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    base = rows[0]
    lines = [
        f"{cell.title}: base {base.ms_p50:.3f} ms, A/A {base.aa_spread:.1%}, {base.rounds} rounds, {seconds:.0f} s"
    ]
    for row in rows[2:]:
        outcome = f"not timed: {row.not_timed}"
        if not row.not_timed:
            spread = f"({row.ratio_p20:.3f} - {row.ratio_p80:.3f})"
            outcome = f"{row.ratio_p50:.3f} {spread}  {row.ms_p50:.3f} ms, {row.gbs:.1f} GB/s, {row.read_share:.0%}"
        lines.append(f"  {row.arm + ' ' + row.backend:24s} {outcome}")
    return "\n".join(lines)
