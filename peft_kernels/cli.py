"""The command `peft-kernels`: `info` says what runs here and why, `demo` is the main job, `bench` the benchmarks."""

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
    built = ", ".join(f"{key} {value}" for key, value in found["build"].items()) or "the module _C is not built"
    console.print(f"build: {built}")
    table = Table("backend", "device", "", "why not", box=box.SIMPLE_HEAD)
    for row in found["backends"]:
        state = "[green]used[/green]" if row["bound"] else "there" if row["available"] else "[dim]not there[/dim]"
        table.add_row(row["name"], row["device"], state, row["reason"])
    console.print(table)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training, within 90 s on 2 cores")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every dtype, rank and dropout, not only PEFT's defaults")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for adapters, results.json and the plots")] = Path("demo_out"),
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one")] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights and batches")] = 0,
) -> None:
    """Trains a small language model and adapts it with LoRA to four domains, with PEFT and with the patched model.

    No downloads. Ends with code 1 if the patched model's results are not PEFT's.
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


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Runs the benchmarks of the source tree; all arguments go to benchmarks/run.py (`--help` too)."""
    if not BENCHMARK.exists():
        print("The benchmarks are not in the installed package: clone the repository and run them there.")
        raise typer.Exit(2)
    raise typer.Exit(subprocess.run([sys.executable, str(BENCHMARK), *context.args]).returncode)


if __name__ == "__main__":
    app()
