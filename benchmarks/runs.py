"""What the benchmarks that are modules of their own share: arms and who is left out, the clock, rows, their words."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import cuda_clock, gate, hopper, limits, measure, record
from peft_kernels import backends

_DEFAULT_CACHE = 32 << 20  # where the system does not say
_LONG_SUMS = 1e-4  # what the order of a sum in fp32 may cost, of the largest value


class NotHere(Exception):  # noqa: N818  (no error: a contender that this cell is not for)
    """Why a contender is not timed in a cell."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One contender in a cell.

    `run` does what is timed; the caller's clock times it and drops what it returns. Only train_many's takes no clock:
    its `run` returns the milliseconds that it measured itself.
    """

    name: str
    backend: str
    run: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Row(record.Origin):
    """One arm of one cell: what its columns are beside the cell's own."""

    op: str
    arm: str
    backend: str
    dtype: str
    timing: str  # "eager", or "graph": replayed from a CUDA graph
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio_p20: float  # to the base in the same round
    ratio_p50: float
    ratio_p80: float
    aa_spread: float  # how far from 1 the middle 60% of the rounds put the ratio of the two equal bases
    not_timed: str  # why this arm has no time (its numbers are NaN); empty where it has


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


def arms_of(problem, makers: dict[str, Callable], kinds: tuple[str, ...]) -> tuple[list, dict[str, str]]:
    """The arms of the given kinds; and for each kind that cannot be here, why."""
    arms, left_out = [], {}
    for kind in kinds:
        try:
            arms += makers[kind](problem)
        except NotHere as reason:
            left_out[kind] = str(reason)
    return arms, left_out


def absent() -> str:
    """What whole models need and is not installed, or nothing."""
    return ", ".join(name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None)


def kernels(op: str, device: torch.device) -> list[tuple[str, Callable]]:
    """Our backends of an op on a device, but the reference."""
    names = [name for name in backends.linked(op, device.type) if name != "reference"]
    return [(name, getattr(getattr(torch.ops, f"peft_kernels_{name}"), op).default) for name in names]


def last_cache() -> int:
    """Bytes of the processor's largest cache."""
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in texts), default=_DEFAULT_CACHE)


