"""The demo's plots, made from its outcomes."""

import statistics
from pathlib import Path

import matplotlib

from peft_kernels.demo.comparison import WARM_UP, Outcome
from peft_kernels.demo.methods import Trained
from peft_kernels.demo.prefixes import BEGINS
from peft_kernels.demo.serving import ARMS as SERVING_ARMS
from peft_kernels.demo.serving import Serving

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

COLOURS = {"peft": "#3a6ea5", "patched": "#e4572e", "again": "#b9bec5", "base": "#5f6368", "pool": "#2e8b57"}
NAMES = {"peft": "PEFT", "patched": "patched", "again": "PEFT again, nudged by one rounding"}
SERVING_NAMES = {
    "base": "base model alone",
    "pool": "pool (attach_pool)",
    "patched": "PEFT's adapter_names, patched",
    "peft": "PEFT's adapter_names",
}
FORMS = {"LoRA": "#3a6ea5", "serial": "#2e8b57", "parallel": "#e4572e"}  # a colour for how a method's name begins
PLACES = {"s = 4": "*", "FFN": "s", "attention": "^", "": "o"}  # a marker for the first of these in its name
STARTS = {"random": "#5f6368", "text": "#2e8b57", "zero": "#e4572e", "MLP": "#8e5ea2"}
MB = 1e6
NO_DIFFERENCE = 1e-8  # where the logarithmic axis draws a difference of zero; one rounding of a loss is 1e-7


def _style(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)


def losses(path: Path, outcomes: list[Outcome], device: str) -> None:
    """For each comparison the two loss curves, and under them how far they are apart."""
    columns = min(4 if len(outcomes) > 6 else 3, len(outcomes))
    rows = -(-len(outcomes) // columns)
    figure = pyplot.figure(figsize=(4.2 * columns, 4.0 * rows + 0.7), layout="constrained", dpi=150)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1.6] * rows)
    for index, o in enumerate(outcomes):
        row, column = divmod(index, columns)
        upper = figure.add_subplot(grid[2 * row, column])
        lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
        steps = range(1, len(o.losses["peft"]) + 1)
        upper.plot(steps, o.losses["peft"], color=COLOURS["peft"], linewidth=4, alpha=0.45, label=NAMES["peft"])
        upper.plot(steps, o.losses["patched"], color=COLOURS["patched"], linewidth=1.3, label=NAMES["patched"])
        upper.set_title(f"{o.domain} · {o.title}", fontsize=11, loc="left")
        upper.tick_params(labelbottom=False)
        for arm in ("again", "patched"):
            apart = [max(abs(a - b), NO_DIFFERENCE) for a, b in zip(o.losses[arm], o.losses["peft"], strict=True)]
            label = NAMES[arm] if arm == "again" else None
            lower.plot(steps, apart, color=COLOURS[arm], linewidth=1.3, marker=".", markersize=3, label=label)
        lower.set_yscale("log")
        lower.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        lower.set_xlabel("training step")
        if column == 0:
            upper.set_ylabel("loss (nats per byte)")
            lower.set_ylabel(f"|loss - PEFT's|\n(0 drawn at {NO_DIFFERENCE:g})", fontsize=9)
        _style(upper)
        _style(lower)
    handles = upper.get_legend_handles_labels()[0] + lower.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Loss while adapting: PEFT and the patched model, same seeds and batches ({device})", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)


