"""Times LoRA's variants as PEFT has them and patched, over the frozen layer. `run.py --op lora_variants`

    base, base_again   the frozen layer alone, twice: the denominator, and what the clock is worth
    peft               HF PEFT's layer
    patched            the same layer after peft_kernels.patch
    recomputed         patched with recompute_mlp=True; of "mlp"

What is measured, by the name of the cell: "dora", a linear layer [K -> N] with weight-decomposed LoRA; "nf4" and
"int8", LoRA on a base of bitsandbytes' with 4 and 8 bits; "mlp", a Llama's feed-forward block (K hidden, N
intermediate) with LoRA on gate, up and down; "embedding", a table of K rows of N with LoRA, x being M ids. A training
step is y, then the gradients of x and of the adapter; of the base, that of x alone, and ids have none. `saved_bytes` is
what autograd keeps between the two, parameters apart. Factors are fp32, as PEFT makes them; caches are emptied before
every step.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import peft_kernels
from benchmarks import gate, record, runs
from benchmarks.runs import NotHere, Run
from benchmarks.shapes import BF16, F32
from benchmarks.tables import grid_table
from peft_kernels import backends, memory, registry

NAME = "lora_variants"
ARMS = ("peft", "patched", "recomputed")
LEAST_ROUNDS = {"cpu": 15, "gpu": 50, "full": 50, "quick": 3}
SECONDS = {"cpu": 5.0, "gpu": 0.5, "full": 0.5, "quick": 0.1}
FOREIGN = ("peft",)
# By the patched layers.
CALLED = ("lora_linear", "lora_add", "lora_embedding", "dora_norm", "dora_scale", "gated_product")


@dataclass(frozen=True)
class Cell:
    """M rows through a layer [K -> N], or a block of K with N in the middle, with LoRA of rank r."""

    variant: str
    dtype: torch.dtype
    K: int
    N: int
    M: int
    r: int
    p: str  # of dropout
    direction: str  # "training" or "inference"

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.variant} {dtype} {self.K} -> {self.N} M={self.M} r={self.r} p={self.p} {self.direction}"


@dataclass(frozen=True, kw_only=True)
class Row(runs.Row, Cell):
    """One arm of one cell; the base is the frozen layer."""

    saved_bytes: float  # kept by autograd between forward and backward, parameters not counted


def cells(grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid of shapes.GRIDS; those of `full` are those of `gpu`, whatever the model."""
    if grid == "quick":
        sizes, dtype, rows = {"dora": (64, 48), "nf4": (64, 64), "int8": (64, 48), "mlp": (64, 96)}, F32, (8,)
        table, ids = (64, 48), (8,)
    elif grid == "cpu":
        sizes = dict.fromkeys(("dora", "nf4", "int8"), (1024, 1024)) | {"mlp": (1024, 2816)}
        dtype, rows = F32, (256, 16)
        table, ids = (32000, 1024), (2048, 256)
    else:
        sizes = dict.fromkeys(("dora", "nf4", "int8"), (4096, 4096)) | {"mlp": (4096, 14336)}
        dtype, rows = BF16, (4096, 512, 16)
        table, ids = (128256, 4096), (4096, 512)
    one = [
        Cell(name, dtype, K, N, M, 16, "0", direction)
        for name, (K, N) in sizes.items()
        for M in rows
        for direction in ("training", "inference")
        if (name, direction) != ("mlp", "inference")  # there is nothing to recompute
    ]
    dropped = [dataclasses.replace(cell, p="0.1") for cell in one if cell.direction == "training" and rows[0] == cell.M]
    return one + dropped + [Cell("embedding", dtype, *table, M, 16, "0", "training") for M in ids]


# -- arms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Arm(runs.Arm):
    """A contender, and what it keeps for its backward can be counted."""

    model: nn.Module
    forward: Callable[[], Tensor]


