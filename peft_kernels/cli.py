"""The command `peft-kernels`: `info` says what runs here and why, `demo` is the main job, `estimate` what adapters of a
model would cost, `bench` the benchmarks."""

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import peft_kernels
from peft_kernels import backends

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "run.py"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
METHODS = ("houlsby", "pfeiffer", "parallel", "scaled_parallel", "adapter_plus")
WITH_PREFIX = ("prefix", "mam")
LEAST_WIDTH = 100  # columns that the tables need where the terminal is unknown (a pipe, a log)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, LEAST_WIDTH))


def build_info() -> dict:
    """What the optional module `_C` knows about the build; empty where it was not built."""
    if importlib.util.find_spec("peft_kernels._C") is None:
        return {}
    return dict(importlib.import_module("peft_kernels._C").build_info())


def facts() -> dict:
    """Everything that `info` prints."""
    library = backends.operator_library() is not None
    return {
        "version": peft_kernels.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "devices": ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "instruction_set": backends.instruction_set() if library else None,
        "cuda": backends.cuda_summary(),
        "sm90_asked_for": backends.sm90_asked_for(),
        "build": build_info(),
        "backends": backends.describe(),
    }


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False) -> None:
    """Versions, devices, and the backends: which would be used, and why the others are not."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = _console()
    console.print(f"peft_kernels {found['version']}, torch {found['torch']}, Python {found['python']}")
    console.print(f"devices: {', '.join(found['devices'])}")
    console.print(f"CPU kernels: {found['instruction_set'] or 'not built'}")
    console.print(f"CUDA: {found['cuda']}")
    if found["sm90_asked_for"]:
        console.print("PEFT_KERNELS_SM90=1: on compute capability 9.0 the kernels for Hopper run, not measured yet")
    console.print(f"build: {_build(found['build'])}")
    table = Table("backend", "device", "", "why not", box=box.SIMPLE_HEAD)
    for row in found["backends"]:
        state = "[green]used[/green]" if row["bound"] else "there" if row["available"] else "[dim]not there[/dim]"
        table.add_row(row["name"], row["device"], state, row["reason"])
    console.print(table)


def _build(facts: dict) -> str:
    """What is known of the build; a revision is not where it was made outside of git."""
    known = {key: value for key, value in facts.items() if value is not None}
    texts = (" ".join(map(str, value)) if isinstance(value, list | tuple) else value for value in known.values())
    words = (f"{key.replace('_', ' ')} {text}" for key, text in zip(known, texts, strict=True))
    return ", ".join(words) or "the module _C is not built"


@app.command()
def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A shorter training and up to 16 adapters in a batch"),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every dtype, rank and dropout, not only PEFT's defaults")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for adapters, results.json and the plots")] = Path("demo_out"),
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one")] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights and batches")] = 0,
) -> None:
    """Trains a small language model and adapts it to four domains: with LoRA by PEFT and by the patched model, and with
    LoRA and bottleneck adapters of one size, side by side; then the base and the adapters answer in one batch, and
    batches of up to 64 distinct adapters are timed.

    No downloads. Ends with code 1 if the results are not PEFT's, of the patched model or of a row in the mixed batch,
    or if a method does not learn or is not the same after a reload.
    """
    console = _console()
    try:
        from peft_kernels import demo as main_job
    except ModuleNotFoundError as error:
        console.print(f"The demo needs {error.name}: pip install 'peft-kernels\\[demo]'")
        raise typer.Exit(2) from None
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this torch sees no CUDA device", param_hint="--device")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    revision = {"version": peft_kernels.__version__, "revision": build_info().get("revision")}
    size = main_job.task.SIZES["quick" if quick else "full"]
    problems = main_job.run(size, out, torch.device(device), seed, console, everything=everything, facts=revision)
    for problem in problems:
        console.print(f"[bold red]not equal:[/bold red] {problem}")
    raise typer.Exit(1 if problems else 0)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Model id of the Hugging Face Hub, or a folder; config.json is enough")],
    adapters: Annotated[int, typer.Option(help="Adapters in the pool")],
    rank: Annotated[int, typer.Option(help="Of every adapter; width of a bottleneck adapter, length of a prefix")],
    target_modules: Annotated[str, typer.Option(help="all-linear, or names joined by commas")] = "all-linear",
    method: Annotated[
        str, typer.Option(help=f"lora, a bottleneck adapter: {', '.join(METHODS)}; or {', '.join(WITH_PREFIX)}")
    ] = "lora",
    dtype: Annotated[str, typer.Option(help="Of the base: bf16, fp16 or fp32")] = "bf16",
    adapter_dtype: Annotated[str, typer.Option(help="Of the adapters; default: the base's")] = "",
    rows: Annotated[int, typer.Option(help="Rows of a decode batch")] = 32,
    distinct: Annotated[int | None, typer.Option(help="Adapters among them; default: as many as there can be")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    """What N adapters of a model would cost: memory, and bytes per decoded token. Needs no weights.

    Nothing is measured: what a decode step has to read with adapters, over what it reads without.
    """
    console = _console()
    try:
        from peft_kernels.integrations import estimate as costs
    except ModuleNotFoundError as error:
        console.print(f"The estimate needs {error.name}: pip install 'peft-kernels\\[hf]'")
        raise typer.Exit(2) from None
    for value, option in ((dtype, "--dtype"), (adapter_dtype or dtype, "--adapter-dtype")):
        if value not in DTYPES:
            raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got '{value}'", param_hint=option)
    targets = target_modules if target_modules == "all-linear" else tuple(target_modules.split(","))
    factors = DTYPES[adapter_dtype or dtype]
    question = costs.Question(adapters, rank, targets, DTYPES[dtype], factors, rows, distinct)
    if method not in (known := ("lora", *METHODS, *WITH_PREFIX)):
        raise typer.BadParameter(f"must be one of {', '.join(known)}, got '{method}'", param_hint="--method")
    try:
        base = costs.model_on_meta(model)
        found = costs.estimate(base, question) if method == "lora" else _bottleneck(base, method, question)
    except ValueError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if as_json:
        given = {"model": model, "method": method} | dataclasses.asdict(question)
        words = given | dataclasses.asdict(found)
        print(json.dumps(words, indent=1, default=lambda dtype: str(dtype).removeprefix("torch.")))
        return
    (_show_estimate if method == "lora" else _show_bottleneck)(console, found, question, model)


def _bottleneck(base, method: str, question):
    from peft_kernels.integrations.estimate_bottleneck import estimate_bottleneck

    if method == "prefix":
        config = peft_kernels.PrefixTuningConfig(num_virtual_tokens=question.rank)
    elif method == "mam":
        config = peft_kernels.MAMConfig(ffn=peft_kernels.BottleneckConfig.scaled_parallel(r=question.rank))
    else:
        config = getattr(peft_kernels.BottleneckConfig, method)(r=question.rank)
    return estimate_bottleneck(base, config, question)


def _show_bottleneck(console: Console, found, question, model: str) -> None:
    """`found` is an estimate_bottleneck.BottleneckEstimate, `question` an estimate.Question."""
    blocks = Table("blocks", box=box.SIMPLE_HEAD)
    for header in ("count", "d", "E or P", "parameters of an adapter"):
        blocks.add_column(header, justify="right")
    for kind in found.blocks:
        blocks.add_row(kind.name, *(f"{n:,}" for n in (kind.count, kind.width, kind.bottleneck, kind.parameters)))
    console.print(f"{model}: {found.base_parameters:,} parameters; adapters", markup=False)
    console.print(blocks)
    sizes = Table("", "bytes", "of the base", box=box.SIMPLE_HEAD)
    for name, value, base in (
        ("base", found.base, found.base),
        (f"one adapter, {found.adapter_parameters:,} trainable parameters", found.adapter, found.base),
        (_adapters(question.adapters), found.adapters, found.base),
        (f"read by a decode step of {question.rows} rows, base alone", found.step_base, found.step_base),
        (f"  with {_adapters(found.distinct)}", found.step_base + found.step_adapters, found.step_base),
    ):
        sizes.add_row(name, _bytes(value), f"{value / base:.2%}")
    console.print(sizes)
    console.print(f"Trainable: [bold]{found.share:.3%}[/bold] of the base's parameters.")
    console.print(f"Where bytes are the limit, a token takes [bold]x{found.price:.3f}[/bold] of the base's time.")


def _show_estimate(console: Console, found, question, model: str) -> None:
    """`found` is an estimate.Estimate, `question` its estimate.Question."""
    sites = Table("sites", box=box.SIMPLE_HEAD)
    for header in ("count", "K x N", "parameters of an adapter"):
        sites.add_column(header, justify="right")
    for kind in found.sites:
        parameters = kind.count * question.rank * (kind.K + kind.N)
        sites.add_row(kind.name, str(kind.count), f"{kind.K} x {kind.N}", f"{parameters:,}")
    console.print(f"{model}: {found.base_parameters:,} parameters; LoRA of rank {question.rank}", markup=False)
    console.print(sites)
    memory = Table("in memory", box=box.SIMPLE_HEAD)
    step = Table(f"read by a decode step of {question.rows} rows", box=box.SIMPLE_HEAD)
    for table, headers in ((memory, ("bytes", "of the base")), (step, ("bytes", "per token", "of the base"))):
        for header in headers:
            table.add_column(header, justify="right")
    for name, value in (
        ("base", found.base),
        (f"one adapter, {found.adapter_parameters:,} trainable parameters", found.adapter),
        (f"pool of {question.adapters}", found.pool),
        ("  at most, with spare pages", found.pool_at_most),
    ):
        memory.add_row(name, _bytes(value), f"{value / found.base:.2%}")
    with_adapters = found.step_base + found.step_adapters
    for name, value, token in (
        ("base alone", found.step_base, found.token_base),
        (f"with {_adapters(found.distinct)}", with_adapters, found.token),
    ):
        step.add_row(name, _bytes(value), _bytes(token), f"{value / found.step_base:.2%}")
    console.print(memory)
    console.print(step)
    console.print(f"Where bytes are the limit, a token takes [bold]x{found.price:.3f}[/bold] of the base's time.")
    console.print("The KV cache, which costs both the same, is left out.")
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count != 1)}"


def _bytes(count: float) -> str:
    """In decimal units, four digits."""
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Runs the benchmarks of the source tree; all arguments go to benchmarks/run.py (`--help` too)."""
    if not BENCHMARK.exists():
        print("The benchmarks are not in the installed package: clone the repository and run them there.")
        raise typer.Exit(2)
    raise typer.Exit(subprocess.run([sys.executable, str(BENCHMARK), *context.args]).returncode)


if __name__ == "__main__":
    app()