def times(path: Path, outcomes: list[Outcome], device: str) -> None:
    """Every timed step of each arm with its median, and beside them the saved activations."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 0.9 * len(outcomes) + 2), layout="constrained", dpi=150, sharey=True, width_ratios=[2, 1]
    )
    for index, o in enumerate(outcomes):
        for arm, offset in (("peft", -0.17), ("patched", 0.17)):
            times, y = o.step_times_ms[arm][WARM_UP:] or o.step_times_ms[arm], index + offset
            spread = [y + 0.2 * (i % 7 / 6 - 0.5) for i in range(len(times))]
            left.scatter(times, spread, s=10, color=COLOURS[arm], alpha=0.35, linewidths=0)
            median = o.step_ms[arm]
            left.plot([median, median], [y - 0.15, y + 0.15], color=COLOURS[arm], linewidth=3)
            label = NAMES[arm] if not index else None
            right.barh(y, o.saved_bytes[arm] / MB, height=0.3, color=COLOURS[arm], label=label)
        left.annotate(f"x{o.ratio['patched']:.2f}", (1, index), xycoords=("axes fraction", "data"), ha="right",
                      va="center", fontsize=13, weight="bold", color=COLOURS["patched"])  # fmt: skip
        share = o.saved_bytes["patched"] / o.saved_bytes["peft"]
        right.annotate(f"x{share:.2f}", (o.saved_bytes["patched"] / MB, index + 0.17), xytext=(4, 0),
                       textcoords="offset points", va="center", fontsize=9, color=COLOURS["patched"])  # fmt: skip
    left.set_yticks(range(len(outcomes)), [f"{o.domain}\n{o.title}" for o in outcomes])
    left.set_ylim(len(outcomes) - 0.5, -0.5)
    slowest = max(o.step_ms[arm] for o in outcomes for arm in ("peft", "patched"))
    left.set_xlim(0, 1.4 * slowest)
    left.set_xlabel("training step (ms): each step, its median, and the ratio of the medians")
    right.set_xlabel("saved for the backward (MB)")
    for axes in (left, right):
        _style(axes)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color="#e8eaed", linewidth=0.8)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"One training step: PEFT and the patched model, taking turns ({device})", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)


def throughput(path: Path, found: Serving, device: str) -> None:
    """Tokens per second against the number of distinct adapters: medians, and half of all steps around them."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained", dpi=150)
    counts = [row.distinct for row in found.throughput]
    for arm in SERVING_ARMS:
        speeds = [row.tokens_per_second[arm] for row in found.throughput]
        quarters = [statistics.quantiles(row.step_times_ms[arm], n=4) for row in found.throughput]
        slow, fast = (
            [1e3 * row.rows / q[i] for row, q in zip(found.throughput, quarters, strict=True)] for i in (2, 0)
        )
        axes.fill_between(counts, slow, fast, color=COLOURS[arm], alpha=0.15, linewidth=0)
        axes.plot(counts, speeds, color=COLOURS[arm], marker="o", markersize=4, label=SERVING_NAMES[arm])
        if arm != "base":
            axes.annotate(f"x{found.throughput[-1].ratio[arm]:.2f}", (counts[-1], speeds[-1]), xytext=(7, 0),
                          textcoords="offset points", va="center", color=COLOURS[arm])  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("distinct adapters in the batch (at the right: time of a step over the base model's)")
    axes.set_ylabel("tokens per second")
    _style(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"Decoding {found.throughput[0].rows} rows, each with an adapter ({device})", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)


def methods(path: Path, trained: list[Trained], device: str) -> None:
    """Held-out bits per byte against trainable parameters: a panel for each domain, a marker for each method."""
    domains, names = (list(dict.fromkeys(getattr(t, field) for t in trained)) for field in ("domain", "method"))
    figure, panels = pyplot.subplots(
        1,
        len(domains),
        figsize=(max(9, 3.6 * len(domains)), 5),
        layout="constrained",
        dpi=150,
        squeeze=False,
        sharex=True,
    )
    for axes, domain in zip(panels[0], domains, strict=True):
        for name in names:
            colour = next(colour for form, colour in FORMS.items() if name.startswith(form))
            marker = next(marker for place, marker in PLACES.items() if place in name)
            row = [t for t in trained if (t.domain, t.method) == (domain, name)]
            thousands, bits = [t.parameters / 1e3 for t in row], [t.bits_after for t in row]
            axes.plot(thousands, bits, color=colour, marker=marker, markersize=8, linewidth=1, label=name)
        axes.set_title(f"{domain} (base: {row[0].bits_before:.2f})", fontsize=11, loc="left")
        axes.set_xlabel("trainable parameters (thousands)")
        axes.margins(0.15)
        _style(axes)
    if len({t.budget for t in trained}) > 1:
        panels[0][0].set_xscale("log")
    panels[0][0].set_ylabel("held-out bits per byte")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Methods at one budget, {trained[0].steps} steps, one seed ({device})", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)


def prefixes(path: Path, trained: list[Trained], device: str) -> None:
    """Held-out bits per byte against the length of a prefix: a panel for each domain, a line for each start, LoRA's."""
    domains = list(dict.fromkeys(t.domain for t in trained))
    starts = [name for name in dict.fromkeys(t.method for t in trained) if name.startswith(BEGINS)]
    lengths = sorted({t.width for t in trained if t.method.startswith(BEGINS)})
    figure, panels = pyplot.subplots(
        1, len(domains), figsize=(max(6, 3.6 * len(domains)), 5), layout="constrained", dpi=150, squeeze=False
    )
    for axes, domain in zip(panels[0], domains, strict=True):
        here = [t for t in trained if t.domain == domain]
        lora = next(t for t in here if not t.method.startswith(BEGINS))
        axes.axhline(lora.bits_after, color=COLOURS["peft"], linestyle="--", linewidth=1,
                     label=f"LoRA r={lora.width}, {lora.parameters:,} parameters")  # fmt: skip
        for name in starts:
            row = sorted((t for t in here if t.method == name), key=lambda t: t.width)
            colour = STARTS[name.removeprefix(BEGINS)]
            axes.plot([t.width for t in row], [t.bits_after for t in row], color=colour, marker="o", label=name)
        axes.set_title(f"{domain} (base: {lora.bits_before:.2f})", fontsize=11, loc="left")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, lengths)
        axes.set_xlabel("length P of the prefix")
        axes.margins(0.15)
        _style(axes)
    panels[0][0].set_ylabel("held-out bits per byte")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Prefix tuning, {trained[0].steps} steps, one seed ({device})", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)
