"""Times whole models with a prefix beside the same model without one. `run.py --op prefix_models`

    none, none_again   the model without a prefix, twice: the denominator, and what the clock is worth
    peft               HF PEFT's prefix tuning
    attached           the same prefix as peft_kernels.load puts it on the model

Prefill is a forward of S tokens that fills a new cache, decoding one of a token behind T in a cache; a training step is
the loss of S tokens, then the gradients of the prefix, and without one those of the embedded tokens: the layers below
the last one are then computed backwards in all arms. The base is frozen, and one for all arms; caches are emptied
before every step.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import peft_kernels
from benchmarks import prefix_attention, runs
from benchmarks.runs import Arm, Run
from benchmarks.shapes import BF16, F32
from benchmarks.tables import grid_table

NAME = "prefix_models"
ARMS = ("peft", "attached")
LEAST_ROUNDS = {"cpu": 15, "gpu": 30, "full": 30, "quick": 3}
SECONDS = {"cpu": 5.0, "gpu": 1.0, "full": 1.0, "quick": 0.1}
FOREIGN = ("peft",)
DEMO, LAYER_8B, TINY = "demo", "llama-3-8b, one layer", "tiny"
# hidden, intermediate, layers, query heads, heads of keys
SIZES = {DEMO: (256, 704, 4, 4, 4), LAYER_8B: (4096, 14336, 1, 32, 8), TINY: (64, 96, 2, 4, 2)}
WORDS = 256


@dataclass(frozen=True)
class Cell:
    """B rows of S tokens behind T in a cache, with a prefix of P, through a Llama of SIZES."""

    dtype: torch.dtype
    model: str
    B: int
    S: int
    T: int
    P: int
    step: str  # "prefill", "decoding" or "training"

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.model} B={self.B} S={self.S} T={self.T} P={self.P} {self.step}"


@dataclass(frozen=True, kw_only=True)
class Row(runs.Row, Cell):
    """One arm of one cell; the base is the model without a prefix."""


def cells(grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid of shapes.GRIDS; those of `full` are those of `gpu`, whatever the model."""
    if grid == "quick":
        return _steps(F32, TINY, 2, 9, 12, 5)
    if grid == "cpu":
        return [
            *_steps(F32, DEMO, 16, 128, 128, 32),
            *_steps(F32, DEMO, 16, 128, 512, 128),
            *_steps(F32, LAYER_8B, 1, 64, 128, 32),
            Cell(F32, LAYER_8B, 8, 1, 128, 128, "decoding"),
        ]
    shapes = [(8, 1024, 512, P) for P in (32, 128)]
    many = [Cell(BF16, LAYER_8B, 64, 1, T, 128, "decoding") for T in (512, 2048)]
    return [c for model in (DEMO, LAYER_8B) for shape in shapes for c in _steps(BF16, model, *shape)] + many


def _steps(dtype: torch.dtype, model: str, B: int, S: int, T: int, P: int) -> list[Cell]:
    training = Cell(dtype, model, B, S, 0, P, "training")
    prefill, decoding = dataclasses.replace(training, step="prefill"), Cell(dtype, model, B, 1, T, P, "decoding")
    return [training, prefill, decoding]


# -- arms -------------------------------------------------------------------------------------------------------------


