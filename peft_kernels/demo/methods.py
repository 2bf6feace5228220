"""Methods side by side on the demo's domains, at one budget of trainable parameters.

The comparison of He et al. 2022 (arXiv:2110.04366, section 4): parallel against serial, the FFN against attention, and
scaling. The budget is what LoRA of a rank trains on every linear layer; r and E of the others are the integers that
come nearest to it:

    LoRA     r (K + N), summed over its layers
    adapter  2 K E + E + K, summed over its blocks

Batches, seed and functional form (ReLU; A as in nn.Linear, B = 0) are the same for all. The learning rate is, for each
method, the better of two on a text that is none of the domains (METHODS): with one for all, a larger s would win by its
larger steps alone. They take turns step by step and the first one changes, as in comparison.py. That the
ops compute what they should is for the tests.
"""

import copy
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM

import peft_kernels
from peft_kernels import BottleneckConfig, PrefixTuningConfig
from peft_kernels.demo import task
from peft_kernels.demo.comparison import WARM_UP, Arm, Lora
from peft_kernels.demo.corpus import Text
from peft_kernels.integrations.attachments import tensors_of

ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class PatchedLora(Lora):
    """LoRA by PEFT, run by the kernels."""

    @property
    def width(self) -> int:
        return self.rank

    def attach(self, base: nn.Module) -> nn.Module:
        model = super().attach(base)
        peft_kernels.patch(model)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder, save_embedding_layers=False)

    def reload(self, base: Path, adapter: Path, device: torch.device) -> nn.Module:
        model = super().reload(base, adapter, device)
        peft_kernels.patch(model)
        return model

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What is saved of a model."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Attached:
    """Adapters of our own: bottlenecks at blocks of the model, or prefixes in its attention."""

    config: BottleneckConfig | PrefixTuningConfig
    learning_rate: float

    @property
    def width(self) -> int:
        """E, or P."""
        prefix = isinstance(self.config, PrefixTuningConfig)
        return self.config.num_virtual_tokens if prefix else self.config.r

    def attach(self, base: nn.Module) -> nn.Module:
        """A copy of the base model with fresh adapters; draws from torch's generator."""
        model = copy.deepcopy(base)
        peft_kernels.attach(model, self.config)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        peft_kernels.save_pretrained(model, folder)

    def reload(self, base: Path, adapter: Path, device: torch.device) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(base).to(device)
        peft_kernels.load(model, adapter, trainable=True)
        return model

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What is saved of a model; of a prefix, what its MLP gives."""
        return tensors_of(model, "default")


Method = PatchedLora | Attached


def _bottleneck(
    insertion: str, representation: str, learning_rate: float, scaling: float = 1.0
) -> Callable[[int], Attached]:
    def of_width(E: int) -> Attached:
        config = BottleneckConfig(r=E, insertion=insertion, representation=representation, scaling=scaling, init="mam")
        return Attached(config, learning_rate)

    return of_width


# Of a rank r or a bottleneck E; the first one sets the budget. At the right: bits per byte after 16 steps on the code
# tables, with learning rates of 3e-3 and 1e-2.
METHODS: dict[str, Callable[[int], Method]] = {
    "LoRA": PatchedLora,  # 2.78, 2.91
    "LoRA, attention": lambda r: PatchedLora(r, targets=ATTENTION),  # 2.95, 3.39
    "LoRA, FFN": lambda r: PatchedLora(r, targets=FFN),  # 2.97, 3.09
    "serial, FFN (Pfeiffer)": _bottleneck("serial", "ffn", 1e-2),  # 3.27, 3.19
    "serial, both (Houlsby)": _bottleneck("serial", "both", 3e-3),  # 3.15, 3.19
    "parallel, attention": _bottleneck("parallel", "attention", 1e-2),  # 3.26, 2.98
    "parallel, FFN": _bottleneck("parallel", "ffn", 1e-2),  # 3.59, 3.22
    "parallel, FFN, s = 4": _bottleneck("parallel", "ffn", 3e-3, 4.0),  # 3.14, 3.38
}
CLAIMS = (  # of the paper: in words, the better method, the other one
    ("parallel beats serial", "parallel, FFN", "serial, FFN (Pfeiffer)"),
    ("the FFN beats attention with parallel adapters", "parallel, FFN", "parallel, attention"),
    ("the FFN beats attention with LoRA", "LoRA, FFN", "LoRA, attention"),
    ("s = 4 beats s = 1", "parallel, FFN, s = 4", "parallel, FFN"),
)
SERVED = {"serial": "serial, FFN (Pfeiffer)", "parallel": "parallel, FFN", "scaled": "parallel, FFN, s = 4"}


@dataclass
class Trained:
    """One method on one domain."""

    domain: str
    method: str
    budget: int  # parameters of the first method
    parameters: int  # of this one
    width: int  # r, E or P
    learning_rate: float
    steps: int
    bits_before: float
    bits_after: float = float("nan")
    step_ms: float = float("nan")  # median
    ratio: float = float("nan")  # of the step time to the first method's
    losses: list[float] = field(default_factory=list)
    step_times_ms: list[float] = field(default_factory=list)
    adapter: str = ""  # folder
    problems: list[str] = field(default_factory=list)


@dataclass
class Claim:
    """What the paper says of two methods, and by how many bits per byte it is so: on each domain, at each budget."""

    words: str
    gains: list[float]


def compare(
    methods: dict[str, Method], text: Text, base: nn.Module, size: task.Size, seed: int, folder: Path, tick: Callable
) -> list[Trained]:
    """Trains every method on one domain. Calls `tick(loss)` after every step of each.

    `folder` has the base model under `base`; the adapters go into `adapters`. A method must end below where it began:
    LoRA and bottlenecks at the base model, a prefix that is no no-op where its start leads. Whether that passes the
    base model in so few steps is measured, not asked.
    """
    device = next(base.parameters()).device

    def fresh(method: Method) -> nn.Module:
        torch.manual_seed(seed)
        return method.attach(base)

    arms = {name: Arm(fresh(method), method.learning_rate) for name, method in methods.items()}
    names, rows = list(arms), replace(size, batch=size.method_batch)
    for index, batch in enumerate(task.batches(text.train, rows, size.method_steps, seed + 1, device)):
        first = index % len(names)
        for name in (*names[first:], *names[:first]):
            arms[name].step(batch)
            tick(arms[name].losses[-1])
    before = task.held_out_bits(base, text, size, device)
    counts = {name: trainable(arm.model) for name, arm in arms.items()}
    found = []
    for name, arm in arms.items():
        timed = arm.seconds[min(WARM_UP, len(arm.seconds) - 1) :]
        found.append(
            Trained(
                domain=text.name,
                method=name,
                budget=counts[names[0]],
                parameters=counts[name],
                width=methods[name].width,
                learning_rate=methods[name].learning_rate,
                steps=size.method_steps,
                bits_before=before,
                bits_after=task.held_out_bits(arm.model, text, size, device),
                step_ms=1e3 * statistics.median(timed),
                losses=arm.losses,
                step_times_ms=[1e3 * seconds for seconds in arm.seconds],
            )
        )
        found[-1].ratio = found[-1].step_ms / found[0].step_ms
        _judge(found[-1], methods[name], arm.model, text, size, folder)
        began = before
        if isinstance(methods[name], Attached) and isinstance(methods[name].config, PrefixTuningConfig):
            began = task.held_out_bits(fresh(methods[name]), text, size, device)
        if not found[-1].bits_after < began:  # so that NaN is a problem
            said = f"it did not improve on the held-out text: {began:.3f} to {found[-1].bits_after:.3f} bits"
            found[-1].problems.append(said)
    return found


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fitted(base: nn.Module, rank: int) -> dict[str, Method]:
    """The methods with about as many parameters as the first one has at a rank. They are linear in r or E."""
    (first, reference), *others = METHODS.items()
    budget = trainable(reference(rank).attach(base))
    found = {first: reference(rank)}
    for name, of_width in others:
        one, two = (trainable(of_width(width).attach(base)) for width in (1, 2))
        found[name] = of_width(max(1, 1 + round((budget - one) / (two - one))))
    return found


def _judge(found: Trained, method: Method, model: nn.Module, text: Text, size: task.Size, folder: Path) -> None:
    """Saves the adapter and reads it again: the same weights and, from the same kernels, the same logits."""
    device = next(model.parameters()).device
    slug = "-".join(re.findall("[a-z0-9]+", f"{found.domain} {found.method} {found.width}".lower()))
    found.adapter = f"adapters/methods/{slug}"
    method.save(model, folder / found.adapter)
    loaded = method.reload(folder / "base", folder / found.adapter, device)
    before, after = (method.tensors(each) for each in (model, loaded))
    ids = text.held_out[: size.window].long().unsqueeze(0).to(device)
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        found.problems.append("the adapter that is loaded is not the one that was saved")
    elif not torch.equal(*(_logits(each, ids) for each in (model, loaded))):
        found.problems.append("after a reload its logits are others")


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    return model(input_ids=ids, use_cache=False).logits


def claims(trained: list[Trained]) -> list[Claim]:
    """What of the paper's findings is so here."""
    bits = {(t.domain, t.budget, t.method): t.bits_after for t in trained}
    cells = dict.fromkeys((t.domain, t.budget) for t in trained)
    return [
        Claim(words, [bits[*cell, worse] - bits[*cell, better] for cell in cells]) for words, better, worse in CLAIMS
    ]
