"""What the demo says at the end: tables and a conclusion for people, results.json for machines, plots for both.

Everything is made from the outcomes; no number is written here.
"""

import json
import platform
import statistics
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import matplotlib
import torch
from rich import box
from rich.table import Table
from rich.text import Text

from peft_kernels.demo import methods, serving
from peft_kernels.demo.comparison import WARM_UP, Outcome

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
MB = 1e6
NO_DIFFERENCE = 1e-8  # where the logarithmic axis draws a difference of zero; one rounding of a loss is 1e-7


def tables(outcomes: list[Outcome]) -> list[Table]:
    """The first method on every domain; the other methods; and what the adapted models write."""
    first = [o for o in outcomes if o.title == outcomes[0].title]
    others = [o for o in outcomes if o.title != outcomes[0].title]
    what = "held-out bits per byte, training step (ms), saved activations (MB)"
    found = [_results(f"{first[0].title}: {what}", "domain", first, lambda o: o.domain)]
    if others:
        found.append(_results(f"Other settings on {others[0].domain}", "method", others, lambda o: o.title))
    return [*found, _writing(first)]


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 0, 0, 1), pad_edge=False)
    for header in left:
        table.add_column(header)  # what is left of a narrow terminal
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _results(title: str, first: str, outcomes: list[Outcome], label) -> Table:
    """Held-out bits per byte before and after, step time, saved activations, how far the loss curves are apart."""
    headers = ("bits\nbefore", "\nPEFT", "\npatched", "ms\nPEFT", "\npatched", "\nratio", "MB\nPEFT", "\npatched",
               "losses\napart")  # fmt: skip
    table = _table(title, ("\n" + first,), headers)
    for o in outcomes:
        table.add_row(
            label(o),
            f"{o.bits_before:.3f}",
            f"{o.bits_after['peft']:.3f}",
            f"[bold]{o.bits_after['patched']:.3f}[/bold]",
            f"{o.step_ms['peft']:.0f}",
            f"{o.step_ms['patched']:.0f}",
            f"[bold]x{o.ratio['patched']:.2f}[/bold]",
            f"{o.saved_bytes['peft'] / MB:.0f}",
            f"[bold]{o.saved_bytes['patched'] / MB:.0f}[/bold]",
            f"{o.apart['patched']:.0e}",
        )
    return table


def _writing(outcomes: list[Outcome]) -> Table:
    """What base and adapted model make of the same held-out words, and how long a byte takes, one row at a time."""
    headers = ("\ndomain", "\nafter", "\nbase writes", "\nadapted writes")
    table = _table("Writing, one byte after another", headers, ("ms/byte\nPEFT", "\npatched", "\nratio"))
    for o in outcomes:
        prompt, base, adapted = (
            Text(repr(text)[1:-1][start:][:18], style=style)
            for text, start, style in (
                (o.sample["prompt"], -12, "dim"),
                (o.sample["base"], 0, ""),
                (o.sample["adapted"], 0, "bold"),
            )
        )
        table.add_row(
            o.domain,
            prompt,
            base,
            adapted,
            f"{o.byte_ms['peft']:.2f}",
            f"{o.byte_ms['patched']:.2f}",
            f"x{o.byte_ms['patched'] / o.byte_ms['peft']:.2f}",
        )
    return table


def answers(found: serving.Serving) -> Table:
    """What each row of the mixed batch wrote, what its adapter alone writes, and how far its logits are from fp64."""
    headers = ("\nadapter", "\nafter", "mixed batch\nwrites", "alone it\nwrites")
    title = f"{len(found.answers)} rows in one batch, each with its own adapter, beside a model with that adapter alone"
    table = _table(title, headers, ("error\nmixed", "\nalone", "\nallowed", "\nequal"))
    for a in found.answers:
        texts = ((a.prompt, -12, "dim"), (a.mixed, 0, "bold"), (a.alone, 0, ""))
        table.add_row(
            a.adapter or "none: the base",
            *(Text(repr(text)[1:-1][start:][:16], style=style) for text, start, style in texts),
            f"{a.error:.0e}",
            f"{a.error_alone:.0e}",
            f"{a.bound:.0e}",
            "[bold red]NO[/bold red]" if a.problems else "yes",
        )
    return table


def throughput(found: serving.Serving) -> Table:
    """The time of a decode step over the base model's, and tokens per second."""
    headers = ("over base's\npool", "\npatched", "\nPEFT", "tokens/s\nbase", "\npool", "\npatched", "\nPEFT")
    title = (
        f"Decode step of {found.throughput[0].rows} rows: time over the base model's, and tokens per second "
        "(patched and PEFT: adapter_names)"
    )
    table = _table(title, ("distinct\nadapters",), headers)
    for row in found.throughput:
        ratios = [f"x{row.ratio[arm]:.2f}" for arm in serving.ARMS if arm != "base"]
        speeds = [f"{row.tokens_per_second[arm]:.0f}" for arm in serving.ARMS]
        table.add_row(str(row.distinct), f"[bold]{ratios[0]}[/bold]", *ratios[1:], *speeds)
    return table


def serving_conclusion(found: serving.Serving) -> str:
    """A sentence in plain English."""
    wrong = [a.adapter or "base" for a in found.answers if a.problems]
    most = found.throughput[-1]
    equal = f"rows that are NOT as alone: {', '.join(wrong)}" if wrong else "every answer is that of its adapter alone"
    return (
        f"One batch, many adapters: {equal}; with {most.distinct} distinct adapters in {most.rows} rows a decode step "
        f"takes x{most.ratio['pool']:.2f} of the base model's (PEFT's adapter_names patched "
        f"x{most.ratio['patched']:.2f}, alone x{most.ratio['peft']:.2f})."
    )