class Problem:
    """A frozen model, the tokens of a step [B, S] and of a cache [B, T], and a prefix in PEFT's form."""

    def __init__(self, cell: Cell, device: torch.device):
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, intermediate, layers, heads, key_value_heads = SIZES[cell.model]
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=cell.P + cell.T + cell.S,
            initializer_range=hidden**-0.5,
        )
        self.cell, self.device = cell, device
        with device:
            model = LlamaForCausalLM(config).to(cell.dtype)
        self.model = model.train(cell.step == "training").requires_grad_(False)
        self.tokens, self.context = (torch.randint(WORDS, (cell.B, size), device=device) for size in (cell.S, cell.T))

    def copied(self) -> nn.Module:
        """The model again, with the same weights."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def step(self, model: nn.Module, parameters: list[Tensor], inner: nn.Module) -> Callable[[], Tensor]:
        """What is timed: the logits, or the loss, after which the gradients are there too.

        `inner` is called where what came before is in the cache, the prefix too if a cache holds it.
        """
        if self.cell.step == "training":
            return lambda: self.trained(model(input_ids=self.tokens, labels=self.tokens, use_cache=False), parameters)
        if self.cell.step == "prefill":
            ones = self.mask(self.cell.S)
            return torch.no_grad()(
                lambda: model(input_ids=self.tokens, attention_mask=ones, use_cache=True, logits_to_keep=1).logits
            )
        with torch.no_grad():
            cache = model(input_ids=self.context, use_cache=True).past_key_values
        mask = self.mask(cache.get_seq_length() + 1)
        # put back after each step: a graph reads them at their addresses, where they have to stay alive
        kept = [(layer.keys, layer.values) for layer in cache.layers]

        def decode():
            found = inner(input_ids=self.tokens, attention_mask=mask, past_key_values=cache).logits
            for layer, tensors in zip(cache.layers, kept, strict=True):
                layer.keys, layer.values = tensors
            return found

        return torch.no_grad()(decode)

    def mask(self, length: int) -> Tensor | None:
        """All ones, as generate passes it; on a GPU none, which says the same.

        transformers would wait there for what it holds, and no graph could be captured.
        """
        if self.device.type == "cuda":
            return None
        return torch.ones(self.cell.B, length, dtype=torch.int64, device=self.device)

    def trained(self, output, parameters: list[Tensor]) -> Tensor:
        torch.autograd.grad(output.loss, parameters)
        return output.loss.detach()

    def without(self) -> Callable[[], Tensor]:
        """The step of the model alone."""
        if self.cell.step != "training":
            return self.step(self.model, [], self.model)
        embedded = self.model.get_input_embeddings()(self.tokens).requires_grad_()
        return lambda: self.trained(self.model(inputs_embeds=embedded, labels=self.tokens, use_cache=False), [embedded])


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """The model without a prefix twice and the arms of the given kinds."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    problem = Problem(cell, device)
    arms = [Arm(name, "torch", problem.without()) for name in ("none", "none_again")]
    peft = get_peft_model(problem.copied(), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=cell.P))
    trainable = [p for p in peft.parameters() if p.requires_grad]
    if "peft" in kinds:
        arms.append(Arm("peft", "peft", problem.step(peft, trainable, peft.base_model)))
    if "attached" in kinds:
        model = problem.copied()
        with tempfile.TemporaryDirectory() as folder:
            peft.save_pretrained(folder)
            peft_kernels.load(model, folder, "prefix", trainable=cell.step == "training")
        ours = [p for p in model.parameters() if p.requires_grad]
        arms.append(Arm("attached", "peft_kernels", problem.step(model, ours, model)))
    return arms, {}


# -- rows -------------------------------------------------------------------------------------------------------------


def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell."""
    found = runs.timed(build, cell, kinds, FOREIGN, run, ARMS)
    return runs.rows_of(Row, partial(labels, cell), found, lambda arm, columns: {}, run)


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    return runs.labels(NAME, cell, arm, backend)


def refuse_wrong_results(cells: list[Cell], device: torch.device) -> int:
    """The gate: as for the op. Raises gate.RedGateError."""
    return prefix_attention.refuse_wrong_results(cells, device)


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    return runs.described(cell, rows, seconds, "no prefix")


# -- the README's table -----------------------------------------------------------------------------------------------

TARGET = "a training step of the demo's model with P = 32, over PEFT"
_TRAINING = ("float32", DEMO, 16, 128, 0, 32, "training")


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """(met, sentence) for the target: not slower than PEFT."""
    ratio = {
        row.arm: row.ratio_p50 for row in rows if row.arm in ARMS and _place(row) == _TRAINING and not row.not_timed
    }
    if not {"peft", "attached"} <= ratio.keys():
        return [(False, f"{TARGET}: not measured")]
    quotient = ratio["attached"] / ratio["peft"]
    return [(quotient <= 1, f"{TARGET}: {quotient:.3f} against 1.00")]


def _place(row: Row) -> tuple:
    return row.dtype, row.model, row.B, row.S, row.T, row.P, row.step


def markdown(rows: list[Row], origin: str) -> str:
    """All that stands between the README's markers."""
    timed, cells = runs.ratio_lines(rows, "none", ARMS, _place, lambda row: row.arm)
    lines = [
        [none.dtype, none.model, *(str(size) for size in (none.B, none.S, none.T, none.P)), none.step, *texts]
        for none, texts in cells
    ]
    header = ["dtype", "model", "B", "S", "T", "P", "", "none, ms", "A/A", *timed]
    text = (
        "Time of a whole model with a prefix over that of the same without one, medians, caches emptied before every "
        f"step; {SIZES[DEMO][2]} layers of {SIZES[DEMO][0]} (the demo's model), one of {SIZES[LAYER_8B][0]}. {origin}"
    )
    return f"{text}\n\n{grid_table(header, lines)}\n"
