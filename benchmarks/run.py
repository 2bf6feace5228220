"""Times an op beside the frozen linear, HF PEFT and whoever else is importable, and writes a CSV.

    python benchmarks/run.py --op lora_linear --grid cpu --out benchmarks/results/lora_linear_cpu.csv

Nothing is timed while a backend fails its samples: the run is refused with exit code 2.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the checkout is the package

import torch
import typer
from rich.console import Console

from benchmarks import arms as contenders
from benchmarks import gate, measure, plan, record, roofline, shapes
from peft_kernels import memory, registry

OPS = ("lora_linear", "seam")
LEAST_ROUNDS = {"cpu": 15, "full": 50, "quick": 5}
SECONDS = {"cpu": 30.0, "full": 0.5, "quick": 0.3}

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Run:
    """What holds for every cell of a run."""

    device: torch.device
    rounds: int  # at least
    seconds: float  # per cell, where the rounds take less
    graphs: bool
    peaks: dict[torch.dtype, roofline.Peak]
    origin: dict[str, str | int]

    def clock(self, x, dy):
        if self.device.type == "cuda":
            return measure.cuda_graph_clock(x, dy) if self.graphs else measure.cuda_clock(x, dy)
        return measure.cpu_clock(x, dy)


def time_cell(cell: shapes.Cell, kinds: tuple[str, ...], run: Run) -> tuple[list[record.Row], list[str]]:
    """One cell: its rows, and a line for each arm that could not be timed."""
    torch.manual_seed(0)
    torch.compiler.reset()  # each cell compiles anew, or PEFT's one code object would run into the recompile limit
    arms, left_out = contenders.build(cell, run.device, kinds)
    x = torch.randn(cell.M, cell.K, device=run.device).to(cell.dtype).requires_grad_()
    dy = torch.randn(cell.M, cell.N, device=run.device).to(cell.dtype)
    clock = run.clock(x, dy)
    arms, failed = runnable(arms, clock)
    steps = measure.interleave(arms, clock, run.rounds, run.seconds, plan.WARMUP_ROUNDS)
    saved = {arm: memory.saved_bytes(lambda arm=arm: arm.call(x), arm.parameters) for arm in arms}
    return rows_of(cell, steps, saved, run), left_out + failed


def runnable(arms: list[contenders.Arm], step) -> tuple[list[contenders.Arm], list[str]]:
    """The arms that survive one step. Only contenders that are not ours may fail; they are named, not hidden."""
    kept, failed = [], []
    for arm in arms:
        try:
            step(arm)
            kept.append(arm)
        except Exception as error:
            if arm.backend not in ("inductor", "peer"):
                raise
            failed.append(f"{arm.name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return kept, failed


def rows_of(cell: shapes.Cell, steps: dict, saved: dict, run: Run) -> list[record.Row]:
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
                    op=cell.op,
                    arm=arm.name,
                    backend=arm.backend,
                    dtype=_name(cell.dtype),
                    adapter_dtype=_name(arm.variant.factor_dtype) if arm.variant else "",
                    M=cell.M,
                    K=cell.K,
                    N=cell.N,
                    r=str(cell.r),  # of the cell: a frozen arm has none
                    p=f"{arm.variant.p:g}" if arm.variant else "",
                    direction=direction,
                    rounds=len(values),
                    **dict(zip(("ms_p20", "ms_p50", "ms_p80"), ms, strict=True)),
                    **dict(zip(("ratio_p20", "ratio_p50", "ratio_p80"), ratio, strict=True)),
                    aa_spread=max(spread),
                    gbs=cost.bytes / ms[1] * 1e-6,
                    tflops=cost.flops / ms[1] * 1e-9,
                    peak_share=run.peaks[cell.dtype].least_ms(cost) / ms[1],
                    saved_bytes=saved[arm],
                    **run.origin,
                )
            )
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(cell: shapes.Cell, rows: list[record.Row], seconds: float) -> None:
    """One block per cell: every arm's ratio to the frozen linear, forward+backward."""
    whole = [row for row in rows if row.direction == "forward+backward"]
    first = whole[0]
    console.print(
        f"[bold]{cell.op} {cell.title}[/bold]  frozen {first.ms_p50:.3f} ms, A/A {first.aa_spread:.1%}, "
        f"{first.rounds} rounds, {seconds:.0f} s"
    )
    for row in whole[2:]:
        console.print(
            f"  {row.arm + ' ' + row.backend:22s} adapters {row.adapter_dtype:8s} p={row.p:3s}  {row.ratio_p50:.3f} "
            f"[dim]({row.ratio_p20:.3f} - {row.ratio_p80:.3f})[/dim]  {row.peak_share:.0%} of peak"
        )