def conclusion(outcomes: list[Outcome]) -> list[str]:
    """A sentence for each method, in plain English, with the yardstick beside each number; many methods share one."""
    first, *others = dict.fromkeys(o.title for o in outcomes)
    alone = [first, *others] if len(others) < 4 else [first]
    sentences = [_sentence(title, [o for o in outcomes if o.title == title]) for title in alone]
    rest = [o for o in outcomes if o.title not in alone]
    if rest:
        ratios = [o.ratio["patched"] for o in rest]
        worse = [o.title for o in rest if o.ratio["patched"] > max(1, o.ratio["again"])]
        wrong = [o.title for o in rest if o.problems]
        sentences.append(
            f"{len(rest)} other settings, {rest[0].domain}: patched takes x{min(ratios):.2f} to x{max(ratios):.2f} of "
            f"PEFT's step time (geometric mean x{statistics.geometric_mean(ratios):.2f}); slower than PEFT: "
            f"{', '.join(worse) or 'none'}; results not equal: {', '.join(wrong) or 'none'}."
        )
    return sentences


def _sentence(title: str, outcomes: list[Outcome]) -> str:
    ratio, again = (statistics.geometric_mean(o.ratio[arm] for o in outcomes) for arm in ("patched", "again"))
    noise = max(abs(o.ratio["again"] - 1) for o in outcomes)
    saved = sum(o.saved_bytes["patched"] for o in outcomes) / sum(o.saved_bytes["peft"] for o in outcomes)
    apart = {arm: max(o.apart[arm] for o in outcomes) for arm in ("patched", "again")}
    failed = [o.domain for o in outcomes if o.problems]
    if abs(ratio - 1) <= noise:
        speed = f"x{ratio:.2f} of PEFT's step time, which this machine cannot tell from x1 (noise {noise:.0%})"
    else:
        speed = f"x{ratio:.2f} of PEFT's step time (PEFT against itself x{again:.2f})"
    if failed:
        losses = f"and results that are NOT equal on {', '.join(failed)}"
    elif outcomes[0].method["dropout"]:
        losses = f"losses within {apart['patched']:.1g} (other masks; PEFT with other masks: {apart['again']:.1g})"
    else:
        losses = f"the same losses to {apart['patched']:.1g} (PEFT against itself: {apart['again']:.1g})"
    where = f"{len(outcomes)} domains" if len(outcomes) > 1 else outcomes[0].domain
    kept = "as many activations saved" if saved == 1 else f"x{saved:.2f} of the saved activations"
    return f"{title}, {where}: patched takes {speed}, {kept}, {losses}."


def side_by_side(trained: list[methods.Trained]) -> list[Table]:
    """For each budget, every method: parameters, held-out bits per byte on each domain, step time over LoRA's."""
    return [_at_budget([t for t in trained if t.budget == each]) for each in dict.fromkeys(t.budget for t in trained)]


def _at_budget(trained: list[methods.Trained]) -> Table:
    domains, names = (list(dict.fromkeys(getattr(t, field) for t in trained)) for field in ("domain", "method"))
    title = f"Methods at one budget, {trained[0].steps} steps: held-out bits per byte; time of a step over LoRA's"
    table = _table(title, ("method",), ("r or E", "parameters", *domains, "mean", "step"))
    of_base = [next(t.bits_before for t in trained if t.domain == domain) for domain in domains]
    table.add_row("none: the base", "", "", *(f"{bits:.3f}" for bits in (*of_base, statistics.mean(of_base))), "")
    best = [min(t.bits_after for t in trained if t.domain == domain) for domain in domains]
    for name in names:
        row = [t for t in trained if t.method == name]
        cells = [
            f"[bold]{t.bits_after:.3f}[/bold]" if t.bits_after == least else f"{t.bits_after:.3f}"
            for t, least in zip(row, best, strict=True)
        ]
        mean, step = statistics.mean(t.bits_after for t in row), statistics.geometric_mean(t.ratio for t in row)
        table.add_row(name, str(row[0].width), f"{row[0].parameters:,}", *cells, f"{mean:.3f}", f"x{step:.2f}")
    return table


def methods_conclusion(trained: list[methods.Trained]) -> str:
    """What of the paper's findings is so here, counted."""
    found = [
        f"{claim.words}: {sum(gain > 0 for gain in claim.gains)} of {len(claim.gains)} "
        f"({statistics.mean(claim.gains):+.3f} bits per byte on average)"
        for claim in methods.claims(trained)
    ]
    budgets = " and ".join(f"{budget:,}" for budget in dict.fromkeys(t.budget for t in trained))
    return (
        f"What He et al. 2022 found, and how often it is so here ({budgets} parameters, {trained[0].steps} steps): "
        f"{'; '.join(found)}. One seed and a short training: none of it is significant."
    )


def provenance(device: torch.device) -> dict:
    """Device and versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(
    path: Path, facts: dict, outcomes: list[Outcome], trained: list[methods.Trained], found: serving.Serving
) -> None:
    everything = facts | {
        "comparisons": [asdict(o) for o in outcomes],
        "methods": [asdict(t) for t in trained],
        "claims": [asdict(claim) for claim in methods.claims(trained)],
        "serving": asdict(found),
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")


def _style(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_losses(path: Path, outcomes: list[Outcome], device: str) -> None:
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


def plot_times(path: Path, outcomes: list[Outcome], device: str) -> None:
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


def plot_throughput(path: Path, found: serving.Serving, device: str) -> None:
    """Tokens per second against the number of distinct adapters: medians, and half of all steps around them."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained", dpi=150)
    counts = [row.distinct for row in found.throughput]
    for arm in serving.ARMS:
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


def plot_methods(path: Path, trained: list[methods.Trained], device: str) -> None:
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
