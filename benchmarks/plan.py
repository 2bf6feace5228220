"""How long a grid will take, from the roofline, before it starts.

A step is guessed at 1.3 times its least time plus what calls cost (on a GPU, emptying the L2 too); a cell is stepped
for its seconds or its least number of rounds, whichever is longer, once for every way of timing.
Not in it: the samples that run before, and the first compilation of Triton kernels that its cache does not hold.
"""

from dataclasses import dataclass

import torch

from benchmarks import roofline
from benchmarks.roofline import Peak
from benchmarks.shapes import Cell

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Costs:
    """Seconds beside the kernels, on one type of device."""

    step: dict[str, float]  # of one step, by timing: Python, dispatcher and autograd; the replay of a graph
    compile: float  # torch.compile of one layer, forward and backward
    build: float  # an arm's weights, its PEFT model and, where there are graphs, its capture
    tune: float  # peers of one cell, tuning themselves for its shape
    backends: int  # beside the reference
    peers: int  # arms of them per cell


COSTS = {
    "cpu": Costs({"eager": 1e-4}, 4.0, 0.0, 0.0, 1, 0),
    "cuda": Costs({"eager": 1e-3, "graph": 2e-4}, 6.0, 0.2, 10.0, 2, 6),
}


def arm_count(cell: Cell, kinds: tuple[str, ...], costs: Costs) -> int:
    """The two frozen arms, and one arm per kind and variant; of the operator, one per backend too."""
    per_variant = sum(costs.backends if kind == "op" else 1 for kind in kinds if kind != "peers")
    return 2 + per_variant * len(cell.variants) + costs.peers * ("peers" in kinds)


def kinds_of(cell: Cell, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of arm that the cell names and the caller wants."""
    return tuple(kind for kind in cell.arms if kind in wanted)


@dataclass(frozen=True)
class Plan:
    """What is asked of every cell: `rounds` at least, and `seconds` where they take less."""

    rounds: int
    seconds: float
    device_type: str = "cpu"
    timings: tuple[str, ...] = ("eager",)

    def cell_seconds(self, cell: Cell, kinds: tuple[str, ...], peak: Peak) -> float:
        """Estimated wall time of one cell."""
        costs = COSTS[self.device_type]
        arms = arm_count(cell, kinds, costs)
        least = 1.3e-3 * peak.least_ms(roofline.cost(cell, cell.variants[-1])["forward+backward"])
        total = costs.compile * len(cell.variants) * ("compiled" in kinds)
        total += costs.build * arms + costs.tune * ("peers" in kinds)
        for timing in self.timings:
            one_round = (least + costs.step[timing]) * arms
            total += WARMUP_ROUNDS * one_round + max(self.rounds * one_round, self.seconds)
        return total

    def total_seconds(self, cells: list[Cell], wanted: tuple[str, ...], peaks: dict[torch.dtype, Peak]) -> float:
        return sum(self.cell_seconds(cell, kinds_of(cell, wanted), peaks[cell.dtype]) for cell in cells)

    def describe(self, cells: list[Cell], wanted: tuple[str, ...], peaks: dict[torch.dtype, Peak]) -> str:
        """One line for the user: cells, arms, the estimate."""
        arms = sum(arm_count(cell, kinds_of(cell, wanted), COSTS[self.device_type]) for cell in cells)
        minutes = self.total_seconds(cells, wanted, peaks) / 60
        return f"{len(cells)} cells, {arms} arms, at least {self.rounds} rounds a cell: about {minutes:.1f} minutes"
