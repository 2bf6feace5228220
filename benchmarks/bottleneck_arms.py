"""The arms of the benchmark of bottleneck_adapter: bottleneck.py says what each is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import peft_kernels
from benchmarks import hopper
from benchmarks.runs import Arm, NotHere, arms_of, kernels
from peft_kernels.ops.common.in_place import call_in_place

NAME = "bottleneck_adapter"
ARMS = ("eager", "compiled", "adapterhub", "widened", "op")
SCALING = 4.0


@dataclass(frozen=True)
class Cell:
    """M rows through a block [d -> f -> d] with `adapters` of bottleneck E, taking turns at the rows."""

    dtype: torch.dtype
    d: int
    f: int
    E: int
    M: int
    adapters: int
    direction: str  # "training" (of one adapter) or "inference"

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.d} x {self.f} E={self.E} M={self.M} {self.adapters} adapters {self.direction}"


class Problem:
    """x [M, d], the block's weights, and the factors of every adapter: (A, a, B, b)."""

    def __init__(self, cell: Cell, device: torch.device):
        def random(*shape, scale=1.0):
            return torch.randn(shape, device=device).mul_(scale).to(cell.dtype)

        d, f, E = cell.d, cell.f, cell.E
        self.cell, self.device = cell, device
        self.training = cell.direction == "training"
        self.x, self.dy = random(cell.M, d).requires_grad_(self.training), random(cell.M, d)
        self.gate, self.up = random(f, d, scale=d**-0.5), random(f, d, scale=d**-0.5)
        self.down = random(d, f, scale=f**-0.5)
        self.adapters = [
            tuple(t.requires_grad_(self.training) for t in (
                random(E, d, scale=d**-0.5), random(E), random(d, E, scale=E**-0.5), random(d)))
            for _ in range(cell.adapters)
        ]  # fmt: skip
        self.ids = torch.arange(cell.M, device=device) % cell.adapters

    def ffn(self, x: Tensor) -> Tensor:
        hidden = functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up)
        return functional.linear(hidden, self.down)

    def step(self, forward: Callable[[Tensor], Tensor], parameters: tuple[Tensor, ...]) -> Callable[[], object]:
        """What is timed: the output, or the gradients too."""
        if not self.training:
            return torch.no_grad()(lambda: forward(self.x))
        return lambda: torch.autograd.grad(forward(self.x), (self.x, *parameters), self.dy)


def _bottleneck(x: Tensor, A: Tensor, a: Tensor, B: Tensor, b: Tensor) -> Tensor:
    return functional.linear(functional.relu(functional.linear(x, A, a)), B, b) * SCALING


def _eager_forward(problem: Problem) -> Callable[[Tensor], Tensor]:
    if problem.cell.adapters == 1:
        return lambda x: problem.ffn(x) + _bottleneck(x, *problem.adapters[0])

    rows_of = [(problem.ids == i).nonzero()[:, 0] for i in range(problem.cell.adapters)]

    def looped(x):
        y = problem.ffn(x)
        for rows, adapter in zip(rows_of, problem.adapters, strict=True):
            y.index_add_(0, rows, _bottleneck(x[rows], *adapter))
        return y

    return looped


def _eager(problem: Problem) -> list[Arm]:
    return [Arm("eager", "torch", problem.step(_eager_forward(problem), problem.adapters[0]))]


def _compiled(problem: Problem) -> list[Arm]:
    if problem.cell.adapters > 1:
        raise NotHere("a loop over adapters, whose rows it reads, is no graph")
    compiled = torch.compile(_eager_forward(problem), dynamic=False)
    return [Arm("compiled", "inductor", problem.step(compiled, problem.adapters[0]))]


