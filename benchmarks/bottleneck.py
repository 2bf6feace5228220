"""Times a feed-forward block with bottleneck adapters beside the block alone. `run.py --op bottleneck_adapter`

The block is frozen: y = (silu(x W_g^T) * (x W_u^T)) W_d^T. Its adapters are parallel, y += s (relu(x A^T + a) B^T + b).
A training step is y, then the gradients of x and of the adapter; inference is y alone.

    ffn, ffn_again   the block alone, twice: the denominator, and what the clock is worth
    eager            the adapter in plain PyTorch; of several, a loop over them with their rows gathered
    compiled         block and eager adapter under torch.compile
    adapterhub       AdapterHub's own module in place of the eager one, where `adapters` can be imported
    op               bottleneck_adapter; of several, batched_lora_ over a pool, whose route is ready

Caches are emptied before every step, as in a model, where the other layers do it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import peft_kernels
from benchmarks import gate, measure, record
from benchmarks.batched_lora.timing import clock
from benchmarks.runs import Arm, Run
from benchmarks.shapes import BF16, F32, MODELS
from benchmarks.tables import grid_table
from peft_kernels import backends, registry

NAME = "bottleneck_adapter"
ARMS = ("eager", "compiled", "adapterhub", "op")
LEAST_ROUNDS = {"cpu": 15, "gpu": 50, "full": 30, "quick": 3}
SECONDS = {"cpu": 4.0, "gpu": 0.5, "full": 0.5, "quick": 0.1}
FOREIGN = ("torch", "inductor", "adapterhub")  # backends that are not ours
SCALING = 4.0
BOTTLENECKS, ROWS, ADAPTERS = (64, 256), (1, 8, 64, 512, 4096), (1, 8, 64)


@dataclass(frozen=True)
class Cell:
    """M rows through a block [d -> f -> d] with `adapters` of bottleneck E, taking turns at the rows."""

    dtype: torch.dtype
    d: int
    f: int
    E: int
    M: int
    adapters: int
    direction: str  # "training" (of one adapter) or "inference"

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.d} x {self.f} E={self.E} M={self.M} {self.adapters} adapters {self.direction}"


@dataclass(frozen=True)
class Row(record.Origin):
    """One arm of one cell."""

    op: str
    arm: str
    backend: str
    dtype: str
    d: int
    f: int
    E: int
    M: int
    adapters: int
    direction: str
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio_p20: float  # to the block alone in the same round
    ratio_p50: float
    ratio_p80: float
    aa_spread: float  # how far from 1 the middle 60% of the rounds put the ratio of the two equal blocks
    flop_ratio: float  # what the adapter adds to the block's products
    not_timed: str  # why this arm has no time (its numbers are NaN); empty where it has


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


# -- arms -------------------------------------------------------------------------------------------------------------


class NotHere(Exception):  # noqa: N818  (no error: a contender that this cell is not for)
    """Why a contender is not timed in a cell."""


class Problem:
    """x [M, d], the block's weights, and the factors of every adapter: (A, a, B, b)."""

    def __init__(self, cell: Cell, device: torch.device):
        def random(*shape, scale=1.0):
            return torch.randn(shape, device=device).mul_(scale).to(cell.dtype)

        d, f, E = cell.d, cell.f, cell.E
        self.cell, self.device = cell, device
        self.training = cell.direction == "training"
        self.x, self.dy = random(cell.M, d).requires_grad_(self.training), random(cell.M, d)
        self.gate, self.up = random(f, d, scale=d**-0.5), random(f, d, scale=d**-0.5)
        self.down = random(d, f, scale=f**-0.5)
        self.adapters = [
            tuple(t.requires_grad_(self.training) for t in (
                random(E, d, scale=d**-0.5), random(E), random(d, E, scale=E**-0.5), random(d)))
            for _ in range(cell.adapters)
        ]  # fmt: skip
        self.ids = torch.arange(cell.M, device=device) % cell.adapters

    def ffn(self, x: Tensor) -> Tensor:
        hidden = functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up)
        return functional.linear(hidden, self.down)

    def step(self, forward: Callable[[Tensor], Tensor], parameters: tuple[Tensor, ...]) -> Callable[[], object]:
        """What is timed: the output, or the gradients too."""
        if not self.training:
            return torch.no_grad()(lambda: forward(self.x))
        return lambda: torch.autograd.grad(forward(self.x), (self.x, *parameters), self.dy)


