"""A GPU run's rows as markdown: a line per cell and variant of the adapter, a column per contender."""

from benchmarks import hopper
from benchmarks.record import Row
from benchmarks.tables import BOTH, OP, VARIANTS, cell, grid_table, variant

# (arm, backend), in the order of the columns; None: any backend
CONTENDERS = {
    ("peft", None): "PEFT",
    ("compiled", None): "compiled",
    ("unsloth", None): "Unsloth",
    ("axolotl", None): "Axolotl",
    ("automodel", None): "Automodel",
    ("patched", None): "patched",
    ("op", "cuda"): "cuda",
    ("op", hopper.BACKEND): hopper.BACKEND,
    ("op", "triton"): "triton",
    ("op", "reference"): "reference",
}
VIEWS = ((BOTH, "graph"), ("forward", "graph"), (BOTH, "eager"))
TITLES = {"graph": "replayed from a CUDA graph, cold L2", "eager": "eager, from an idle device, cold L2"}


def contender(row: Row) -> tuple[str, str | None]:
    return row.arm, row.backend if row.arm == "op" else None


def view(rows: list[Row], direction: str, timing: str) -> str:
    """Ratios to the frozen linear of the same rounds; empty where nothing was timed like this."""
    rows = [row for row in rows if (row.op, row.timing) == (OP, timing)]
    shown = [row for row in rows if row.direction == direction or row.not_timed]
    there = [key for key in CONTENDERS if any(contender(row) == key for row in shown)]
    lines = []
    for frozen in (row for row in shown if row.arm == "frozen"):
        beside = [row for row in shown if _place(row) == _place(frozen)]
        for key, title in VARIANTS.items():
            found = {contender(row): row for row in beside if row.p and variant(row) == key}
            if not found:
                continue
            best = found.get(("op", "cuda")) or found.get(("op", "triton")) or found.get(("patched", None))
            share = "" if best is None else f"{best.tflops:.0f} TFLOP/s, {best.gbs:.0f} GB/s, {best.peak_share:.0%}"
            lines.append(
                [str(frozen.M), f"{frozen.K} x {frozen.N}", frozen.r, title, f"{1e3 * frozen.ms_p50:.1f}",
                 f"{frozen.aa_spread:.1%}", *(_ratio(found.get(name)) for name in there), share]
            )  # fmt: skip
    header = ["M", "K x N", "r", "adapter", "frozen, us", "A/A", *(CONTENDERS[key] for key in there), "ours, of peak"]
    return grid_table(header, lines) if lines else ""


def _place(row: Row) -> tuple:
    return cell(row)[:-1]  # all but the direction, which a row without a time has only one of


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return "not timed" if row.not_timed else f"{row.ratio_p50:.2f}"


def not_timed(rows: list[Row]) -> list[str]:
    """Why arms have no time, each reason once."""
    found = {}
    for row in rows:
        if row.not_timed:
            found.setdefault((row.arm, row.timing, row.not_timed), []).append(f"M={row.M} N={row.N} p={row.p}")
    return [f"{arm}, {timing}, at {'; '.join(where)}: {why}" for (arm, timing, why), where in found.items()]


def target_table(verdicts: list[tuple[bool | None, str, str, str]]) -> str:
    """One line per target: (met, title, limit, measured); None: not measured."""
    outcome = {True: "met", False: "missed", None: "not measured yet"}
    return grid_table(["target", "limit", "measured", ""], [[t, li, m, outcome[met]] for met, t, li, m in verdicts])
