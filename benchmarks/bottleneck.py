"""Times a feed-forward block with bottleneck adapters beside the block alone. `run.py --op bottleneck_adapter`

The block is frozen: y = (silu(x W_g^T) * (x W_u^T)) W_d^T. Its adapters are parallel, y += s (relu(x A^T + a) B^T + b).
A training step is y, then the gradients of x and of the adapter; inference is y alone.

    ffn, ffn_again   the block alone, twice: the denominator, and what the clock is worth
    eager            the adapter in plain PyTorch; of several, a loop over them with their rows gathered
    compiled         block and eager adapter under torch.compile
    adapterhub       AdapterHub's own module in place of the eager one, where `adapters` can be imported
    widened          the block of a Llama with its adapter built in by peft_kernels.widen: inference of one adapter
    op               bottleneck_adapter; of several, batched_lora_ over a pool, whose route is ready

Caches are emptied before every step, as in a model, where the other layers do it.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import gate, runs
from benchmarks.bottleneck_arms import ARMS, NAME, Cell, build
from benchmarks.runs import Run, kernels
from benchmarks.shapes import BF16, F32, MODELS
from benchmarks.tables import grid_table
from peft_kernels import registry

LEAST_ROUNDS = {"cpu": 15, "gpu": 50, "full": 30, "quick": 3}
SECONDS = {"cpu": 4.0, "gpu": 0.5, "full": 0.5, "quick": 0.1}
FOREIGN = ("torch", "inductor", "adapterhub")  # backends that are not ours
ALIKE = ("eager", "compiled", "widened", "op")  # arms with the same factors
BOTTLENECKS, ROWS, ADAPTERS = (64, 256), (1, 8, 64, 512, 4096), (1, 8, 64)


@dataclass(frozen=True)
class Row(runs.Row, Cell):
    """One arm of one cell; the base is the block alone."""

    flop_ratio: float  # what the adapter adds to the block's products


def cells(grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid of shapes.GRIDS; `model` restricts `full` to one of shapes.MODELS."""
    if grid == "quick":
        one = Cell(F32, 64, 96, 8, 16, 1, "inference")
        return [one, dataclasses.replace(one, direction="training"), dataclasses.replace(one, adapters=4)]
    if grid == "cpu":
        blocks = [(512, 1408, 64), (1024, 2816, 64), (1024, 2816, 256)]
        # A processor without bf16 products takes seconds for a step of many rows: inference of few of them.
        plain = _star(BF16, blocks, ROWS[:2], ("inference",))
        return [*_star(F32, blocks, ROWS[:4], ("training", "inference")), *plain]
    known = [m for m in MODELS if m.name == (model or "llama-3-8b") or (grid == "full" and not model)]
    blocks = list(dict.fromkeys((m.hidden, m.intermediate, E) for m in known for E in BOTTLENECKS))
    return _star(BF16, blocks, ROWS, ("training", "inference"))


def _star(dtype: torch.dtype, blocks: list, Ms: tuple[int, ...], directions: tuple[str, ...]) -> list[Cell]:
    """One adapter in every block, number of rows and direction; several of them in the last block."""
    found = [Cell(dtype, *block, M, 1, direction) for block in blocks for M in Ms for direction in directions]
    pairs = [(M, adapters) for adapters in ADAPTERS[1:] for M in Ms if adapters <= M <= 64]
    return found + [Cell(dtype, *blocks[-1], M, adapters, "inference") for M, adapters in pairs]


# -- rows -------------------------------------------------------------------------------------------------------------


def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each that could not be timed."""
    added = 2 * cell.E / (3 * cell.f)  # [E, d] and [d, E] beside three times [f, d]
    found = runs.timed(build, cell, kinds, FOREIGN, run, ALIKE)

    def more(arm, columns):
        return {"flop_ratio": 1 + added * (arm.name not in ("ffn", "ffn_again"))}

    return runs.rows_of(Row, partial(labels, cell), found, more, run)


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    return runs.labels(NAME, cell, arm, backend)


def refuse_wrong_results(cells: list[Cell], device: torch.device) -> int:
    """The gate: every backend that is timed, through the samples of both ops; how many ran.

    Raises gate.RedGateError.
    """
    pairs, ran = {(cell.dtype, cell.dtype) for cell in cells}, 0
    for op in (NAME, "batched_lora_"):
        names = [name for name, _ in kernels(op, device)]
        ran += gate.check(registry.ops()[op], names, pairs, device)
    return ran


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    return runs.described(cell, rows, seconds, "FFN")


# -- the README's table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A limit for the op's ratio to the block alone, in fp32."""

    title: str
    place: tuple  # d, E, M, adapters, direction
    limit: float


TARGETS = (
    Target("8 rows, 8 adapters, d = 1024, E = 256, inference", (1024, 256, 8, 8, "inference"), 1.35),
    Target("training step, d = 512, E = 64, 512 rows", (512, 64, 512, 1, "training"), 1.05),
)


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """(met, sentence) for every target; last, whether no cell is slower than eager by more than the clock's spread."""
    ours = [row for row in rows if row.arm == "op" and not row.not_timed]
    found = []
    for target in TARGETS:
        row = max((row for row in ours if _place(row) == ("float32", *target.place)), key=_ratio, default=None)
        measured = "not measured" if row is None else f"{row.ratio_p50:.3f} against {target.limit:.2f}"
        found.append((row is not None and row.ratio_p50 <= target.limit, f"{target.title}: {measured}"))
    eager = {_place(row): row for row in rows if row.arm == "eager" and not row.not_timed}
    slower = [
        f"{row.dtype} d={row.d} E={row.E} M={row.M} {row.adapters} adapters {row.direction}: {row.ratio_p50:.3f} "
        f"against {eager[_place(row)].ratio_p50:.3f}"
        for row in ours
        if _place(row) in eager and row.ratio_p50 / eager[_place(row)].ratio_p50 > 1 + row.aa_spread
    ]
    text = "no cell slower than eager beyond the A/A spread"
    return [*found, (bool(ours) and not slower, text + "".join(f"; {line}" for line in slower))]


def _ratio(row: Row) -> float:
    return row.ratio_p50


def _contender(row: Row) -> str:
    return f"{row.arm} {row.backend}" if row.arm == "op" else row.arm


def _place(row: Row) -> tuple:
    return row.dtype, row.d, row.E, row.M, row.adapters, row.direction


def markdown(rows: list[Row], origin: str) -> str:
    """All that stands between the README's markers."""
    timed, cells = runs.ratio_lines(rows, "ffn", ARMS, _place, _contender)
    lines = [
        [ffn.dtype, f"{ffn.d} x {ffn.f}", str(ffn.E), str(ffn.M), str(ffn.adapters), ffn.direction, *texts]
        for ffn, texts in cells
    ]
    header = ["dtype", "d x f", "E", "M", "adapters", "", "FFN, ms", "A/A", *timed]
    text = (
        "Time of a frozen SwiGLU block with parallel adapters over the block alone, medians, caches emptied before "
        f"every step. {origin}"
    )
    return f"{text}\n\n{grid_table(header, lines)}\n"
