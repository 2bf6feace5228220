"""Times an op beside the frozen linear, HF PEFT and whoever else is importable, and writes a CSV.

    python benchmarks/run.py --op lora_linear --grid cpu --out benchmarks/results/lora_linear_cpu.csv
    python benchmarks/run.py --op lora_linear --device cuda --grid gpu --graphs --out build/lora_linear_cuda.csv
    python benchmarks/run.py --op batched_lora --grid cpu --out benchmarks/results/batched_lora_cpu.csv
    python benchmarks/run.py --op train_many --grid cpu --out benchmarks/results/train_many_cpu.csv
    python benchmarks/run.py --op bottleneck_adapter --grid cpu --out benchmarks/results/bottleneck_adapter_cpu.csv
    python benchmarks/run.py --op prefix_attention --grid cpu --out benchmarks/results/prefix_attention_cpu.csv
    python benchmarks/run.py --op prefix_models --grid cpu --out benchmarks/results/prefix_models_cpu.csv
    python benchmarks/run.py --op lora_variants --grid cpu --out benchmarks/results/lora_variants_cpu.csv
    python benchmarks/run.py --op decoder --device cuda --grid gpu --layers 8 --out build/decoder_cuda.csv
    python benchmarks/run.py --op limits --device cuda --out build/limits_cuda.csv

Nothing is timed while a backend fails its samples, or an arm of ours computes something else than the others of its
cell: the run is refused with exit code 2.
"""

import dataclasses
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the checkout is the package

import torch
import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import arms as contenders
from benchmarks import (
    bottleneck,
    cuda_clock,
    decoder,
    gate,
    hopper,
    limits,
    lora_variants,
    measure,
    plan,
    prefix_attention,
    prefix_models,
    record,
    roofline,
    runs,
    shapes,
    train_many,
)
from benchmarks.batched_lora import arms as mixed_arms
from benchmarks.batched_lora import cells as mixed_cells
from benchmarks.batched_lora import timing as mixed
from peft_kernels import memory, registry

OPS = (
    "lora_linear", "seam", "batched_lora", "train_many", "bottleneck_adapter", "prefix_attention", "prefix_models",
    "lora_variants", "decoder", "limits",
)  # fmt: skip
OF_MODELS = ("train_many", "prefix_models", "lora_variants", "decoder")
OF_LAYERS = ("train_many", "decoder")
ARMS_OF = {
    "batched_lora": mixed_arms.ARMS,
    "train_many": train_many.ARMS,
    "bottleneck_adapter": bottleneck.ARMS,
    "prefix_attention": prefix_attention.ARMS,
    "prefix_models": prefix_models.ARMS,
    "lora_variants": lora_variants.ARMS,
    "decoder": decoder.ARMS,
}  # those that are not shapes.ARMS
CELLS_OF = {  # those that are timed by a module of their own
    "batched_lora": (mixed, mixed_cells.cells),
    "train_many": (train_many, train_many.cells),
    "bottleneck_adapter": (bottleneck, bottleneck.cells),
    "prefix_attention": (prefix_attention, prefix_attention.cells),
    "prefix_models": (prefix_models, prefix_models.cells),
    "lora_variants": (lora_variants, lora_variants.cells),
    "decoder": (decoder, decoder.cells),
}
LEAST_ROUNDS = {"cpu": 15, "gpu": 50, "full": 50, "quick": 5}
SECONDS = {"cpu": 30.0, "gpu": 1.0, "full": 0.5, "quick": 0.3}
FOREIGN = ("inductor", "peft", "peer", hopper.BACKEND)  # backends whose arms may fail

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Run:
    """What holds for every cell of a run."""

    device: torch.device
    plan: plan.Plan
    peaks: dict[torch.dtype, roofline.Peak]
    origin: dict[str, str | int]

    def clock(self, timing: str, x, dy):
        if self.device.type != "cuda":
            return measure.cpu_clock(x, dy)
        return cuda_clock.graph_clock(x, dy) if timing == "graph" else cuda_clock.eager_clock(x, dy)


