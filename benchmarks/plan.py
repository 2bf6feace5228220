"""How long a grid will take, from the roofline, before it starts.

A step is guessed at 1.3 times its least time plus what calls cost; a cell lasts its seconds or its least number of
rounds, whichever is longer.
"""

import torch

from benchmarks import roofline
from benchmarks.roofline import Peak
from benchmarks.shapes import Cell

OVERHEAD_S = 1e-4  # Python, dispatcher and autograd of one step
COMPILE_S = 4.0  # torch.compile of one layer, forward and backward
WARMUP_ROUNDS = 2


def arm_count(cell: Cell, kinds: tuple[str, ...]) -> int:
    """The two frozen arms, and one arm per kind and variant; peers, one variant of each, are left out of account."""
    return 2 + len([kind for kind in kinds if kind != "peers"]) * len(cell.variants)


def kinds_of(cell: Cell, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of arm that the cell names and the caller wants."""
    return tuple(kind for kind in cell.arms if kind in wanted)


def seconds(cell: Cell, kinds: tuple[str, ...], peak: Peak, rounds: int, budget: float) -> float:
    """Estimated wall time of one cell."""
    step = 1.3e-3 * peak.least_ms(roofline.cost(cell, cell.variants[-1])["forward+backward"]) + OVERHEAD_S
    one_round = step * arm_count(cell, kinds)
    compiling = COMPILE_S * len(cell.variants) * ("compiled" in kinds)
    return compiling + WARMUP_ROUNDS * one_round + max(rounds * one_round, budget)


def describe(
    cells: list[Cell], wanted: tuple[str, ...], peaks: dict[torch.dtype, Peak], rounds: int, budget: float
) -> str:
    """One line for the user: cells, arms, the estimate."""
    kinds = [kinds_of(cell, wanted) for cell in cells]
    total = sum(seconds(c, k, peaks[c.dtype], rounds, budget) for c, k in zip(cells, kinds, strict=True))
    arms = sum(arm_count(c, k) for c, k in zip(cells, kinds, strict=True))
    return f"{len(cells)} cells, {arms} arms, at least {rounds} rounds a cell: about {total / 60:.1f} minutes"