def _adapterhub(problem: Problem) -> list[Arm]:
    try:
        from adapters import ParBnConfig
        from adapters.methods.modeling import ParallelAdapter
    except Exception as error:  # it needs a transformers of its own, and fails in many ways beside another
        raise NotHere(f"AdapterHub cannot be imported: {type(error).__name__}: {error}") from error
    if problem.cell.adapters > 1:
        raise NotHere("its BatchSplit is a loop as well, and needs a whole model")
    config = ParBnConfig(reduction_factor=problem.cell.d / problem.cell.E, scaling=SCALING)
    module = ParallelAdapter("a", problem.cell.d, problem.cell.E, config).to(problem.device, problem.cell.dtype)
    forward = lambda x: problem.ffn(x) + module(x, None)[0]  # noqa: E731
    return [Arm("adapterhub", "adapterhub", problem.step(forward, tuple(module.parameters())))]


def _widened(problem: Problem) -> list[Arm]:
    cell = problem.cell
    if problem.training or cell.adapters > 1:
        raise NotHere("widening is for inference of one set of adapters")
    from transformers import LlamaConfig, LlamaModel

    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"hidden_size": cell.d, "intermediate_size": cell.f, "num_hidden_layers": 1, "vocab_size": 8}
    config = LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with problem.device:
        model = LlamaModel(config).to(cell.dtype).eval()
    peft_kernels.attach(model, peft_kernels.BottleneckConfig.parallel(r=cell.E, scaling=SCALING), "a")
    block = model.layers[0].mlp
    for name in ("gate", "up", "down"):
        block.get_submodule(f"{name}_proj").weight = nn.Parameter(getattr(problem, name))
    adapter = block.bottleneck["a"]
    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    for name, tensor in zip(names, problem.adapters[0], strict=True):
        setattr(adapter, name, nn.Parameter(tensor))
    peft_kernels.widen(model)
    return [Arm("widened", "peft_kernels", problem.step(block, ()))]


def _op(problem: Problem) -> list[Arm]:
    made = _one(problem) if problem.cell.adapters == 1 else _pooled(problem)
    if not made:
        raise NotHere(f"no backend but the reference is linked for {problem.device.type}")
    return hopper.beside(made, problem.device)


def _one(problem: Problem) -> list[Arm]:
    A, a, B, b = problem.adapters[0]
    numbers = ("relu", SCALING, "none", 1e-5, 0.0, "bottleneck", None)
    return [
        Arm("op", name, problem.step(
            lambda x, op=op: op(x, problem.ffn(x), A, a, B, b, None, None, None, None, *numbers)[0], (A, a, B, b)))
        for name, op in kernels(NAME, problem.device)
    ]  # fmt: skip


def _pooled(problem: Problem) -> list[Arm]:
    cell = problem.cell
    pool = peft_kernels.AdapterPool(
        {"ffn": peft_kernels.Site(cell.d, cell.d)}, cell.adapters, cell.dtype, problem.device
    )
    for i, (A, a, B, b) in enumerate(problem.adapters):
        entry = peft_kernels.SiteAdapter(A, B, SCALING, b, activation="relu", down_bias=a)
        pool.add(f"a{i}", {"ffn": entry})
    slots = pool.ids([f"a{i}" for i in problem.ids.tolist()])
    route = torch.ops.peft_kernels.batched_lora_route.default(slots, pool.slots)
    pages_in, *rest = pool.tables("ffn")

    def forward(x, op):
        y = problem.ffn(x)
        call_in_place(op, [y], x, route, pages_in, *([part] for part in rest))
        return y

    return [
        Arm("op", name, problem.step(lambda x, op=op: forward(x, op), ()))
        for name, op in kernels("batched_lora_", problem.device)
    ]


_MAKERS = {"eager": _eager, "compiled": _compiled, "adapterhub": _adapterhub, "widened": _widened, "op": _op}


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """The block twice and the arms of the given kinds; and for each contender that cannot be here, why."""
    problem = Problem(cell, device)
    base = [Arm(name, "torch", problem.step(problem.ffn, ())) for name in ("ffn", "ffn_again")]
    arms, left_out = arms_of(problem, _MAKERS, kinds)
    return base + arms, left_out
