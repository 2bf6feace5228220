"""The main job, `peft-kernels demo`: train a small language model, adapt it with PEFT and with the patched model, and
let the base and the trained adapters answer in one batch.

English comes from Python's own help texts and the domains from what lies on the machine; nothing is downloaded. What
is compared is a list of data (`plan`): methods x domains. A new method is a row there and a class beside
`comparison.Lora` that can attach to the base model and be loaded again.
"""

import itertools
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from peft_kernels import backends
from peft_kernels.demo import corpus, methods, plots, prefixes, report, serving, task
from peft_kernels.demo.comparison import ARMS, Comparison, Lora, Outcome, compare

RANKS = (4, 16, 64)  # with --all
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def plan(texts: list[corpus.Text], size: task.Size, *, everything: bool) -> list[Comparison]:
    """What is compared: PEFT's defaults on every domain, and variants of them on the first one only."""
    variants = [Lora(dropout=0.1)]
    if everything:
        product = itertools.product(DTYPES, RANKS, (0.0, 0.1))
        variants = [Lora(rank, p, dtype, factors) for (dtype, factors), rank, p in product]
    headline = [Comparison(Lora(), text, size.adapt_steps) for text in texts]
    return headline + [Comparison(method, texts[0], size.extra_steps) for method in variants if method != Lora()]


def run(
    size: task.Size, out: Path, device: torch.device, seed: int, console: Console, *, everything: bool, facts: dict
) -> list[str]:
    """The whole demo; `facts` go into results.json. Returns what went wrong, nothing if all is well."""
    begin = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    english = corpus.english()
    texts, replaced = corpus.choose(4)
    for line in replaced:
        console.print(f"[yellow]note:[/yellow] {line}")
    comparisons = plan(texts, size, everything=everything)
    origin = report.provenance(device)
    console.print(f"{origin['device']}, {origin['threads']} threads; kernels: {backends.bound(device.type)}")
    with _progress(console) as progress:
        base, losses = _base(english, size, seed, device, progress, out)
        outcomes = [_compare(c, base, size, seed, out, progress) for c in comparisons]
        trained = [
            found
            for rank in (RANKS if everything else (Lora().rank,))
            for text in texts[: size.method_domains]
            for found in _methods(text, base, size, rank, seed, out, progress)
        ]
        prefixed = [
            found
            for text in texts[: size.method_domains]
            for P in (prefixes.LENGTHS if everything and text is texts[0] else (prefixes.LENGTH,))
            for found in _prefixes(P, text, base, size, seed, out, progress)
        ]
        served = _serve(base, outcomes, trained, prefixed, [english, *texts], size, seed, out, progress)
    english_bits = task.held_out_bits(base, english, size, device)
    seconds = time.perf_counter() - begin
    facts = facts | origin | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": backends.bound(device.type),
        "seconds": seconds,
        "seed": seed,
        "size": vars(size),
        "texts": [{"name": t.name, "origin": t.origin, "bytes": len(t.data)} for t in (english, *texts)],
        "replaced": replaced,
        "base": {"losses": losses, "held_out_bits": english_bits, "parameters": base.num_parameters()},
        "conclusion": [
            *report.conclusion(outcomes),
            report.methods_conclusion(trained),
            report.prefixes_conclusion(prefixed),
            report.serving_conclusion(served),
        ],
    }  # fmt: skip
    report.write_json(out / "results.json", facts, outcomes, trained, prefixed, served)
    plots.losses(out / "loss_curves.png", outcomes, origin["device"])
    plots.times(out / "step_times.png", outcomes, origin["device"])
    plots.methods(out / "methods.png", trained, origin["device"])
    plots.prefixes(out / "prefixes.png", prefixed, origin["device"])
    plots.throughput(out / "serving.png", served, origin["device"])
    _show(console, outcomes, trained, prefixed, served, facts, out)
    return [
        *(f"{o.domain}, {o.title}: {problem}" for o in outcomes for problem in o.problems),
        *(f"{t.domain}, {t.method}: {problem}" for t in (*trained, *prefixed) for problem in t.problems),
        *(f"one batch, many adapters: {problem}" for problem in served.problems),
    ]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _base(english: corpus.Text, size, seed, device, progress, out: Path):
    """The base model, saved where the adapters will look for it, and its loss curve."""
    losses = []
    tick = _ticker(progress, "base model on English", size.base_steps, losses)
    base = task.train_base(english, size, seed, device, tick)
    base.save_pretrained(out / "base")
    base.config._name_or_path = str(out / "base")
    return base, losses


