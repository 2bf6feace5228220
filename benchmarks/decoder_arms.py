"""The arms of the benchmark of whole decoder layers: decoder.py says what each is.

Weights and tokens are random; the words are few, so that what is timed is the layers. All arms share the base's
weights: a step reads more of them than any cache holds.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peft_kernels
from benchmarks import gate, hopper, runs
from benchmarks.peers import axolotl, unsloth
from benchmarks.peers.layers import put_into
from benchmarks.runs import NotHere
from peft_kernels import backends

WORDS = 1024
SCALING = 2.0
TRAINING_ARMS = ("peft", "peft_narrow", "unsloth", "axolotl", "patched_narrow", "patched")
ARMS = (*TRAINING_ARMS, "pool")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Cell:
    """B rows of S tokens behind T in a cache, through `layers` layers of a Llama with LoRA of rank r on all linears."""

    dtype: torch.dtype  # of the base
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    B: int
    S: int
    T: int
    r: int
    p: str  # of dropout
    adapters: int
    step: str  # "training" or "decoding"

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{dtype} {self.layers} layers of {self.hidden} x {self.intermediate} r={self.r}"
        if self.step == "training":
            return f"{sizes} training {self.B} x {self.S} tokens p={self.p}"
        return f"{sizes} decoding {self.B} rows T={self.T} {self.adapters} adapters"


@dataclass(frozen=True, eq=False)
class Arm(runs.Arm):
    """A contender; of one that trains, what it keeps for its backward can be counted."""

    adapter_dtype: str
    forward: Callable[[], Tensor] | None  # the loss
    parameters: tuple[Tensor, ...]


def base_model(cell: Cell, device: torch.device) -> nn.Module:
    """The layers between few words and few logits, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=cell.hidden,
        intermediate_size=cell.intermediate,
        num_hidden_layers=cell.layers,
        num_attention_heads=cell.heads,
        num_key_value_heads=cell.key_value_heads,
        max_position_embeddings=cell.T + cell.S,
        initializer_range=cell.hidden**-0.5,
        use_cache=False,
    )
    with device:
        return LlamaForCausalLM(config).to(cell.dtype).requires_grad_(False)