def main(
    op: Annotated[str, typer.Option(help="lora_linear, or seam: the price of the call alone")] = "lora_linear",
    grid: Annotated[
        str, typer.Option(help="cpu (feeds the README), full (shapes of models, for a GPU), quick")
    ] = "quick",
    arms: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(shapes.ARMS)}")] = ",".join(shapes.ARMS),
    rounds: Annotated[int, typer.Option(help="Least rounds per cell; 0: the grid's own")] = 0,
    seconds: Annotated[
        float, typer.Option(help="Time per cell if its least rounds take less; < 0: the grid's own")
    ] = -1,
    out: Annotated[Path | None, typer.Option(help="CSV to write; without it, results are only printed")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    model: Annotated[str, typer.Option(help="Restricts grid full to one model of shapes.MODELS")] = "",
    graphs: Annotated[bool, typer.Option(help="On cuda: replay CUDA graphs instead of running eagerly")] = False,
) -> None:
    """Times OP on GRID: the two frozen arms, and the chosen arms in every variant of the adapter."""
    wanted = tuple(arm for arm in arms.split(",") if arm)
    for value, known, option in (
        (op, OPS, "--op"),
        (grid, shapes.GRIDS, "--grid"),
        *((a, shapes.ARMS, "--arms") for a in wanted),
    ):
        if value not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}, got '{value}'", param_hint=option)
    warnings.filterwarnings("ignore", module="peft")
    cells = shapes.cells(op, grid, model)
    refuse_wrong_results(cells, wanted, torch.device(device))
    peaks = {
        dtype: roofline.measure(torch.device(device), dtype) for dtype in dict.fromkeys(cell.dtype for cell in cells)
    }
    run = Run(
        device=torch.device(device),
        rounds=rounds or LEAST_ROUNDS[grid],
        seconds=SECONDS[grid] if seconds < 0 else seconds,
        graphs=graphs,
        peaks=peaks,
        origin=record.provenance(torch.device(device)),
    )
    for dtype, peak in peaks.items():
        rates = f"copy {peak.bytes_per_s / 1e9:.1f} GB/s, GEMM {peak.flops_per_s / 1e12:.3f} TFLOP/s"
        console.print(f"{_name(dtype)}: {rates}")
    console.print(plan.describe(cells, wanted, peaks, run.rounds, run.seconds))
    time_cells(cells, wanted, run, out)


def refuse_wrong_results(cells: list[shapes.Cell], wanted: tuple[str, ...], device: torch.device) -> None:
    """The gate; exits with 2 where it is red."""
    pairs = {(cell.dtype, variant.factor_dtype) for cell in cells for variant in cell.variants}
    kinds = tuple({kind for cell in cells for kind in plan.kinds_of(cell, wanted)})
    names = gate.backends_of(kinds, device.type)
    try:
        ran = gate.check(registry.ops()["lora_linear"], names, pairs, device)
    except gate.RedGateError as red:
        console.print(f"[red]refused:[/red] {red}")
        raise typer.Exit(2) from None
    console.print(f"gate: {ran} samples right on {', '.join(names) or 'no backend, as none is timed'}")


def time_cells(cells: list[shapes.Cell], wanted: tuple[str, ...], run: Run, out: Path | None) -> None:
    """Cell by cell, printed and written as they finish."""
    writer, said = record.Writer(out) if out else None, set()
    for cell in cells:
        start = time.perf_counter()
        rows, left_out = time_cell(cell, plan.kinds_of(cell, wanted), run)
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


if __name__ == "__main__":
    typer.run(main)