def _compare(comparison: Comparison, base, size, seed, out: Path, progress) -> Outcome:
    title = f"{comparison.text.name}, {comparison.method.title}"
    tick = _ticker(progress, title, len(ARMS) * comparison.steps, [])
    return compare(comparison, base, size, seed, out, tick)


def _methods(text: corpus.Text, base, size, rank: int, seed, out: Path, progress) -> list[methods.Trained]:
    title = f"{text.name}, methods, r={rank}"
    tick = _ticker(progress, title, len(methods.METHODS) * size.method_steps, [])
    return methods.compare(methods.fitted(base, rank), text, base, size, seed, out, tick)


def _prefixes(P: int, text: corpus.Text, base, size, seed, out: Path, progress) -> list[methods.Trained]:
    tick = _ticker(progress, f"{text.name}, prefixes, P={P}", len(prefixes.arms(P, text)) * size.method_steps, [])
    return prefixes.compare(P, text, base, size, seed, out, tick)


def _serve(
    base, outcomes, trained, prefixed, texts: list[corpus.Text], size, seed, out: Path, progress
) -> serving.Serving:
    """The first comparison's adapters of all domains, bottlenecks of the first one, and prefixes: their folders."""
    name_of = {text.name: text.name.replace(" ", "-") for text in texts}  # a pool's names have no spaces
    english, *domains = texts
    adapters = {name_of[o.domain]: out / o.adapters["patched"] for o in outcomes if o.title == outcomes[0].title}
    folder_of = {t.method: out / t.adapter for t in trained if t.domain == domains[0].name}
    bottlenecks = {f"{name_of[domains[0].name]}-{kind}": folder_of[name] for kind, name in methods.SERVED.items()}
    text_of = {name_of[text.name]: text for text in domains} | dict.fromkeys(bottlenecks, domains[0])
    prefix_folders = {}
    for text in domains[: size.method_domains]:
        for kind, folder in prefixes.served(prefixed, text.name).items():
            prefix_folders[f"{name_of[text.name]}-{kind}"] = out / folder
            text_of[f"{name_of[text.name]}-{kind}"] = text
    title = "one batch, many adapters"
    bar = _begin(progress, title, serving.turns(size))
    found = serving.serve(
        base, adapters, bottlenecks, prefix_folders, text_of, english, size, seed,
        lambda: progress.update(bar, advance=1),
    )  # fmt: skip
    if progress.disable:
        progress.console.print(f"{title}: {found.seconds:.0f} s")
    return found


def _begin(progress: Progress, title: str, steps: int) -> TaskID:
    """A new progress bar; a log gets a line."""
    if progress.disable:
        progress.console.print(f"{title} ...")
    return progress.add_task(title, total=steps, loss="")


def _ticker(progress: Progress, title: str, steps: int, losses: list[float]):
    """A function that moves a new progress bar by one step and keeps the loss; a log gets a line at the end too."""
    bar, begin = _begin(progress, title, steps), time.perf_counter()

    def tick(loss: float) -> None:
        losses.append(loss)
        progress.update(bar, advance=1, loss=f"loss {loss:.3f}")
        if progress.disable and len(losses) == steps:
            progress.console.print(f"{title}: {steps} steps in {time.perf_counter() - begin:.0f} s, loss {loss:.3f}")

    return tick


def _show(
    console: Console, outcomes: list[Outcome], trained, prefixed, served: serving.Serving, facts: dict, out: Path
) -> None:
    console.print()
    for table in (*report.tables(outcomes), *report.side_by_side(trained), *report.by_length(prefixed)):
        console.print(table)
    for table in (*map(report.answers, (served.answers, served.prefixed)), report.throughput(served)):
        console.print(table)
    console.print(
        f"Base model: {facts['base']['parameters'] / 1e6:.1f} M parameters, {facts['base']['held_out_bits']:.2f} bits "
        f"per byte of held-out English. {facts['seconds']:.0f} s in all. Under {out}: results.json, loss_curves.png, "
        "step_times.png, methods.png, prefixes.png, serving.png, and the base model and the adapters; PEFT alone can "
        "load LoRA's, peft_kernels.load the others."
    )
    for line in facts["conclusion"]:
        console.print(f"[bold]{line}[/bold]")
