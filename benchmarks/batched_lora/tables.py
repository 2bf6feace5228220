"""The README's tables of batched_lora, and its targets, from the rows of a CPU run."""

import math
from dataclasses import dataclass

from benchmarks.batched_lora.timing import Row
from benchmarks.tables import grid_table

NAME = "batched_lora"
# in the order of the columns
CONTENDERS = {"merged": "merged", "peft": "PEFT", "gather_bmm": "gather, bmm", "grouped_mm": "grouped_mm", "op": "ours"}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Target:
    """A limit for one cell, in every dtype: the ratio to the base layer, or the share of the read rate."""

    title: str
    d: int
    M: int
    arm: str
    most_ratio: float = math.inf
    least_share: float = 0.0


TARGETS = (
    Target("32 rows, 32 adapters of r = 16, d = 1024: time over the base layer", 1024, 32, "op", most_ratio=1.15),
    Target("64 rows, 64 adapters of r = 16, d = 4096: share of the read rate", 4096, 64, "op alone", least_share=0.85),
)


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """(met, sentence) for every target and dtype."""
    found = []
    for target in TARGETS:
        for dtype in DTYPES:
            place = (dtype, target.M, target.d, str(target.d), min(target.M, 64), "distinct", "16", target.arm)
            row = next((row for row in rows if not row.not_timed and _place(row) == place), None)
            found.append(_verdict(target, dtype, row))
    return found


def _place(row: Row) -> tuple:
    return row.dtype, row.M, row.K, row.N, row.present, row.popularity, row.r, row.arm


def _verdict(target: Target, dtype: str, row: Row | None) -> tuple[bool, str]:
    where = f"{target.title}, {dtype}"
    if row is None:
        return False, f"{where}: not measured"
    if target.least_share:
        met = row.read_share >= target.least_share
        return met, f"{where}: {row.read_share:.0%} against {target.least_share:.0%}"
    return row.ratio_p50 <= target.most_ratio, f"{where}: {row.ratio_p50:.3f} against {target.most_ratio:.2f}"


def by_cell(rows: list[Row]) -> list[dict[str, Row]]:
    """The rows of each cell by arm, in the order of the file."""
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = (row.dtype, row.site, row.M, row.K, row.N, row.adapters, row.popularity, row.r)
        cells.setdefault(key, {})[row.arm] = row
    return list(cells.values())


def _ratio(row: Row | None) -> str:
    return "" if row is None or row.not_timed else f"{row.ratio_p50:.2f}"


def distinct_table(rows: list[Row]) -> str:
    """PEFT / ours for M rows of as many different adapters as there can be: a line per dtype and M."""
    cells = [c for c in by_cell(rows) if "op" in c and _key(c["op"]) == ("square", 1024, "distinct", "16")]
    adapters = sorted({c["op"].adapters for c in cells})
    lines = []
    for dtype in DTYPES:
        for M in sorted({c["op"].M for c in cells}):
            here = {c["op"].adapters: c for c in cells if (c["op"].dtype, c["op"].M) == (dtype, M)}
            if here:
                pairs = (
                    f"{_ratio(here[n].get('peft'))} / {_ratio(here[n]['op'])}" if n in here else "" for n in adapters
                )
                lines.append([dtype, str(M), f"{next(iter(here.values()))['base'].ms_p50:.3g}", *pairs])
    return grid_table(["dtype", "M", "base, ms", *(f"{n} adapter{'s' * (n > 1)}" for n in adapters)], lines)


def _key(row: Row) -> tuple:
    return row.site, row.K, row.popularity, row.r


def cell_table(rows: list[Row]) -> str:
    """Every other cell, a column per contender; ours also as a rate."""
    lines = []
    for cell in by_cell(rows):
        if "op" not in cell or _key(cell["op"]) == ("square", 1024, "distinct", "16"):
            continue
        row, alone = cell["op"], cell["op alone"]
        lines.append(
            [row.dtype, row.site, f"{row.K} x {row.N}", str(row.M), f"{row.present} {row.popularity}", row.r,
             f"{cell['base'].ms_p50:.3g}", *(_ratio(cell.get(arm)) for arm in CONTENDERS), f"{alone.gbs:.1f}",
             f"{alone.read_share:.0%}"]
        )  # fmt: skip
    header = ["dtype", "site", "K x N", "M", "adapters", "r", "base, ms", *CONTENDERS.values(), "GB/s", "of read rate"]
    return grid_table(header, lines)


ADDED = ("gather_bmm", "grouped_mm", "sglang_v2", "sglang_csgmv", "vllm")


def added_table(rows: list[Row]) -> str:
    """Of a GPU's run, microseconds that each contender adds to the base layer; a line per cell."""
    timed = [arm for arm in ADDED if any(row.arm == arm and not row.not_timed for row in rows)]
    ours = sorted({row.backend for row in rows if row.arm == "op"})
    cells: dict[tuple, dict] = {}
    for row in rows:
        key = (row.site, row.M, row.K, row.N, row.adapters, row.popularity, row.r)
        cells.setdefault(key, {})[(row.arm, row.backend) if row.arm == "op" else row.arm] = row

    def added(row):
        return "" if row is None or row.not_timed else f"{row.added_us:.1f}"

    lines = []
    for cell in cells.values():
        base = cell["base"]
        others = [added(cell.get(arm)) for arm in (*timed, *(("op", backend) for backend in ours))]
        what = [base.site, f"{base.K} x {base.N}", str(base.M), f"{base.present} {base.popularity}", base.r]
        lines.append([*what, f"{1e3 * base.ms_p50:.1f}", f"{base.aa_spread:.1%}", *others])
    header = ["site", "K x N", "M", "adapters", "r", "base, us", "A/A", *timed, *ours]
    return grid_table(header, lines)


def markdown(rows: list[Row], origin: str) -> str:
    """All that stands between the README's markers."""
    read = rows[0].read_gbs
    return (
        "\n\n".join(
            [
                "Time of a projection with its adapters over the projection alone, medians, caches emptied before "
                f"every step. This machine reads {read:.1f} GB/s. {origin}",
                "PEFT's mixed batch / ours, M rows of different adapters, r = 16, K = N = 1024:",
                distinct_table(rows),
                "Other batches; the last two columns are the adapters' part alone:",
                cell_table(rows),
            ]
        )
        + "\n"
    )