def time_cell(cell: shapes.Cell, kinds: tuple[str, ...], run: Run) -> tuple[list[record.Row], list[str]]:
    """One cell: its rows, and a line for each arm that could not be here."""
    torch.manual_seed(0)
    torch.compiler.reset()  # each cell compiles anew, or PEFT's one code object would run into the recompile limit
    arms, left_out = contenders.build(cell, run.device, kinds)
    x = torch.randn(cell.M, cell.K, device=run.device).to(cell.dtype).requires_grad_()
    dy = torch.randn(cell.M, cell.N, device=run.device).to(cell.dtype)
    saved, rows = {}, []
    for timing in run.plan.timings:
        clock = hopper.stepping(run.clock(timing, x, dy))
        # what does not run eagerly is not captured either
        arms, failed = measure.runnable(arms, clock, FOREIGN if timing == "eager" else measure.contenders(arms))
        if not rows:
            failed |= (wrong := runs.wrong_twins(arms, cell.dtype, x, dy))
            arms = [arm for arm in arms if arm not in wrong]
        steps = measure.interleave(arms, clock, run.plan.rounds, run.plan.seconds, plan.WARMUP_ROUNDS)
        saved = saved or {arm: saved_bytes(arm, x) for arm in arms}
        rows += rows_of(cell, timing, steps, saved, run)
        rows += [untimed_row(cell, timing, arm, reason, run) for arm, reason in failed.items()]
    return rows, left_out


def saved_bytes(arm: contenders.Arm, x: torch.Tensor) -> int:
    """What autograd keeps of a forward."""
    with hopper.asked_for(arm.backend):
        return memory.saved_bytes(lambda: arm.call(x), arm.parameters)


def rows_of(cell: shapes.Cell, timing: str, steps: dict, saved: dict, run: Run) -> list[record.Row]:
    """Two rows per arm: forward, and forward+backward."""
    frozen, again = (arm for arm in steps if arm.variant is None)
    rows = []
    for part, direction in enumerate(("forward", "forward+backward")):
        times = {arm: [step[part] for step in taken] for arm, taken in steps.items()}
        spread = [abs(ratio - 1) for ratio in measure.ratios(times[again], times[frozen])]
        for arm, values in times.items():
            ms, ratio = measure.quantiles(values), measure.ratios(values, times[frozen])
            cost = roofline.cost(cell, arm.variant)[direction]
            rows.append(
                record.Row(
                    **labels(cell, arm),
                    direction=direction,
                    timing=timing,
                    copies=1 + len(arm.behind) * (timing == "graph"),
                    rounds=len(values),
                    **dict(zip(("ms_p20", "ms_p50", "ms_p80"), ms, strict=True)),
                    **dict(zip(("ratio_p20", "ratio_p50", "ratio_p80"), ratio, strict=True)),
                    aa_spread=max(spread),
                    gbs=cost.bytes / ms[1] * 1e-6,
                    tflops=cost.flops / ms[1] * 1e-9,
                    peak_share=run.peaks[cell.dtype].least_ms(cost) / ms[1],
                    saved_bytes=saved[arm],
                    not_timed="",
                    **run.origin,
                )
            )
    return rows


def untimed_row(cell: shapes.Cell, timing: str, arm: contenders.Arm, reason: str, run: Run) -> record.Row:
    """The row of an arm that could not be timed: its numbers are NaN, and it says why."""
    return record.Row(
        **labels(cell, arm),
        direction="forward+backward",
        timing=timing,
        copies=1,
        rounds=0,
        **record.no_numbers(record.Row),
        saved_bytes=0,
        not_timed=reason,
        **run.origin,
    )


