"""Times attention over a prefix and own keys beside attention without the prefix. `run.py --op prefix_attention`

Prefill is causal attention of S queries on S keys, decoding that of one query on T keys of a cache. A training step is
the output, then the gradients of q, k, v and of the prefix; inference is the output alone.

    none, none_again   attention without a prefix, twice: the denominator, and what the clock is worth
    peft               what HF PEFT makes of a prefix: a copy for each row before its keys, a mask of booleans
    cat                the concatenation with SDPA's causal_lower_right, without a mask; on a GPU each of its backends
    flex               FlexAttention over the concatenation, compiled
    merged             two calls of flash attention, merged by their log-sum-exps
    op                 prefix_attention

Caches are emptied before every step, as in a model, where the other layers do it.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import gate, runs
from benchmarks.prefix_arms import ARMS, NAME, Cell, build
from benchmarks.runs import Run, kernels
from benchmarks.shapes import BF16, F32
from benchmarks.tables import grid_table
from peft_kernels import registry

LEAST_ROUNDS = {"cpu": 15, "gpu": 50, "full": 30, "quick": 3}
SECONDS = {"cpu": 2.0, "gpu": 0.5, "full": 0.5, "quick": 0.1}
FOREIGN = ("torch", "inductor", "flash_attention", "cudnn_attention", "efficient_attention")
SMALL, LLAMA_8B = (8, 4, 64), (32, 8, 128)  # query heads, heads of keys, head dim


@dataclass(frozen=True)
class Target:
    """A limit for the op's ratio to attention without a prefix, in fp32, or to the arm `than` of the same cell."""

    title: str
    place: tuple  # B, S, T, P, prefixes, direction
    limit: float
    than: str = ""


TARGETS = (
    Target("decoding, 32 rows, T = 128, one prefix of 128", (32, 1, 128, 128, 1, "inference"), 0.6),
    Target("prefill, 4 rows, S = 128, P = 128, over cat", (4, 128, 128, 128, 1, "inference"), 1.0, "cat"),
    Target("training step, 4 rows, S = 128, P = 32, over PEFT", (4, 128, 128, 32, 1, "training"), 1.0, "peft"),
)


@dataclass(frozen=True)
class Row(runs.Row, Cell):
    """One arm of one cell; the base is attention without a prefix."""

    flop_ratio: float  # what the prefix adds to the products


def cells(grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid of shapes.GRIDS, which are of one model."""
    if grid == "quick":
        one = Cell(F32, 4, 2, 32, 2, 1, 9, 5, 1, "inference")
        prefill = dataclasses.replace(one, S=9)
        return [one, dataclasses.replace(one, prefixes=2), prefill, dataclasses.replace(prefill, direction="training")]
    if grid == "cpu":
        decode = [(B, T, P) for B in (1, 8, 32) for T in (128, 512, 2048) for P in (32, 128, 1024)]
        decode += [(1, 512, 8192), (8, 512, 8192), (32, 128, 8192)]
        prefill = [(B, S, P) for B in (1, 4) for S in (128, 512) for P in (16, 32, 128)]
        first = [Cell(F32, *SMALL, *target.place) for target in TARGETS]
        each = _decoding(F32, SMALL, decode, ((8, 512, 128), (32, 128, 128)))
        plain = [Cell(BF16, *SMALL, 32, 1, 128, 128, 1, "inference")]
        return list(dict.fromkeys([*first, *each, *_prefill(F32, SMALL, prefill), *plain]))
    decode = [(B, T, P) for B in (1, 8, 32, 64) for T in (128, 512, 2048) for P in (32, 128, 1024, 8192)]
    prefill = [(B, S, P) for B in (1, 8, 32) for S in (128, 512, 1024, 2048) for P in (16, 32, 128, 200, 1024)]
    if grid == "gpu":
        decode = [(B, 512, P) for B in (1, 64) for P in (32, 128, 1024, 8192)]
        prefill = [(8, S, P) for S in (512, 1024) for P in (32, 128, 1024)]
    each = [(B, T, P) for B, T, P in decode if B > 1 and P <= 1024]
    return [*_decoding(BF16, LLAMA_8B, decode, each), *_prefill(BF16, LLAMA_8B, prefill)]


def _decoding(dtype, heads, shared, each) -> list[Cell]:
    """One prefix for all rows, then one for each."""
    found = [Cell(dtype, *heads, B, 1, T, P, 1, "inference") for B, T, P in shared]
    return found + [Cell(dtype, *heads, B, 1, T, P, B, "inference") for B, T, P in each]


def _prefill(dtype, heads, shapes) -> list[Cell]:
    return [
        Cell(dtype, *heads, B, S, S, P, 1, direction) for direction in ("inference", "training") for B, S, P in shapes
    ]


# -- rows -------------------------------------------------------------------------------------------------------------


def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each that could not be timed."""
    pairs = cell.S * cell.T - cell.S * (cell.S - 1) // 2
    found = runs.timed(build, cell, kinds, FOREIGN, run, ARMS)

    def more(arm, columns):
        return {"flop_ratio": 1 + cell.S * cell.P / pairs * (arm.name not in ("none", "none_again"))}

    return runs.rows_of(Row, partial(labels, cell), found, more, run)


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    return runs.labels(NAME, cell, arm, backend)


def refuse_wrong_results(cells: list[Cell], device: torch.device) -> int:
    """The gate: every backend that is timed, through the op's samples; how many ran.

    Raises gate.RedGateError.
    """
    pairs = {(cell.dtype, cell.dtype) for cell in cells}
    return gate.check(registry.ops()[NAME], [name for name, _ in kernels(NAME, device)], pairs, device)


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    return runs.described(cell, rows, seconds, "no prefix")


# -- the README's table -----------------------------------------------------------------------------------------------


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """(met, sentence) for every target."""
    ratio = {(_place(row), row.arm): row.ratio_p50 for row in rows if not row.not_timed}
    found = []
    for target in TARGETS:
        place = ("float32", *target.place)
        ours, other = ratio.get((place, "op")), ratio.get((place, target.than), 1.0)
        measured = "not measured" if ours is None else f"{ours / other:.3f} against {target.limit:.2f}"
        found.append((ours is not None and ours / other <= target.limit, f"{target.title}: {measured}"))
    return found


def _contender(row: Row) -> str:
    return row.arm if row.backend in ("torch", "inductor", "") else f"{row.arm} {row.backend}"


def _place(row: Row) -> tuple:
    return row.dtype, row.B, row.S, row.T, row.P, row.prefixes, row.direction


def markdown(rows: list[Row], origin: str) -> str:
    """All that stands between the README's markers."""
    timed, cells = runs.ratio_lines(rows, "none", ARMS, _place, _contender)
    lines = []
    for none, texts in cells:
        sizes = [str(size) for size in (none.B, none.S, none.T, none.P)]
        whose = "shared" if none.prefixes == 1 else "one a row"
        lines.append([none.dtype, *sizes, whose, none.direction, *texts])
    header = ["dtype", "B", "S", "T", "P", "prefix", "", "none, ms", "A/A", *timed]
    first = rows[0]
    text = (
        "Time of attention over a prefix and own keys over that of attention without a prefix, medians, caches emptied "
        f"before every step; {first.Hq} query heads, {first.Hkv} heads of keys, head dim {first.D}. {origin}"
    )
    return f"{text}\n\n{grid_table(header, lines)}\n"
