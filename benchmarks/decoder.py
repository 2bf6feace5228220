"""Times the layers of a Llama-3-8B, as many as fit, with LoRA on all seven linears. `run.py --op decoder`

    frozen, frozen_again   the layers alone, twice: the denominator, and what the clock is worth

of a training step, forward, loss and backward, whose gradients are those of the adapter and of the embedded tokens (of
the frozen layers, of the latter alone):

    peft                   HF PEFT with its default adapters, which are fp32
    peft_narrow            HF PEFT with adapters in the base's dtype
    unsloth, axolotl       the same with Unsloth's and Axolotl's LoRA functions in it, where they can be imported
    patched                `peft` after peft_kernels.patch
    patched_narrow         `peft_narrow` after it

of decoding, one token for each row, rows taking turns at the adapters of a pool:

    pool                   peft_kernels.attach_pool, through a Runner

Training is timed eagerly, decoding on a GPU from a CUDA graph. `memory_bytes` is, on a GPU, what a training step makes
the allocator hold at most beyond what it held before; on a CPU what autograd keeps; `memory` says which.
"""

import dataclasses
import gc
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import gate, hopper, runs
from benchmarks.decoder_arms import ARMS, TRAINING_ARMS, Arm, Cell, build
from benchmarks.runs import Run
from benchmarks.shapes import BF16, F32
from benchmarks.tables import grid_table
from peft_kernels import backends, memory, registry

NAME = "decoder"
LEAST_ROUNDS = {"cpu": 5, "gpu": 15, "full": 15, "quick": 2}
SECONDS = {"cpu": 1.0, "gpu": 2.0, "full": 2.0, "quick": 0.1}
FOREIGN = ("peft", "peer")
CALLED = ("lora_linear", "batched_lora_")  # by patched models and through a pool
PEAK, KEPT = "peak of the allocator", "kept by autograd"


@dataclass(frozen=True, kw_only=True)
class Row(runs.Row, Cell):
    """One arm of one cell; the base is the frozen layers."""

    adapter_dtype: str = ""
    tokens_per_s: float
    memory_bytes: float  # of a training step; else NaN
    memory: str = ""


def cells(grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid of shapes.GRIDS, the most important first; `cpu` is small, and `full` is `gpu`."""
    if grid == "quick":
        training = Cell(F32, 64, 96, 4, 2, 1, 2, 16, 0, 4, "0.1", 1, "training")
        T, batches = 16, ((4, 2), (4, 1))
    elif grid == "cpu":
        training = Cell(BF16, 512, 1408, 8, 2, 2, 2, 128, 0, 16, "0.1", 1, "training")
        T, batches = 64, ((16, 4), (16, 1), (16, 16))
    else:
        training = Cell(BF16, 4096, 14336, 32, 8, 8, 4, 2048, 0, 16, "0.1", 1, "training")
        T, batches = 512, ((64, 16), (64, 1), (64, 64), (16, 16), (1, 1))
    first, *rest = [
        dataclasses.replace(training, B=B, S=1, T=T, p="0", adapters=adapters, step="decoding")
        for B, adapters in batches
    ]
    return [training, first, dataclasses.replace(training, p="0"), *rest]


# -- rows -------------------------------------------------------------------------------------------------------------


def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each that could not be timed."""
    training = cell.step == "training"
    alike = TRAINING_ARMS if training and cell.p == "0" else () if training else ("pool",)  # PEFT draws other masks
    found = runs.timed(build, cell, kinds, FOREIGN, run, alike, "eager" if training else "graph", cell.layers)
    tokens = cell.B * cell.S

    def more(arm, columns):
        held, how = memory_of(arm, run.device) if training else (float("nan"), "")
        rate = 1e3 * tokens / columns["ms_p50"]
        return {"adapter_dtype": arm.adapter_dtype, "tokens_per_s": rate, "memory_bytes": held, "memory": how}

    rows = runs.rows_of(Row, partial(labels, cell), found, more, run)
    del found
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # the next cell has other sizes
    return rows


def memory_of(arm: Arm, device: torch.device) -> tuple[float, str]:
    """Bytes of one training step beyond what was there before it, and how they were counted."""
    if device.type != "cuda":
        return float(memory.saved_bytes(arm.forward, arm.parameters)), KEPT
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with hopper.asked_for(arm.backend):
        arm.run()
    return float(torch.cuda.max_memory_allocated(device) - before), PEAK


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    return runs.labels(NAME, cell, arm, backend)


def refuse_wrong_results(cells: list[Cell], device: torch.device) -> int:
    """The gate: the bound backend, through the samples of the ops that the layers call; how many ran.

    Raises gate.RedGateError.
    """
    pairs = {(cell.dtype, factor) for cell in cells for factor in (cell.dtype, F32)}
    names = [backends.bound(device.type)]
    return sum(gate.check(registry.ops()[op], names, pairs, device) for op in CALLED)


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""

    def more(row):
        kept = f", {row.memory_bytes / 1e6:,.1f} MB {row.memory}" if row.memory else ""
        return f"  {row.tokens_per_s:,.0f} tokens/s{kept}"

    return runs.described(cell, rows, seconds, "frozen", more)


# -- tables -----------------------------------------------------------------------------------------------------------


def _place(row: Row) -> tuple:
    return tuple(getattr(row, field.name) for field in dataclasses.fields(Cell))


def _contender(row: Row) -> str:
    return f"{row.arm} {row.backend}" if row.backend == hopper.BACKEND else row.arm


def markdown(rows: list[Row], origin: str) -> str:
    """What a run gives, as a table: a line per cell."""
    timed, cells = runs.ratio_lines(rows, "frozen", ARMS, _place, _contender)
    at = {(_contender(row), _place(row)): row for row in rows if not row.not_timed}
    lines = []
    for base, texts in cells:
        place, training = _place(base), base.step == "training"
        what = f"training, dropout {base.p}" if training else f"decoding, {base.adapters} adapters"
        ours = at.get(("patched" if training else "pool", place))
        held = [at[arm, place].memory_bytes for arm in ("frozen", *timed) if training and (arm, place) in at]
        rate = f"{ours.tokens_per_s:,.0f}" if ours else ""
        lines.append([what, f"{base.B} x {base.S}", *texts, rate, " / ".join(f"{size / 1e9:.2f}" for size in held)])
    header = ["", "tokens", "frozen, ms", "A/A", *timed, "ours, tokens/s", "GB of a step: frozen / arms in order"]
    first = rows[0]
    text = (
        f"Time of {first.layers} layers of a Llama of {first.hidden} x {first.intermediate} in {first.dtype}, with "
        f"LoRA of rank {first.r} on all linears, over the frozen layers alone, medians. {origin}"
    )
    return f"{text}\n\n{grid_table(header, lines)}\n"