def clock(device: torch.device, timing: str) -> Callable[[Arm], float]:
    """ms of one step of an arm that finds nothing in a cache; `timing` as in Row."""
    if device.type == "cuda":
        return limits.clock(device) if timing == "graph" else _eager_clock(device)
    other = torch.ones(2 * last_cache() // 4)

    def wall(arm: Arm) -> float:
        other.sum()
        start = time.perf_counter_ns()
        arm.run()
        return (time.perf_counter_ns() - start) * 1e-6

    return wall


def _eager_clock(device: torch.device) -> Callable[[Arm], float]:
    """ms from an idle device to the last kernel: what Python costs counts."""
    flush = cuda_clock.l2_flush(device)

    def step(arm: Arm) -> float:
        def body(mark):
            mark()
            arm.run()
            mark()

        flush()
        torch.cuda.synchronize()
        return cuda_clock.eager(body)[0]

    return step


# -- rows -------------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """The times of the arms, how they were taken (as in Row), and (arm, backend, reason) for each that has none."""

    times: dict
    timing: str
    absent: list[tuple[str, str, str]]


def timed(
    build: Callable,
    cell,
    kinds: tuple[str, ...],
    foreign: tuple[str, ...],
    run: Run,
    alike: tuple[str, ...] = (),
    timing: str = "graph",
    depth: int = 1,
) -> Timed:
    """Builds the arms of a cell and times them: all from CUDA graphs, or all eagerly where the base cannot be captured.

    Only those of `foreign` backends may fail, and any contender where a graph is captured. The arms named `alike` must
    compute the same, as `differing` has it: a foreign one that differs from the last of them is not timed, and one of
    ours raises gate.RedGateError.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    foreign = (*foreign, hopper.BACKEND)
    arms, left_out = build(cell, run.device, kinds)
    timing = timing if run.device.type == "cuda" else "eager"
    step = hopper.stepping(clock(run.device, timing))
    if timing == "graph" and measure.runnable(arms[:1], step, (arms[0].backend,))[1]:
        step, timing = hopper.stepping(clock(run.device, "eager")), "eager"
    able, failed = measure.runnable(arms, step, foreign if timing == "eager" else measure.contenders(arms))
    for arm, reason in differing([arm for arm in able if arm.name in alike], cell.dtype, depth).items():
        if arm.backend not in foreign:
            raise gate.RedGateError(f"{cell.title}: {arm.name} {arm.backend} {reason}")
        failed[arm] = reason
        # what is wrong with its base is wrong without it
        failed |= {part: reason for part in able if part.name == f"{arm.name} alone" and part.backend == arm.backend}
    able = [arm for arm in able if arm not in failed]
    absent = [(name, "", reason) for name, reason in left_out.items()]
    absent += [(arm.name, arm.backend, reason) for arm, reason in failed.items()]
    return Timed(measure.interleave(able, step, run.rounds, run.seconds), timing, absent)


def differing(arms: list, dtype: torch.dtype, depth: int = 1) -> dict:
    """The arms that do not compute what the last one does, to a few roundings of the largest value; and by how much.

    Roundings of `depth` layers, one behind another, add up as a random walk does.
    """
    found = []
    for arm in arms:
        with hopper.asked_for(arm.backend):
            found.append(tree_leaves(arm.run()))
    allowed, wrong = 8 * torch.finfo(dtype).eps * depth**0.5 + _LONG_SUMS, {}
    for arm, ys in zip(arms[:-1], found[:-1], strict=True):
        shares = [_distance(y, expected) for y, expected in zip(ys, found[-1], strict=True)]
        if not all(share <= allowed for share in shares):  # NaN is never small
            wrong[arm] = f"computes something else than {arms[-1].name}: {max(shares):.1%} of the largest value away"
    return wrong


def wrong_twins(arms: list, dtype: torch.dtype, x: Tensor, dy: Tensor) -> dict:
    """Of layers those of hopper.BACKEND that compute, with the same mask, something else than `cuda`; and why."""

    def computed(arm) -> Arm:
        def run():
            torch.manual_seed(0)
            y = arm.call(x)
            return y, *torch.autograd.grad(y, [t for t in (x, *arm.parameters) if t.requires_grad], dy)

        return Arm(arm.name, arm.backend, run)

    wrong = {}
    for twin in (arm for arm in arms if arm.backend == hopper.BACKEND):
        pair = [computed(arm) for arm in arms if arm.parameters is twin.parameters]
        for reason in differing(pair, dtype).values():
            wrong[twin] = reason
    return wrong


def _distance(y: Tensor, expected: Tensor) -> float:
    """Of the largest value."""
    y, expected = y.double(), expected.double()
    return ((y - expected).abs().max() / expected.abs().max()).item()


def rows_of(
    kind: type[record.Origin],
    labels: Callable[[str, str], dict],
    found: Timed,
    more: Callable[[object, dict], dict],
    run: Run,
) -> list:
    """A row for every arm, whose first two are the base twice, and one that says why for each that is absent.

    labels(arm, backend) names what was timed; more(arm, columns) is what a row has beside measure.compared's columns.
    """
    base, again = list(found.times)[:2]
    given = {"timing": found.timing, **run.origin}
    rows = [
        kind(**labels(arm.name, arm.backend), **columns, **more(arm, columns), not_timed="", **given)
        for arm, columns in measure.compared(found.times, base, again)
    ]
    nothing = record.no_numbers(kind)
    for name, backend, reason in found.absent:
        rows.append(kind(**labels(name, backend), rounds=0, **nothing, not_timed=reason, **given))
    return rows


def labels(op: str, cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed: those of the cell, which is a dataclass."""
    given = dataclasses.asdict(cell) | {"dtype": str(cell.dtype).removeprefix("torch.")}
    return {"op": op, "arm": arm, "backend": backend} | given


def described(cell, rows: list, seconds: float, base: str, more: Callable[[object], str] = lambda row: "") -> str:
    """One block per cell: the base by its name, then every other arm's ratio to it and what more(row) says."""
    first = rows[0]
    lines = [
        f"{cell.title}: {base} {first.ms_p50:.3f} ms, A/A {first.aa_spread:.1%}, {first.rounds} rounds, {seconds:.0f} s"
    ]
    for row in rows[2:]:
        outcome = f"not timed: {row.not_timed}"
        if not row.not_timed:
            outcome = f"{row.ratio_p50:.3f} ({row.ratio_p20:.3f} - {row.ratio_p80:.3f}){more(row)}"
        lines.append(f"  {f'{row.arm} {row.backend}':24s} {outcome}")
    return "\n".join(lines)


# -- the README's table -----------------------------------------------------------------------------------------------


def ratio_lines(
    rows: list, base: str, arms: tuple[str, ...], place: Callable, contender: Callable
) -> tuple[list[str], list[tuple[object, list[str]]]]:
    """The contenders that were timed; for each cell its base row and the texts of ms, A/A and each contender's ratio.

    place(row) is the cell's key, contender(row) the name of a column.
    """
    cells: dict[tuple, dict] = {}
    for row in rows:
        cells.setdefault(place(row), {})[contender(row)] = row
    timed = list(dict.fromkeys(contender(row) for row in rows if row.arm in arms and not row.not_timed))
    lines = []
    for cell in cells.values():
        first = cell[base]
        ratios = ["" if arm not in cell or cell[arm].not_timed else f"{cell[arm].ratio_p50:.2f}" for arm in timed]
        lines.append((first, [f"{first.ms_p50:.3g}", f"{first.aa_spread:.1%}", *ratios]))
    return timed, lines
