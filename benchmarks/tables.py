"""A benchmark's rows as markdown tables. Means are geometric means of the cells' median ratios to the frozen linear."""

import math

from benchmarks.record import Row

OP = "lora_linear"
BOTH = "forward+backward"
# (adapters wider than the base, p), in the order of the tables' columns
VARIANTS = {
    (False, "0"): "no dropout",
    (False, "0.1"): "dropout 0.1",
    (True, "0"): "fp32 adapters on bf16",
    (True, "0.1"): "fp32 adapters on bf16, dropout 0.1",
}
_SHOWN = ("frozen", "frozen_again", "peft", "patched")
_SPOKEN = {
    "frozen": "frozen linear",
    "peft": "PEFT",
    "compiled": "PEFT under torch.compile",
    "op": "the operator, called directly",
}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def variant(row: Row) -> tuple[bool, str]:
    return row.adapter_dtype != row.dtype, row.p


def select(rows: list[Row], arm: str, direction: str = BOTH, op: str = OP) -> list[Row]:
    """Rows of one arm that was timed; the raw operator of the reference is no contender."""
    found = [row for row in rows if (row.op, row.arm, row.direction) == (op, arm, direction) and not row.not_timed]
    return [row for row in found if not (arm == "op" and row.backend == "reference")]


def cell(row: Row) -> tuple:
    return row.op, row.dtype, row.M, row.K, row.N, row.r, row.direction


def means(rows: list[Row], arm: str, key: tuple[bool, str], direction: str = BOTH) -> tuple[float, int, float, int]:
    """Geometric mean over all cells and how many there are; the same over the cells with M >= 16."""
    chosen = [row for row in select(rows, arm, direction) if variant(row) == key]
    wide = [row.ratio_p50 for row in chosen if row.M >= 16]
    if not chosen or not wide:
        return math.nan, len(chosen), math.nan, len(wide)
    return geometric_mean([row.ratio_p50 for row in chosen]), len(chosen), geometric_mean(wide), len(wide)


def grid_table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _number(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def mean_table(rows: list[Row], limits: dict[tuple[bool, str], str]) -> str:
    """One line per variant and direction: PEFT and the patched layer, over all cells and those with M >= 16.

    limits: what forward+backward is to reach, by variant.
    """
    header = ["adapter", "pass", "cells", "PEFT", "patched", "cells, M >= 16", "PEFT", "patched", "target"]
    lines = []
    for direction in (BOTH, "forward"):
        for key, title in VARIANTS.items():
            peft, patched = (means(rows, arm, key, direction) for arm in ("peft", "patched"))
            if not patched[1]:
                continue
            target = limits.get(key, "") if direction == BOTH else ""
            lines.append(
                [title, direction, str(patched[1]), _number(peft[0]), f"**{_number(patched[0])}**",
                 str(patched[3]), _number(peft[2]), f"**{_number(patched[2])}**", target]
            )  # fmt: skip
    return grid_table(header, lines)


def cell_table(rows: list[Row]) -> str:
    """Forward+backward of every cell: PEFT / patched for each variant, and what the patched layer's rate amounts to."""
    by_cell: dict[tuple, dict] = {}
    for arm in ("peft", "patched"):
        for row in select(rows, arm):
            by_cell.setdefault(cell(row), {})[arm, variant(row)] = row
    keys = [key for key in VARIANTS if any(("patched", key) in arms for arms in by_cell.values())]
    frozen = {cell(row): row for row in select(rows, "frozen")}
    header = ["base", "M", "K x N", "frozen, ms", "A/A", *(VARIANTS[key] for key in keys), "patched, rate", "of peak"]
    lines = []
    for name, arms in by_cell.items():
        base = frozen[name]
        ratios = [_pair(arms.get(("peft", key)), arms.get(("patched", key))) for key in keys]
        row = arms.get(("patched", keys[0])) if keys else None
        rate = "" if row is None else f"{row.tflops:.2f} TFLOP/s, {row.gbs:.0f} GB/s"
        lines.append(
            [base.dtype, str(base.M), f"{base.K} x {base.N}", f"{base.ms_p50:.3g}", f"{base.aa_spread:.1%}", *ratios,
             rate, "" if row is None else f"{row.peak_share:.0%}"]
        )  # fmt: skip
    return grid_table(header, lines)


def _pair(peft: Row | None, patched: Row | None) -> str:
    return " / ".join(f"{row.ratio_p50:.2f}" if row else "" for row in (peft, patched)) if peft or patched else ""


def saved_table(rows: list[Row]) -> str:
    """Bytes that autograd keeps per token, at the widest cell of each base dtype."""
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in select(rows, "patched")):
        widest = max((row.K, row.M) for row in select(rows, "patched") if row.dtype == dtype)
        there = {
            (arm, variant(row)): row
            for arm in ("peft", "patched")
            for row in select(rows, arm)
            if row.dtype == dtype and widest == (row.K, row.M)
        }
        for key, title in VARIANTS.items():
            peft, patched = there.get(("peft", key)), there.get(("patched", key))
            if peft and patched:
                lines.append(
                    [dtype, str(widest[1]), str(widest[0]), title, f"{peft.saved_bytes:,}", f"{patched.saved_bytes:,}",
                     f"{patched.saved_bytes / peft.saved_bytes:.2f}"]
                )  # fmt: skip
    return grid_table(["base", "M", "K", "adapter", "PEFT, bytes", "patched, bytes", "ratio"], lines)


def contender_table(rows: list[Row]) -> str:
    """Every other arm beside PEFT and the patched layer, over the cells in which that arm was timed."""
    names = dict.fromkeys(row.arm for row in rows if row.op == OP and row.arm not in _SHOWN)
    lines = []
    for name in names:
        for key, title in VARIANTS.items():
            chosen = {cell(row): row.ratio_p50 for row in select(rows, name) if variant(row) == key}
            if not chosen:
                continue
            beside = (
                [row.ratio_p50 for row in select(rows, arm) if variant(row) == key and cell(row) in chosen]
                for arm in ("peft", "patched")
            )
            values = [_number(geometric_mean(v)) if v else "" for v in (list(chosen.values()), *beside)]
            lines.append([_SPOKEN.get(name, name), title, str(len(chosen)), *values])
    return grid_table(["arm", "adapter", "cells", "the arm", "PEFT", "patched"], lines) if lines else ""


def seam_table(rows: list[Row]) -> str:
    """Microseconds of a call whose kernels have nothing to do."""
    lines = []
    for arm in ("frozen", "peft", "patched", "op"):
        forward, whole = select(rows, arm, "forward", "seam"), select(rows, arm, BOTH, "seam")
        for first, second in zip(forward, whole, strict=True):
            dropout = f"dropout {first.p}" if first.p not in ("", "0") else "no dropout"
            times = (f"{1e3 * row.ms_p50:.1f}" for row in (first, second))
            lines.append([_SPOKEN.get(arm, arm), "" if arm == "frozen" else dropout, *times])
    return (
        grid_table(["call, M = 1, K = N = 64, r = 16", "adapter", "forward, us", f"{BOTH}, us"], lines) if lines else ""
    )
