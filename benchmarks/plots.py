"""Plots from a benchmark's CSV: the ratio to the frozen linear over M, PEFT beside the patched layer."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.record import Row
from benchmarks.tables import BOTH, OP, VARIANTS, select, variant

COLOURS = {"peft": "tab:orange", "patched": "tab:blue", "compiled": "tab:green"}


def draw(rows: list[Row], stem: Path) -> list[Path]:
    """One PNG: a row of panels per variant, a panel per (dtype, K)."""
    patched = select(rows, "patched")
    panels = list(dict.fromkeys((row.dtype, row.K, row.N) for row in patched))[:8]
    keys = [key for key in VARIANTS if any(variant(row) == key for row in patched)]
    if not panels:
        return []
    figure, axes = plt.subplots(
        len(keys), len(panels), figsize=(3.2 * len(panels), 2.6 * len(keys)), squeeze=False, sharey="row"
    )
    for i, key in enumerate(keys):
        for j, panel in enumerate(panels):
            _panel(axes[i][j], rows, key, panel)
        first = next(axis for axis in axes[i] if axis.axison)  # a variant may lack the leftmost dtypes
        first.set_ylabel(f"{VARIANTS[key]}\nratio to frozen", fontsize=8)
        first.tick_params(labelleft=True)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{OP}, {BOTH}, median and 20th to 80th percentile; {rows[0].device}", fontsize=10)
    figure.tight_layout()
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _panel(axis, rows: list[Row], key: tuple[bool, str], panel: tuple[str, int, int]) -> None:
    """Ratio over M for each arm; the grey band is how far apart the two equal frozen arms are."""

    def points(arm):
        chosen = [row for row in select(rows, arm) if variant(row) == key and (row.dtype, row.K, row.N) == panel]
        return sorted(chosen, key=lambda row: (row.M, int(row.r)))

    shown = points("patched")
    if not shown:
        axis.set_axis_off()
        return
    M = [row.M for row in shown]
    axis.fill_between(M, [1 - r.aa_spread for r in shown], [1 + r.aa_spread for r in shown], color="grey", alpha=0.25)
    for arm, colour in COLOURS.items():
        chosen = points(arm)
        M = [row.M for row in chosen]
        axis.plot(M, [row.ratio_p50 for row in chosen], "o-", color=colour, label=arm, markersize=3)
        axis.fill_between(M, [r.ratio_p20 for r in chosen], [r.ratio_p80 for r in chosen], color=colour, alpha=0.15)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_title(f"{panel[0]}, K = {panel[1]}, N = {panel[2]}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("M", fontsize=8)
