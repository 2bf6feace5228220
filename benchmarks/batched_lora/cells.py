"""What is timed of batched_lora_, as data.

M rows of x [M, K], each with an adapter of a pool or none, at projections of N_g features that share x (q, k and v).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import BF16, F32, MODELS, Model

ROWS = (1, 8, 32, 64, 256, 2048)
ADAPTERS = (1, 4, 16, 64)
POPULARITIES = ("identical", "distinct", "zipf", "skewed", "half none")
RANKS = ("8", "16", "64", "mixed")
MIXED = (8, 16, 64, 128)  # in turn


@dataclass(frozen=True)
class Cell:
    """`adapters` are in the pool; `popularity` says which of them the rows have."""

    dtype: torch.dtype
    site: str
    K: int
    N: tuple[int, ...]
    M: int
    adapters: int
    popularity: str
    r: str  # of every adapter; or "mixed"

    @property
    def title(self) -> str:
        wide = "+".join(map(str, self.N))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.site} {self.K} -> {wide} M={self.M} {self.adapters} {self.popularity} r={self.r}"

    def rank(self, adapter: int) -> int:
        return MIXED[adapter % len(MIXED)] if self.r == "mixed" else int(self.r)

    def ids(self) -> Tensor:
        """The adapter of each row, or -1; rows of one adapter lie scattered.

        identical: all have the first. distinct: as many different ones as there can be. zipf: adapter i with weight
        (1 + i)^-1.5. skewed: the first has half of the rows, the others share the rest. half none: as distinct, and
        every second row has none.
        """
        generator = torch.Generator().manual_seed(self.M)
        order = torch.randperm(self.M, generator=generator)
        if self.popularity == "identical":
            return torch.zeros_like(order)
        if self.popularity == "zipf":
            weights = torch.arange(1, self.adapters + 1) ** -1.5
            return torch.multinomial(weights, self.M, replacement=True, generator=generator)
        if self.popularity == "skewed":
            return torch.where(order % 2 == 0, 0, 1 + order // 2 % max(self.adapters - 1, 1)).clamp(
                max=self.adapters - 1
            )
        ids = order % self.adapters
        return ids if self.popularity == "distinct" else torch.where(torch.arange(self.M) % 2 == 0, ids, -1)


def sites(model: Model) -> dict[str, tuple[int, tuple[int, ...]]]:
    """(K, all N) of the projections that share an input."""
    return {
        "qkv": (model.hidden, (model.query, model.key_value, model.key_value)),
        "o": (model.query, (model.hidden,)),
        "gate_up": (model.hidden, (model.intermediate, model.intermediate)),
        "down": (model.intermediate, (model.hidden,)),
    }


def _at(model: Model, cell: Cell) -> Iterator[Cell]:
    """The same batch at every site of a model."""
    for site, (K, N) in sites(model).items():
        yield dataclasses.replace(cell, site=f"{site} of {model.name}", K=K, N=N)


def _star(dtype: torch.dtype, d: int, model: Model) -> Iterator[Cell]:
    """Every value of every axis, one or two axes at a time; first the cells that have targets."""
    near = Cell(dtype, "square", 1024, (1024,), 32, 64, "distinct", "16")
    yield near
    yield dataclasses.replace(near, K=4096, N=(4096,), M=64)
    if d == 4096:
        yield dataclasses.replace(near, K=4096, N=(4096,), M=64, adapters=1)
    near = dataclasses.replace(near, K=d, N=(d,))
    for M in ROWS:
        for adapters in ADAPTERS:
            yield dataclasses.replace(near, M=M, adapters=adapters)
    middle = dataclasses.replace(near, M=64, adapters=16)
    for popularity in POPULARITIES:
        yield dataclasses.replace(middle, popularity=popularity)
    for r in RANKS:
        yield dataclasses.replace(middle, r=r)
    yield from _at(model, middle)


def _named(name: str) -> Model:
    return next(model for model in MODELS if model.name == name)


def cells(grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid of shapes.GRIDS. `full` is the product of all axes, at the sites of one model or of all."""
    quick = Cell(F32, "square", 256, (256,), 8, 4, "distinct", "16")
    if grid == "quick":
        found = [dataclasses.replace(quick, dtype=dtype, popularity=p) for dtype in (F32, BF16) for p in POPULARITIES]
        found += [dataclasses.replace(quick, N=(256, 128), M=64, r="mixed")]
    elif grid == "cpu":
        found = [cell for dtype in (F32, BF16) for cell in _star(dtype, 1024, _named("qwen3-0.6b"))]
    elif grid == "gpu":
        found = list(_star(BF16, 4096, _named("llama-3-8b")))
    else:
        found = [
            cell
            for m in MODELS
            if model in ("", m.name)
            for M in ROWS
            for adapters in ADAPTERS
            for popularity in POPULARITIES
            for r in RANKS
            for cell in _at(m, Cell(BF16, "", 0, (), M, adapters, popularity, r))
        ]
    return list(dict.fromkeys(found))
