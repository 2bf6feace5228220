"""Times the arms of a cell in interleaved rounds, each step with empty caches, as a layer of a large model finds them.

On a CPU a buffer twice the size of the last cache is read before every step; on a GPU steps are replayed from CUDA
graphs with a cold L2. Ratios are to the base layer of the same round.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import gate, record, roofline, runs
from benchmarks.batched_lora import arms as contenders
from benchmarks.batched_lora.cells import Cell
from peft_kernels import backends, registry

LEAST_ROUNDS = {"cpu": 15, "gpu": 50, "full": 30, "quick": 5}
SECONDS = {"cpu": 5.0, "gpu": 0.5, "full": 0.3, "quick": 0.1}
FOREIGN = ("peft", "torch", "peer")  # backends that are not ours


@dataclass(frozen=True)
class Row(runs.Row):
    """One arm of one cell; the base is the layer alone."""

    site: str
    M: int
    K: int
    N: str  # of each projection, joined by "+"
    adapters: int  # in the pool
    present: int  # that some row has
    popularity: str
    r: str
    copies: int  # layers that a step went through; all numbers are those of one
    added_us: float  # to the base layer; NaN of what has no base layer in it
    gbs: float  # of the least traffic that the arm's work needs
    tflops: float
    read_gbs: float  # what this machine reads at, measured in the same process
    read_share: float  # gbs / read_gbs


@dataclass(frozen=True)
class Run(runs.Run):
    """The same with the read rate of the machine."""

    bytes_per_s: float

    @classmethod
    def here(cls, device: torch.device, rounds: int, seconds: float) -> "Run":
        return cls(device, rounds, seconds, record.provenance(device), roofline.read_rate(device))


@torch.no_grad()
def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each contender that could not be timed."""
    found = runs.timed(contenders.build, cell, kinds, FOREIGN, run, contenders.COMPUTING)
    copies = contenders.copies(cell, run.device)
    found = found._replace(times={arm: [ms / copies for ms in taken] for arm, taken in found.times.items()})

    def more(arm, columns):
        with_base = arm.name in contenders.COMPUTING
        added = 1e3 * columns["ms_p50"] * (1 - 1 / columns["ratio_p50"]) if with_base else math.nan
        gbs = arm.cost.bytes / columns["ms_p50"] * 1e-6
        rate = {"gbs": gbs, "tflops": arm.cost.flops / columns["ms_p50"] * 1e-9}
        rate |= {"added_us": added}
        return rate | {"read_gbs": run.bytes_per_s * 1e-9, "read_share": gbs * 1e9 / run.bytes_per_s}

    return runs.rows_of(Row, partial(labels, cell, copies=copies), found, more, run)


def labels(cell: Cell, arm: str, backend: str, copies: int = 1) -> dict[str, str | int]:
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
        "copies": copies,
    }


def refuse_wrong_results(cells: Iterable[Cell], device: torch.device) -> int:
    """The gate: every backend that is timed through the samples, in the dtypes that are timed; how many ran.

    Raises gate.RedGateError.
    """
    names = [name for name in backends.linked("batched_lora_", device.type) if name != "reference"]
    pairs = {(cell.dtype, cell.dtype) for cell in cells}
    return gate.check(registry.ops()["batched_lora_"], names, pairs, device)


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    base = f"{rows[0].read_gbs:.1f} GB/s read, base"
    return runs.described(
        cell, rows, seconds, base, lambda row: f"  {1e3 * row.ms_p50:.1f} us, {row.gbs:.1f} GB/s, {row.read_share:.0%}"
    )