def _bottleneck(x: Tensor, A: Tensor, a: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return functional.linear(functional.relu(functional.linear(x, A, a)), B, b) * SCALING


def _eager_forward(problem: Problem) -> Callable[[Tensor], Tensor]:
    if problem.cell.adapters == 1:
        return lambda x: problem.ffn(x) + _bottleneck(x, *problem.adapters[0])

    rows_of = [(problem.ids == i).nonzero()[:, 0] for i in range(problem.cell.adapters)]

    def looped(x):
        y = problem.ffn(x)
        for rows, adapter in zip(rows_of, problem.adapters, strict=True):
            y.index_add_(0, rows, _bottleneck(x[rows], *adapter))
        return y

    return looped


def _eager(problem: Problem) -> list[Arm]:
    return [Arm("eager", "torch", problem.step(_eager_forward(problem), problem.adapters[0]))]


def _compiled(problem: Problem) -> list[Arm]:
    if problem.cell.adapters > 1:
        raise NotHere("a loop over adapters, whose rows it reads, is no graph")
    compiled = torch.compile(_eager_forward(problem), dynamic=False)
    return [Arm("compiled", "inductor", problem.step(compiled, problem.adapters[0]))]


def _adapterhub(problem: Problem) -> list[Arm]:
    try:
        from adapters import ParBnConfig
        from adapters.methods.modeling import ParallelAdapter
    except Exception as error:  # it needs a transformers of its own, and fails in many ways beside another
        raise NotHere(f"AdapterHub cannot be imported: {type(error).__name__}: {error}") from error
    if problem.cell.adapters > 1:
        raise NotHere("its BatchSplit is a loop as well, and needs a whole model")
    config = ParBnConfig(reduction_factor=problem.cell.d / problem.cell.E, scaling=SCALING)
    module = ParallelAdapter("a", problem.cell.d, problem.cell.E, config).to(problem.device, problem.cell.dtype)
    forward = lambda x: problem.ffn(x) + module(x, None)[0]  # noqa: E731
    return [Arm("adapterhub", "adapterhub", problem.step(forward, tuple(module.parameters())))]


def _op(problem: Problem) -> list[Arm]:
    made = _one(problem) if problem.cell.adapters == 1 else _pooled(problem)
    if not made:
        raise NotHere(f"no backend but the reference is linked for {problem.device.type}")
    return made


def _kernels(op: str, device: torch.device) -> list[tuple[str, Callable]]:
    names = [name for name in backends.linked(op, device.type) if name != "reference"]
    return [(name, getattr(getattr(torch.ops, f"peft_kernels_{name}"), op).default) for name in names]


def _one(problem: Problem) -> list[Arm]:
    A, a, B, b = problem.adapters[0]
    numbers = ("relu", SCALING, "none", 1e-5, 0.0, "bottleneck", None)
    return [
        Arm("op", name, problem.step(
            lambda x, op=op: op(x, problem.ffn(x), A, a, B, b, None, None, None, None, *numbers)[0], (A, a, B, b)))
        for name, op in _kernels(NAME, problem.device)
    ]  # fmt: skip


def _pooled(problem: Problem) -> list[Arm]:
    cell = problem.cell
    pool = peft_kernels.AdapterPool(
        {"ffn": peft_kernels.Site(cell.d, cell.d)}, cell.adapters, cell.dtype, problem.device
    )
    for i, (A, a, B, b) in enumerate(problem.adapters):
        entry = peft_kernels.SiteAdapter(A, B, SCALING, b, activation="relu", down_bias=a)
        pool.add(f"a{i}", {"ffn": entry})
    slots = pool.ids([f"a{i}" for i in problem.ids.tolist()])
    route = torch.ops.peft_kernels.batched_lora_route.default(slots, pool.slots)
    pages_in, *rest = pool.tables("ffn")

    def forward(x, op):
        y = problem.ffn(x)
        op([y], x, route, pages_in, *([part] for part in rest))
        return y

    return [
        Arm("op", name, problem.step(lambda x, op=op: forward(x, op), ()))
        for name, op in _kernels("batched_lora_", problem.device)
    ]


_MAKERS = {"eager": _eager, "compiled": _compiled, "adapterhub": _adapterhub, "op": _op}


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """The block twice and the arms of the given kinds; and for each contender that cannot be here, why."""
    problem = Problem(cell, device)
    arms = [Arm(name, "torch", problem.step(problem.ffn, ())) for name in ("ffn", "ffn_again")]
    left_out = {}
    for kind in kinds:
        try:
            arms += _MAKERS[kind](problem)
        except NotHere as reason:
            left_out[kind] = str(reason)
    return arms, left_out


# -- rows -------------------------------------------------------------------------------------------------------------


def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each that could not be timed."""
    torch.manual_seed(0)
    torch.compiler.reset()
    arms, left_out = build(cell, run.device, kinds)
    step = clock(run.device)
    able, failed = measure.runnable(arms, step, FOREIGN)
    times = measure.interleave(able, step, run.rounds, run.seconds)
    added = 2 * cell.E / (3 * cell.f)  # [E, d] and [d, E] beside three times [f, d]
    rows = [
        Row(**labels(cell, arm.name, arm.backend), **columns, flop_ratio=1 + added * (arm not in able[:2]),
            not_timed="", **run.origin)
        for arm, columns in measure.compared(times, able[0], able[1])
    ]  # fmt: skip
    nothing = record.no_numbers(Row)
    for name, reason in (left_out | {arm.name: reason for arm, reason in failed.items()}).items():
        rows.append(Row(**labels(cell, name, ""), rounds=0, **nothing, not_timed=reason, **run.origin))
    return rows


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    given = dataclasses.asdict(cell) | {"dtype": str(cell.dtype).removeprefix("torch.")}
    return {"op": NAME, "arm": arm, "backend": backend} | given


def refuse_wrong_results(cells: list[Cell], device: torch.device) -> int:
    """The gate: every backend that is timed, through the samples of both ops; how many ran.

    Raises gate.RedGateError.
    """
    pairs, ran = {(cell.dtype, cell.dtype) for cell in cells}, 0
    for op in (NAME, "batched_lora_"):
        names = [name for name, _ in _kernels(op, device)]
        ran += gate.check(registry.ops()[op], names, pairs, device)
    return ran


def time_cells(cells: list[Cell], kinds: tuple[str, ...], run: Run, say: Callable[[str], None], out: Path | None):
    """Cell by cell, said and written as they finish."""
    record.one_by_one(cells, lambda cell: time_cell(cell, kinds, run), described, Row, say, out)


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    ffn = rows[0]
    lines = [f"{cell.title}: FFN {ffn.ms_p50:.3f} ms, A/A {ffn.aa_spread:.1%}, {ffn.rounds} rounds, {seconds:.0f} s"]
    for row in rows[2:]:
        outcome = f"{row.ratio_p50:.3f} ({row.ratio_p20:.3f} - {row.ratio_p80:.3f})"
        lines.append(
            f"  {row.arm + ' ' + row.backend:20s} {f'not timed: {row.not_timed}' if row.not_timed else outcome}"
        )
    return "\n".join(lines)


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
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(_place(row), {})[_contender(row)] = row
    timed = list(dict.fromkeys(_contender(row) for row in rows if row.arm in ARMS and not row.not_timed))
    lines = []
    for (dtype, d, E, M, adapters, direction), arms in cells.items():
        ffn = arms["ffn"]
        ratios = ["" if arm not in arms or arms[arm].not_timed else f"{arms[arm].ratio_p50:.2f}" for arm in timed]
        lines.append(
            [dtype, f"{d} x {ffn.f}", str(E), str(M), str(adapters), direction, f"{ffn.ms_p50:.3g}",
             f"{ffn.aa_spread:.1%}", *ratios]
        )  # fmt: skip
    header = ["dtype", "d x f", "E", "M", "adapters", "", "FFN, ms", "A/A", *timed]
    text = (
        "Time of a frozen SwiGLU block with parallel adapters over the block alone, medians, caches emptied before "
        f"every step. {origin}"
    )
    return f"{text}\n\n{grid_table(header, lines)}\n"