def labels(cell: shapes.Cell, arm: contenders.Arm) -> dict[str, str | int]:
    """The columns that say what was timed."""
    return {
        "op": cell.op,
        "arm": arm.name,
        "backend": arm.backend,
        "dtype": _name(cell.dtype),
        "adapter_dtype": _name(arm.variant.factor_dtype) if arm.variant else "",
        "M": cell.M,
        "K": cell.K,
        "N": cell.N,
        "r": str(cell.r),  # of the cell: a frozen arm has none
        "p": f"{arm.variant.p:g}" if arm.variant else "",
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(cell: shapes.Cell, rows: list[record.Row], seconds: float) -> None:
    """One block per cell and timing: every arm's ratio to the frozen linear, forward+backward."""
    for timing in dict.fromkeys(row.timing for row in rows):
        whole = [row for row in rows if (row.direction, row.timing) == ("forward+backward", timing)]
        first = whole[0]
        console.print(
            f"[bold]{cell.op} {cell.title}[/bold] {timing}  frozen {first.ms_p50:.3f} ms, A/A {first.aa_spread:.1%}, "
            f"{first.rounds} rounds, {seconds:.0f} s"
        )
        for row in whole[2:]:
            outcome = f"[yellow]not timed:[/yellow] {escape(row.not_timed)}"
            if not row.not_timed:
                spread = f"[dim]({row.ratio_p20:.3f} - {row.ratio_p80:.3f})[/dim]"
                outcome = f"{row.ratio_p50:.3f} {spread}  {row.peak_share:.0%} of peak"
            console.print(
                f"  {row.arm + ' ' + row.backend:22s} adapters {row.adapter_dtype:8s} p={row.p:3s}  {outcome}"
            )


def main(
    op: Annotated[
        str,
        typer.Option(
            help="lora_linear; batched_lora: one batch, many adapters; train_many: a model's adapters trained in one "
            "batch; bottleneck_adapter: a feed-forward block with adapters; prefix_attention: attention over a prefix; "
            "prefix_models: whole models with one; lora_variants: DoRA, quantised bases, an MLP that recomputes, "
            "embeddings; decoder: the layers of a Llama-3-8B, trained and decoding; seam: the price of the call alone; "
            "limits: what the device can do"
        ),
    ] = "lora_linear",
    grid: Annotated[
        str, typer.Option(help="cpu and gpu (feed the README), full (shapes of models, for a GPU), quick")
    ] = "quick",
    arms: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated, of {', '.join(shapes.ARMS)} (default: all, on cuda without reference); "
            + "; ".join(f"of {op}: {', '.join(names)}" for op, names in ARMS_OF.items())
        ),
    ] = "",
    rounds: Annotated[int, typer.Option(help="Least rounds per cell; 0: the grid's own")] = 0,
    seconds: Annotated[
        float, typer.Option(help="Time per cell if its least rounds take less; < 0: the grid's own")
    ] = -1,
    out: Annotated[Path | None, typer.Option(help="CSV to write; without it, results are only printed")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    model: Annotated[str, typer.Option(help="Restricts grid full to one model of shapes.MODELS")] = "",
    graphs: Annotated[bool, typer.Option(help="On cuda: time replayed CUDA graphs too, not only eager steps")] = False,
    layers: Annotated[int, typer.Option(help=f"Of {' and '.join(OF_LAYERS)}: so many, not the grid's own")] = 0,
) -> None:
    """Times OP on GRID: the two frozen arms, and the chosen arms in every variant of the adapter."""
    target = torch.device(device)
    wanted = chosen_arms(op, grid, arms, target)
    if op == "limits":
        return show_limits(target, rounds or 50, out)
    warnings.filterwarnings("ignore", module="peft|transformers|bitsandbytes")
    if op in CELLS_OF:
        if op in OF_MODELS and (absent := runs.absent()):
            raise typer.BadParameter(f"{op} needs {absent}, which is not installed", param_hint="--op")
        timing, cells_of = CELLS_OF[op]
        cells = with_layers(op, cells_of(grid, model), layers)
        return time_by_module(timing, cells, wanted, grid, target, rounds, seconds, out)
    cells = shapes.cells(op, grid, model)
    refuse_wrong_results(cells, wanted, target)
    peaks = {dtype: roofline.measure(target, dtype) for dtype in dict.fromkeys(cell.dtype for cell in cells)}
    timings = ("eager", "graph") if graphs and target.type == "cuda" else ("eager",)
    asked = plan.Plan(rounds or LEAST_ROUNDS[grid], SECONDS[grid] if seconds < 0 else seconds, target.type, timings)
    for dtype, peak in peaks.items():
        rates = f"copy {peak.bytes_per_s / 1e9:.1f} GB/s, GEMM {peak.flops_per_s / 1e12:.3f} TFLOP/s"
        console.print(f"{_name(dtype)}: {rates}")
    console.print(asked.describe(cells, wanted, peaks))
    time_cells(cells, wanted, Run(target, asked, peaks, record.provenance(target)), out)


def chosen_arms(op: str, grid: str, arms: str, device: torch.device) -> tuple[str, ...]:
    """What --arms names, or all. Raises typer.BadParameter where one of the options is none that there is."""
    known_arms, every_arm = shapes.ARMS, shapes.kinds(device.type)
    if op in ARMS_OF:
        known_arms = every_arm = ARMS_OF[op]
    wanted = tuple(arm for arm in arms.split(",") if arm) or every_arm
    for value, known, option in (
        (op, OPS, "--op"),
        (grid, shapes.GRIDS, "--grid"),
        *((a, known_arms, "--arms") for a in wanted),
    ):
        if value not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}, got '{value}'", param_hint=option)
    return wanted


