"""What the demo says at the end: tables and a conclusion for people, results.json for machines.

Everything is made from the outcomes; no number is written here.
"""

import json
import platform
import statistics
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from peft_kernels.demo import methods, serving
from peft_kernels.demo.comparison import Outcome
from peft_kernels.demo.prefixes import BEGINS

MB = 1e6


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


def answers(found: list[serving.Answer]) -> Table:
    """What each row of the mixed batch wrote, what its adapter alone writes, and how far its logits are from fp64."""
    headers = ("\nadapter", "\nafter", "mixed batch\nwrites", "alone it\nwrites")
    title = f"{len(found)} rows in one batch, each with its own adapter, beside a model with that adapter alone"
    table = _table(title, headers, ("error\nmixed", "\nalone", "\nallowed", "\nequal"))
    for a in found:
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
    wrong = [a.adapter or "base" for a in (*found.answers, *found.prefixed) if a.problems]
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
    title = f"Methods at one budget, {trained[0].steps} steps: held-out bits per byte; time of a step over LoRA's"
    budgets = dict.fromkeys(t.budget for t in trained)
    return [_by_method(title, "r or E", [t for t in trained if t.budget == each]) for each in budgets]


def by_length(prefixed: list[methods.Trained]) -> list[Table]:
    """For each length of a prefix, the same of every start of it, beside LoRA."""
    found = []
    for P in dict.fromkeys(t.width for t in prefixed if t.method.startswith(BEGINS)):
        domains = [t.domain for t in prefixed if t.width == P and t.method.startswith(BEGINS)]
        title = f"Prefixes of {P}, {prefixed[0].steps} steps: held-out bits per byte; time of a step over LoRA's"
        fits = [t for t in prefixed if t.domain in domains and (t.width == P or not t.method.startswith(BEGINS))]
        rows = {(t.domain, t.method): t for t in fits}  # one of LoRA, which is trained beside every length
        found.append(_by_method(title, "r or P", [*rows.values()]))
    return found


def prefixes_conclusion(prefixed: list[methods.Trained]) -> str:
    """A sentence: which start is best, and how far from LoRA."""
    starts = [name for name in dict.fromkeys(t.method for t in prefixed) if name.startswith(BEGINS)]
    lora = {t.domain: t.bits_after for t in prefixed if not t.method.startswith(BEGINS)}
    behind = {name: [t.bits_after - lora[t.domain] for t in prefixed if t.method == name] for name in starts}
    gaps = "; ".join(f"{name.removeprefix(BEGINS)} {statistics.mean(gap):+.3f}" for name, gap in behind.items())
    return (
        f"Prefix tuning: bits per byte over LoRA's, on average, by what the prefix begins with: {gaps}. One seed and a "
        "short training: none of it is significant."
    )


def _by_method(title: str, width: str, trained: list[methods.Trained]) -> Table:
    domains, names = (list(dict.fromkeys(getattr(t, field) for t in trained)) for field in ("domain", "method"))
    table = _table(title, ("method",), (width, "parameters", *domains, "mean", "step"))
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
    path: Path, facts: dict, outcomes: list[Outcome], trained: list[methods.Trained], prefixed: list[methods.Trained],
    found: serving.Serving,
) -> None:  # fmt: skip
    everything = facts | {
        "comparisons": [asdict(o) for o in outcomes],
        "methods": [asdict(t) for t in trained],
        "prefixes": [asdict(t) for t in prefixed],
        "claims": [asdict(claim) for claim in methods.claims(trained)],
        "serving": asdict(found),
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")
