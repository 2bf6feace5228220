"""Times one training step of each of L adapters of a model: all in one batch, or one after another.

A step: forward, the mean loss over an adapter's own tokens, backward, its AdamW. Timed until all L have taken one.

    peft, peft_again   HF PEFT, one adapter after another: the denominator, and what the clock is worth
    alone              likewise, patched
    together           patched, one batch of every adapter's rows: model(..., adapter_names=...)
    peft_mixed         the same batch given to PEFT, which refuses it in training

Making an adapter the active one is not timed: who trains one after another does it once. Every arm has its own model.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import peft_kernels
from benchmarks import gate, measure, runs
from benchmarks.runs import Arm, Run
from benchmarks.shapes import BF16, F32
from benchmarks.tables import grid_table
from peft_kernels import backends, registry

NAME = "train_many"
ARMS = ("alone", "together", "peft_mixed")
ADAPTERS, ROWS = (1, 4, 16), (1, 4)
LEAST_ROUNDS = {"cpu": 15, "gpu": 30, "full": 30, "quick": 3}
SECONDS = {"cpu": 5.0, "gpu": 1.0, "full": 1.0, "quick": 0.1}
RANK = 16
RATE = 1e-5  # small: after many rounds the weights are still such as training has


@dataclass(frozen=True)
class Cell:
    """L `adapters` of rank r, each with `rows` sequences of `tokens`; a Llama without its many layers and words."""

    dtype: torch.dtype  # of the base; adapters are fp32, as PEFT makes them
    hidden: int
    intermediate: int
    layers: int
    adapters: int
    rows: int
    tokens: int
    r: int

    @property
    def names(self) -> list[str]:
        return [f"a{i}" for i in range(self.adapters)]

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} d={self.hidden} {self.adapters} adapters, {self.rows} x {self.tokens} tokens each"


@dataclass(frozen=True)
class Row(runs.Row, Cell):
    """One arm of one cell; the base is PEFT, one adapter after another."""

    adapter_dtype: str
    tokens_per_s: float


def cells(grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid of shapes.GRIDS; of `full` the same as of `gpu`, whatever the model."""
    if grid == "quick":
        return [Cell(F32, 64, 96, 1, adapters, 2, 16, RANK) for adapters in (1, 4)]
    small = Cell(F32, 1024, 3072, 2, 1, 1, 64, RANK)
    near = small if grid == "cpu" else Cell(BF16, 4096, 14336, 2, 1, 1, 256, RANK)
    found = [dataclasses.replace(near, rows=rows, adapters=adapters) for rows, adapters in product(ROWS, ADAPTERS)]
    # A processor without bf16 products takes minutes for more of these.
    return found + ([dataclasses.replace(small, dtype=BF16)] if grid == "cpu" else [])


# -- arms -------------------------------------------------------------------------------------------------------------