class Holder(nn.Module):
    """What PEFT adapts: `layer`, or the children of `layer`."""

    def __init__(self, layer: nn.Module, variant: str):
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = variant == "nf4", variant == "int8"  # PEFT asks

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _frozen(cell: Cell) -> nn.Module:
    if cell.variant == "dora":
        return nn.Linear(cell.K, cell.N, bias=False).to(cell.dtype)
    if cell.variant == "embedding":
        return nn.Embedding(cell.K, cell.N).to(cell.dtype)
    if cell.variant == "mlp":
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        return LlamaMLP(LlamaConfig(hidden_size=cell.K, intermediate_size=cell.N)).to(cell.dtype)
    try:
        from bitsandbytes import nn as layers
    except Exception as error:  # its libraries fail in many ways
        raise NotHere(f"bitsandbytes cannot be imported: {type(error).__name__}: {error}") from error
    if cell.variant == "int8":
        return layers.Linear8bitLt(cell.K, cell.N, bias=False, has_fp16_weights=False)
    return layers.Linear4bit(cell.K, cell.N, bias=False, compute_dtype=cell.dtype, quant_type="nf4")


class Problem:
    """x [M, K] or M ids, dy, the frozen layer, and the same with PEFT's adapter."""

    def __init__(self, cell: Cell, device: torch.device):
        from peft import LoraConfig, get_peft_model

        self.cell, self.training = cell, cell.direction == "training"
        self.base = Holder(_frozen(cell).to(device), cell.variant).requires_grad_(False)
        config = LoraConfig(
            r=cell.r,
            lora_alpha=2 * cell.r,
            lora_dropout=float(cell.p),
            use_dora=cell.variant == "dora",
            target_modules=["gate_proj", "up_proj", "down_proj"] if cell.variant == "mlp" else ["layer"],
            init_lora_weights=False,
        )
        shared = {id(p): p for p in self.base.parameters()}
        self.adapted = get_peft_model(copy.deepcopy(self.base, shared), config).train(self.training)
        if not self.training:
            self.adapted.requires_grad_(False)  # as PEFT loads them; the norms of DoRA are kept then
        if cell.variant == "embedding":
            self.x = torch.randint(cell.K, (cell.M,), device=device)
        else:
            self.x = torch.randn(cell.M, cell.K, device=device).to(cell.dtype).requires_grad_(self.training)
        self.dy = torch.randn_like(self.base(self.x))

    def arm(self, name: str, backend: str, model: nn.Module) -> Arm:
        wanted = [tensor for tensor in (self.x, *model.parameters()) if tensor.requires_grad]

        def forward():
            return model(self.x)

        def step():
            y = forward()
            return (y, *torch.autograd.grad(y, wanted, self.dy)) if wanted else y

        return Arm(name, backend, step if self.training else torch.no_grad()(forward), model, forward)

    def patched(self, name: str, **options) -> list[Arm]:
        """The adapted model again, with the same tensors, patched."""
        model = copy.deepcopy(self.adapted, {id(p): p for p in self.adapted.parameters()})
        peft_kernels.patch(model, strict=True, **options)
        return [self.arm(name, backends.bound(self.x.device.type), model)]


_MAKERS = {
    "peft": lambda problem: [problem.arm("peft", "peft", problem.adapted)],
    "patched": lambda problem: problem.patched("patched"),
    "recomputed": lambda problem: problem.patched("recomputed", recompute_mlp=True),
}


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """The frozen layer twice and the arms of the given kinds."""
    problem = Problem(cell, device)
    arms = [problem.arm(name, "torch", problem.base) for name in ("base", "base_again")]
    made, left_out = runs.arms_of(problem, _MAKERS, kinds)
    return arms + made, left_out


# -- rows -------------------------------------------------------------------------------------------------------------


