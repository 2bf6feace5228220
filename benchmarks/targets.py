"""What the CPU grid is to reach, as data: geometric means of forward+backward over the frozen linear, on two cores."""

import math
from dataclasses import dataclass

from benchmarks.record import Row
from benchmarks.tables import BOTH, VARIANTS, cell, means, select, variant


@dataclass(frozen=True)
class Target:
    """The patched layer's geometric mean over all cells, and over those with M >= 16, of one variant of the adapter."""

    title: str
    widened: bool  # fp32 adapters on a 16-bit base; else adapters in the base's dtype
    p: str
    every_cell: float
    from_16_rows: float


TARGETS = (
    Target("no dropout", False, "0", 0.98, 1.06),
    Target("dropout 0.1", False, "0.1", 1.00, 1.08),
    Target("fp32 adapters on bf16", True, "0", 1.02, 1.10),
)

# for the tables: (wider adapters, p) -> both limits in words
LIMITS = {(t.widened, t.p): f"{t.every_cell:.2f}; {t.from_16_rows:.2f}" for t in TARGETS}


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """(met, sentence) for every target."""
    found = []
    for target in TARGETS:
        every, count, wide, wide_count = means(rows, "patched", (target.widened, target.p))
        found.append(_verdict(target, every, target.every_cell, f"{count} cells"))
        found.append(_verdict(target, wide, target.from_16_rows, f"{wide_count} cells with M >= 16"))
    slower = slower_than_peft(rows)
    met = bool(select(rows, "patched", BOTH)) and not slower  # nothing compared is nothing met
    found.append((met, "no cell slower than PEFT beyond the A/A spread" + "".join(f"; {s}" for s in slower)))
    return found


def _verdict(target: Target, value: float, limit: float, where: str) -> tuple[bool, str]:
    met = value <= limit  # False for the NaN of no cells
    outcome = "met" if met else "no such cells" if math.isnan(value) else f"missed by {value - limit:.3f}"
    return met, f"{target.title}, {where}: {value:.3f} against {limit:.2f}, {outcome}"


def slower_than_peft(rows: list[Row]) -> list[str]:
    """Cells in which the patched layer takes longer than PEFT, by more than two equal frozen arms differ."""
    peft = {(cell(row), variant(row)): row for row in select(rows, "peft", BOTH)}
    found = []
    for row in select(rows, "patched", BOTH):
        other = peft.get((cell(row), variant(row)))
        if other and row.ratio_p50 / other.ratio_p50 > 1 + row.aa_spread:
            found.append(
                f"{row.dtype} M={row.M} K={row.K}, {VARIANTS[variant(row)]}: "
                f"{row.ratio_p50:.3f} against {other.ratio_p50:.3f}, spread {row.aa_spread:.3f}"
            )
    return found