def same_tensors(model: nn.Module) -> nn.Module:
    """The model again, with the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


# -- training ---------------------------------------------------------------------------------------------------------


class Training:
    """Embedded tokens [B, S, hidden], which want a gradient, their labels, and the values of one adapter."""

    def __init__(self, cell: Cell, device: torch.device):
        self.cell, self.device = cell, device
        self.model = base_model(cell, device).train()
        self.tokens = torch.randint(WORDS, (cell.B, cell.S), device=device)
        self.embedded = self.model.get_input_embeddings()(self.tokens).detach().requires_grad_()
        self.made: dict[bool, nn.Module] = {}
        self.values: list[Tensor] = []

    def arm(self, name: str, backend: str, model: nn.Module, adapter_dtype: str) -> Arm:
        trained = tuple(p for p in model.parameters() if p.requires_grad)

        def forward():
            return model(inputs_embeds=self.embedded, labels=self.tokens, use_cache=False).loss

        def run():
            loss = forward()
            return loss.detach(), *torch.autograd.grad(loss, (*trained, self.embedded))

        return Arm(name, backend, run, adapter_dtype, forward, tuple(model.parameters()))

    def base(self, name: str) -> Arm:
        return self.arm(name, "torch", self.model, "")

    def adapted(self, *, narrow: bool) -> nn.Module:
        """The base with PEFT's adapter: fp32, which is its default, or `narrow`, in the base's dtype; equal values."""
        from peft import LoraConfig, get_peft_model

        if narrow and self.cell.dtype is torch.float32:
            raise NotHere("adapters in fp32 are in the base's dtype here")
        if narrow not in self.made:
            config = LoraConfig(
                r=self.cell.r,
                lora_alpha=SCALING * self.cell.r,
                lora_dropout=float(self.cell.p),
                target_modules=list(LINEARS),
            )
            model = get_peft_model(same_tensors(self.model), config, autocast_adapter_dtype=not narrow).train()
            factors = [p for p in model.parameters() if p.requires_grad]
            self.values = self.values or [_factor(p, self.cell, self.device) for p in factors]
            for parameter, value in zip(factors, self.values, strict=True):
                parameter.data.copy_(value)
            self.made[narrow] = model
        return self.made[narrow]

    def dtype_of(self, *, narrow: bool) -> str:
        return str(self.cell.dtype if narrow else torch.float32).removeprefix("torch.")

    def peft(self, *, narrow: bool) -> list[Arm]:
        name = "peft_narrow" if narrow else "peft"
        return [self.arm(name, "peft", self.adapted(narrow=narrow), self.dtype_of(narrow=narrow))]

    def patched(self, *, narrow: bool) -> list[Arm]:
        model = same_tensors(self.adapted(narrow=narrow))
        peft_kernels.patch(model, strict=True)
        name = "patched_narrow" if narrow else "patched"
        return [self.arm(name, backends.bound(self.device.type), model, self.dtype_of(narrow=narrow))]

    def peer(self, module) -> list[Arm]:
        """PEFT's model whose linear layers compute through a peer's functions; what is wider they would round."""
        try:
            functions = module.layer_functions(self.device)
        except ImportError as error:
            raise NotHere(str(error)) from error
        narrow = self.cell.dtype is not torch.float32
        model = same_tensors(self.adapted(narrow=narrow))
        put_into(model.base_model.model.model.layers, functions, float(self.cell.p))
        return [self.arm(module.NAME, "peer", model, self.dtype_of(narrow=narrow))]


def _factor(parameter: Tensor, cell: Cell, device: torch.device) -> Tensor:
    """Values that both dtypes have: lora_A [r, K] or lora_B [N, r], which is not zero, so that no gradient is."""
    scale = parameter.shape[1] ** -0.5 * (1 if parameter.shape[0] == cell.r else 0.25)
    return torch.randn(parameter.shape, device=device).mul_(scale).to(cell.dtype)


# -- decoding ---------------------------------------------------------------------------------------------------------


class Decoding:
    """A token for each of B rows, behind T in a cache; a pool with every adapter on every linear layer."""

    def __init__(self, cell: Cell, device: torch.device):
        self.cell, self.device = cell, device
        self.model = base_model(cell, device).eval()
        self.tokens = torch.randint(WORDS, (cell.B, 1), device=device)
        self.cache = _filled_cache(cell, device)
        self.held = contextlib.ExitStack()  # the adapters of the rows are pinned as long as the problem lives

    def arm(self, name: str, backend: str, model: nn.Module, adapter_dtype: str = "") -> Arm:
        """The logits of the next token. The last place of the cache is written by every step."""

        def run():
            return model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True).logits

        return Arm(name, backend, torch.no_grad()(run), adapter_dtype, None, ())

    def base(self, name: str) -> Arm:
        return self.arm(name, "torch", self.model)

    def pool(self) -> list[Arm]:
        """Through a runner, whose route is made once in a step; rows take turns at the adapters.

        Raises gate.RedGateError where the rows of the first adapter are not those of the model with it merged in.
        """
        cell, model = self.cell, same_tensors(self.model)
        pool = peft_kernels.attach_pool(model, adapters=cell.adapters)
        sites = {name: site for name, site in pool.sites.items() if name.endswith(LINEARS)}
        adapters = {f"a{i}": {name: self._factors(site) for name, site in sites.items()} for i in range(cell.adapters)}
        pool.reserve(cell.adapters, cell.r, sites)
        for name, factors in adapters.items():
            pool.add(name, factors)
        runner = peft_kernels.Runner(model)
        # What a runner does before a call, once: a graph of one's own has only the call in it.
        self.held.enter_context(runner._rows_of([f"a{i % cell.adapters}" for i in range(cell.B)], expand=1))
        backend = backends.bound(self.device.type)
        arm = self.arm("pool", backend, runner._model, str(cell.dtype).removeprefix("torch."))
        merged = self._merged(adapters["a0"])
        first = [runs.Arm(a.name, a.backend, lambda a=a: a.run()[:: cell.adapters]) for a in (arm, merged)]
        for reason in runs.differing(first, cell.dtype, cell.layers).values():
            raise gate.RedGateError(f"{cell.title}: pool {backend} {reason}")
        return [arm]

    def _merged(self, factors: dict[str, tuple]) -> Arm:
        model = copy.deepcopy(self.model)
        for name, (lora_A, lora_B, scaling, _) in factors.items():
            weight = model.get_submodule(name).weight
            weight.data.addmm_(lora_B, lora_A, alpha=scaling)
        return self.arm("the merged model", "torch", model)

    def _factors(self, site) -> tuple[Tensor, Tensor, float, None]:
        def random(*shape, scale):
            return torch.randn(shape, device=self.device).mul_(scale).to(self.cell.dtype)

        r = self.cell.r
        return random(r, site.K, scale=site.K**-0.5), random(site.N, r, scale=0.25 * r**-0.5), SCALING, None


def _filled_cache(cell: Cell, device: torch.device):
    """T random keys and values of every layer, and a place for one more, at addresses that stay.

    All places are always valid: no mask is needed, so that attention takes its fastest kernel in all arms.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class Filled(DynamicLayer):
        def __init__(self):
            super().__init__()
            shape = cell.B, cell.key_value_heads, cell.T + 1, cell.hidden // cell.heads
            self.dtype, self.device, self.is_initialized = cell.dtype, device, True
            self.keys, self.values = (torch.randn(shape, device=device).to(cell.dtype) for _ in range(2))

        def update(self, key_states, value_states, *args, **kwargs):
            self.keys[:, :, -1:] = key_states
            self.values[:, :, -1:] = value_states
            return self.keys, self.values

        def get_seq_length(self, *args):
            return cell.T

    return Cache(layers=[Filled() for _ in range(cell.layers)])


# -- both -------------------------------------------------------------------------------------------------------------

_TRAINING = {
    "peft": lambda problem: problem.peft(narrow=False),
    "peft_narrow": lambda problem: problem.peft(narrow=True),
    "unsloth": lambda problem: problem.peer(unsloth),
    "axolotl": lambda problem: problem.peer(axolotl),
    "patched_narrow": lambda problem: problem.patched(narrow=True),
    "patched": lambda problem: problem.patched(narrow=False),
}
_DECODING = {"pool": lambda problem: problem.pool()}


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """The base twice and the arms of the given kinds that are for this step; why the others cannot be here."""
    makers, kind = (_TRAINING, Training) if cell.step == "training" else (_DECODING, Decoding)
    problem = kind(cell, device)
    base = [problem.base(name) for name in ("frozen", "frozen_again")]
    arms, left_out = runs.arms_of(problem, makers, tuple(name for name in kinds if name in makers))
    return base + hopper.beside(arms, device), left_out