class Problem:
    """A model with the cell's adapters, an optimizer and tokens [rows, S] for each."""

    def __init__(self, cell: Cell, device: torch.device, patched: bool):
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = LlamaConfig(
            vocab_size=1024,
            hidden_size=cell.hidden,
            intermediate_size=cell.intermediate,
            num_hidden_layers=cell.layers,
            num_attention_heads=max(1, cell.hidden // 64),
            max_position_embeddings=cell.tokens,
            use_cache=False,
        )
        lora = LoraConfig(r=cell.r, target_modules="all-linear")
        self.cell, self.device = cell, device
        self.model = get_peft_model(LlamaForCausalLM(sizes).to(device, cell.dtype), lora, cell.names[0]).train()
        for name in cell.names[1:]:
            self.model.add_adapter(name, lora)
        if patched:
            peft_kernels.patch(self.model, strict=True)
        self.tokens = torch.randint(1024, (cell.adapters, cell.rows, cell.tokens), device=device)
        self.optimizers = {
            name: torch.optim.AdamW([p for n, p in self.model.named_parameters() if f".{name}." in n], lr=RATE)
            for name in cell.names
        }

    def now(self) -> float:
        """ms, with the device's work done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter_ns() * 1e-6

    def finish(self, names: list[str], losses: list[Tensor]) -> None:
        """Backward and the optimizers of some adapters."""
        sum(losses).backward()
        for name in names:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def one_after_another(self) -> float:
        taken = 0.0
        for name, tokens in zip(self.cell.names, self.tokens, strict=True):
            self.model.set_adapter(name)
            start = self.now()
            self.finish([name], [losses(self.model(input_ids=tokens).logits, tokens).mean()])
            taken += self.now() - start
        return taken

    def together(self) -> float:
        """Row i belongs to adapter i % L."""
        cell, tokens = self.cell, self.tokens.transpose(0, 1).flatten(0, 1)  # [rows L, S]
        start = self.now()
        each = losses(self.model(input_ids=tokens, adapter_names=cell.names * cell.rows).logits, tokens)
        self.finish(cell.names, [each[i :: cell.adapters].mean() for i in range(cell.adapters)])
        return self.now() - start


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of every token but the first: [rows, S - 1], in fp32 as in transformers."""
    return cross_entropy(logits[:, :-1].float().mT, tokens[:, 1:], reduction="none")


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """PEFT twice and the arms of the given kinds, each after one step; and for each that cannot be here, why."""
    arms, left_out = [], {}
    for name in ("peft", "peft_again", *kinds):
        ours = not name.startswith("peft")
        problem = Problem(cell, device, patched=ours)
        step = problem.one_after_another
        if name in ("together", "peft_mixed"):
            problem.model.set_requires_grad(cell.names)
            step = problem.together
        arm = Arm(name, backends.bound(device.type) if ours else "peft", step)
        try:
            arm.run()
            arms.append(arm)
        except ValueError as error:
            if name != "peft_mixed":
                raise
            left_out[name] = f"ValueError: {error}"
    return arms, left_out


# -- rows -------------------------------------------------------------------------------------------------------------


def time_cell(cell: Cell, kinds: tuple[str, ...], run: Run) -> list[Row]:
    """All arms of a cell, and a row that says why for each that could not be timed."""
    arms, left_out = build(cell, run.device, kinds)
    times = measure.interleave(arms, lambda arm: arm.run(), run.rounds, run.seconds)
    tokens = cell.adapters * cell.rows * cell.tokens
    absent = [(name, "peft", reason) for name, reason in left_out.items()]
    found = runs.Timed(times, "eager", absent)

    def more(arm, columns):
        return {"tokens_per_s": 1e3 * tokens / columns["ms_p50"]}

    return runs.rows_of(Row, partial(labels, cell), found, more, run)


def labels(cell: Cell, arm: str, backend: str) -> dict[str, str | int]:
    """The columns that say what was timed."""
    return runs.labels(NAME, cell, arm, backend) | {"adapter_dtype": "float32"}


def refuse_wrong_results(cells: list[Cell], device: torch.device) -> int:
    """The gate: the backend that patched models use, through the samples of both ops; how many ran.

    Raises gate.RedGateError.
    """
    pairs, names = {(cell.dtype, F32) for cell in cells}, [backends.bound(device.type)]
    return sum(gate.check(registry.ops()[op], names, pairs, device) for op in ("lora_linear", "batched_lora"))


def described(cell: Cell, rows: list[Row], seconds: float) -> str:
    """One block per cell."""
    return runs.described(cell, rows, seconds, "PEFT", lambda row: f"  {row.tokens_per_s:.0f} tokens/s")


# -- the README's table -----------------------------------------------------------------------------------------------


def markdown(rows: list[Row], origin: str) -> str:
    """All that stands between the README's markers."""
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row.dtype, row.hidden, row.adapters, row.rows, row.tokens), {})[row.arm] = row
    lines = []
    for (dtype, _, adapters, count, tokens), arms in cells.items():
        alone, together = (arms[name].ratio_p50 if name in arms else math.nan for name in ("alone", "together"))
        peft, rate = arms["peft"], arms["together"].tokens_per_s if "together" in arms else math.nan
        lines.append(
            [dtype, str(adapters), f"{count} x {tokens}", f"{peft.ms_p50:.3g}", f"{peft.aa_spread:.1%}",
             f"{alone:.2f}", f"**{together:.2f}**", f"{peft.tokens_per_s:.0f}", f"{rate:.0f}"]
        )  # fmt: skip
    first = rows[0]
    header = ["base", "adapters", "tokens of each", "PEFT, ms", "A/A", "patched, one after another",
              "patched, together", "PEFT, tokens/s", "together, tokens/s"]  # fmt: skip
    text = (
        f"Time of a training step of every adapter over PEFT's, which trains one after another (it refuses a mixed "
        f"batch in training): {first.layers} Llama layers, d = {first.hidden}, r = {first.r}, medians. {origin}"
    )
    return f"{text}\n\n{grid_table(header, lines)}\n"