def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each that could not be timed."""
    kinds = tuple(kind for kind in kinds if kind != "recomputed" or cell.variant == "mlp")  # else nothing is
    alike = ARMS if cell.p == "0" else ()  # PEFT draws other masks
    try:
        found = runs.timed(build, cell, kinds, FOREIGN, run, alike)
    except NotHere as reason:
        nothing = record.no_numbers(Row) | {"timing": "eager", "rounds": 0, "not_timed": str(reason)}
        return [Row(**labels(cell, kind, ""), **nothing, **run.origin) for kind in kinds]

    def more(arm, columns):
        training = cell.direction == "training"
        return {"saved_bytes": memory.saved_bytes(arm.forward, arm.model.parameters()) if training else 0.0}

    return runs.rows_of(Row, partial(labels, cell), found, more, run)


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    return runs.labels(NAME, cell, arm, backend)


def refuse_wrong_results(cells: list[Cell], device: torch.device) -> int:
    """The gate: the bound backend, through the samples of the ops that the layers call; how many ran.

    Raises gate.RedGateError.
    """
    pairs, names = {(cell.dtype, F32) for cell in cells}, [backends.bound(device.type)]
    return sum(gate.check(registry.ops()[op], names, pairs, device) for op in CALLED)


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    if rows[0].not_timed:
        return f"{cell.title}: not timed: {rows[0].not_timed}"

    def more(row):
        return f"  {row.saved_bytes:,.0f} bytes kept" if row.saved_bytes > 0 else ""

    return runs.described(cell, rows, seconds, "frozen", more)


# -- the README's table -----------------------------------------------------------------------------------------------

LIMIT = 1.3
_TARGET = ("dora", "float32", 1024, 1024, 256, 16, "0", "training")
_TITLE = "DoRA, training step, d = 1024, 256 rows"


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """(met, sentence) for each target."""
    at = {(row.arm, _place(row)): row for row in rows if not row.not_timed}
    ours, peft = (at.get((arm, _TARGET)) for arm in ("patched", "peft"))
    met, measured = False, "not measured"
    if ours and peft:
        met = ours.ratio_p50 <= LIMIT
        measured = f"{ours.ratio_p50:.3f} against {LIMIT:.2f}, PEFT {peft.ratio_p50:.3f}"
    kept = [(row.saved_bytes, at.get(("patched", _place(row)))) for row in at.values() if row.arm == "recomputed"]
    less = bool(kept) and all(other and size < other.saved_bytes for size, other in kept)
    return [(met, f"{_TITLE}: {measured}"), (less, "an MLP that recomputes keeps fewer bytes than a patched one")]


def _place(row: Row) -> tuple:
    return row.variant, row.dtype, row.K, row.N, row.M, row.r, row.p, row.direction


def markdown(rows: list[Row], origin: str) -> str:
    """All that stands between the README's markers."""
    timed, cells = runs.ratio_lines([row for row in rows if row.backend], "base", ARMS, _place, lambda row: row.arm)
    kept = {(row.arm, _place(row)): f"{row.saved_bytes / row.M:,.0f}" for row in rows if row.saved_bytes > 0}
    lines = []
    for base, texts in cells:
        sizes = [base.variant, base.dtype, f"{base.K} x {base.N}", str(base.M), base.p, base.direction]
        lines.append([*sizes, *texts, *(kept.get((arm, _place(base)), "") for arm in timed)])
    header = ["", "dtype", "K x N", "M", "dropout", "", "frozen, ms", "A/A", *timed]
    header += [f"{arm}: bytes" for arm in timed]
    text = (
        f"Time of a layer with LoRA of rank {rows[0].r} in fp32 over the frozen layer alone, medians, caches emptied "
        "before every step; and the bytes that autograd keeps of a row between forward and backward. nf4, int8: a base "
        "of bitsandbytes'. mlp: a Llama's feed-forward block, LoRA on its three projections. embedding: a table of K "
        f"rows, looked up at M ids. {origin}"
    )
    return f"{text}\n\n{grid_table(header, lines)}\n"