def with_layers(op: str, cells: list, layers: int) -> list:
    """The cells with so many layers, if any are asked for."""
    if layers and op not in OF_LAYERS:
        raise typer.BadParameter(f"is for {' and '.join(OF_LAYERS)}, and this is {op}", param_hint="--layers")
    return [dataclasses.replace(cell, layers=layers) for cell in cells] if layers else cells


def time_by_module(
    timing: ModuleType,
    cells: list,
    wanted: tuple[str, ...],
    grid: str,
    device: torch.device,
    rounds: int,
    seconds: float,
    out: Path | None,
) -> None:
    """Ops that are timed by a module of their own: the gate, then cell by cell.

    Exits with 1 where cells failed, which does not stop the next ones.
    """
    seconds = timing.SECONDS[grid] if seconds < 0 else seconds
    try:
        ran = timing.refuse_wrong_results(cells, device)
        say_ran(ran, f"; {len(cells)} cells")
        run = timing.Run.here(device, rounds or timing.LEAST_ROUNDS[grid], seconds)
        failed = record.one_by_one(
            cells,
            lambda cell: timing.time_cell(cell, wanted, run),
            timing.described,
            timing.Row,
            lambda text: console.print(escape(text)),
            out,
        )
    except gate.RedGateError as red:
        console.print(f"[red]refused:[/red] {escape(str(red))}")
        raise typer.Exit(2) from None
    exit_where_failed(failed, cells)


def show_limits(device: torch.device, rounds: int, out: Path | None) -> None:
    """What the device can do: printed, and written if asked."""
    rows = limits.measure(device, limits.sizes(device), rounds)
    for row in rows:
        beside = f"{row.ratio_p50:.3f} of {row.against}" if row.against else ""
        console.print(f"  {row.fact:14s} {row.shape:24s} {row.value:10.4g} {row.unit:8s} {beside}")
    if out:
        writer = record.Writer(out, limits.Row)
        writer.write(rows)
        writer.close()
        console.print(f"written: {out}")


def refuse_wrong_results(cells: list[shapes.Cell], wanted: tuple[str, ...], device: torch.device) -> None:
    """The gate; exits with 2 where it is red."""
    pairs = {(cell.dtype, variant.factor_dtype) for cell in cells for variant in cell.variants}
    kinds = tuple({kind for cell in cells for kind in plan.kinds_of(cell, wanted)})
    names = gate.backends_of(kinds, device.type)
    try:
        ran = gate.check(registry.ops()["lora_linear"], names, pairs, device)
    except gate.RedGateError as red:
        console.print(f"[red]refused:[/red] {escape(str(red))}")
        raise typer.Exit(2) from None
    say_ran(ran, f" on {', '.join(names) or 'no backend, as none is timed'}")


def time_cells(cells: list[shapes.Cell], wanted: tuple[str, ...], run: Run, out: Path | None) -> None:
    """Cell by cell, printed and written as they finish. Exits with 1 where cells failed, which stops no other."""
    writer, said, failed = record.Writer(out) if out else None, set(), 0
    for cell in cells:
        start = time.perf_counter()
        try:
            rows, left_out = time_cell(cell, plan.kinds_of(cell, wanted), run)
        except Exception as error:
            failed += 1
            console.print(escape(record.failure(cell, error)))
            continue
        show(cell, rows, time.perf_counter() - start)
        for line in left_out:
            if line not in said:
                console.print(f"  [yellow]not timed:[/yellow] {line}")
            said.add(line)
        if writer:
            writer.write(rows)
    if writer:
        writer.close()
        console.print(f"written: {out}")
    exit_where_failed(failed, cells)


def exit_where_failed(failed: int, cells: list) -> None:
    if failed:
        console.print(f"[red]{failed} of {len(cells)} cells failed[/red]")
        raise typer.Exit(1)


def say_ran(ran: int, more: str) -> None:
    """What the gate let through, and what it left out."""
    console.print(f"gate: {ran} samples right{more}")
    for reason in hopper.REFUSED:
        console.print(f"[red]{hopper.BACKEND} left out:[/red] {escape(reason)}")


if __name__ == "__main__":
    typer.run(main)
