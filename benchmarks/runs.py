"""What the benchmarks that are modules of their own share: an arm that needs no arguments, and what a run is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch

from benchmarks import record


@dataclass(frozen=True, eq=False)
class Arm:
    """One contender in a cell.

    `run` does what is timed; the caller's clock times it and drops what it returns. Only train_many's takes no clock:
    its `run` returns the milliseconds that it measured itself.
    """

    name: str
    backend: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Run:
    """What holds for every cell of a run."""

    device: torch.device
    rounds: int
    seconds: float
    origin: dict[str, str | int]

    @classmethod
    def here(cls, device: torch.device, rounds: int, seconds: float) -> Self:
        """A run on this machine, now."""
        return cls(device, rounds, seconds, record.provenance(device))
