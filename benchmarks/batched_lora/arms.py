"""The arms of a cell: one batch through the same projections with the same adapters, computed by each contender.

Two kinds: `y = x W^T` and the adapters' part, which is what a layer does; and, named "... alone", the adapters' part
onto a y that is there. All arms of a cell share x, weights and factors: the clock empties the caches between them.
On a GPU a step goes through several such layers with their own weights, one behind another as in a model: a single one
takes no more than a few times what an event resolves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

import peft_kernels
from benchmarks import arms as layer_arms
from benchmarks import hopper
from benchmarks.batched_lora.cells import Cell
from benchmarks.peers import sglang, vllm
from benchmarks.peers.serving import batch_of
from benchmarks.runs import NotHere, arms_of
from peft_kernels import backends, registry
from peft_kernels.ops.common.in_place import call_in_place
from peft_kernels.registry import Cost

SCALING = 2.0
MOST_GATHERED = 1 << 30  # bytes of copies of factors that an arm may make

# Kinds of arm: HF PEFT's mixed batch; torch.bmm over gathered factors; torch's grouped product over sorted rows; a
# weight with the one adapter merged in, where all rows have the same; SGLang's two ways and vLLM's; ours; sorting the
# rows, once for a whole model.
COMPUTING = ("peft", "gather_bmm", "grouped_mm", "merged", *sglang.NAMES, *vllm.NAMES, "op")
ARMS = (*COMPUTING, "route")


@dataclass(frozen=True, eq=False)
class Arm:
    """`run()` gives a y for each projection; `cost` is the least that its work moves and computes."""

    name: str
    backend: str
    run: Callable[[], object]
    cost: Cost


class Problem:
    """x [M, K], weights [N_g, K], the factors of every adapter at every projection; a pool that holds them."""

    def __init__(self, cell: Cell, device: torch.device):
        def random(*shape, scale):
            return torch.randn(shape, device=device).mul_(scale).to(cell.dtype)

        self.cell, self.device = cell, device
        self.x = random(cell.M, cell.K, scale=1.0)
        self.weight = [random(n, cell.K, scale=cell.K**-0.5) for n in cell.N]
        ranks = [cell.rank(i) for i in range(cell.adapters)]
        self.factors = [
            [(random(r, cell.K, scale=cell.K**-0.5), random(n, r, scale=r**-0.5)) for n in cell.N] for r in ranks
        ]
        self.adapter = cell.ids()
        sites = {f"p{g}": peft_kernels.Site(cell.K, n) for g, n in enumerate(cell.N)}
        self.pool = peft_kernels.AdapterPool(sites, cell.adapters, cell.dtype, device)
        for i, parts in enumerate(self.factors):
            self.pool.add(f"a{i}", {f"p{g}": (a, b, SCALING, None) for g, (a, b) in enumerate(parts)})
        self.names = [None if i < 0 else f"a{i}" for i in self.adapter.tolist()]
        self.ids = self.pool.ids(self.names)

    def base(self) -> list[Tensor]:
        return [functional.linear(self.x, weight) for weight in self.weight]

    def arguments(self) -> tuple:
        """Of batched_lora_, all but y."""
        tables = [self.pool.tables(site) for site in self.pool.sites]
        route = torch.ops.peft_kernels.batched_lora_route.default(self.ids, self.pool.slots)
        lists = ([getattr(t, name) for t in tables] for name in ("pages_out", "table", "scaling", "down_bias"))
        return self.x, route, tables[0].pages_in, *lists

    def padded(self) -> tuple[Tensor, list[Tensor]]:
        """Factors of all adapters, zeros up to the largest rank: A of all projections [L, G R, K], B [L, N_g, R]."""
        most, G = max(a.shape[0] for parts in self.factors for a, _ in parts), len(self.weight)
        cell = self.cell
        a_all = self.x.new_zeros(cell.adapters, G * most, cell.K)
        b_all = [self.x.new_zeros(cell.adapters, n, most) for n in cell.N]
        for i, parts in enumerate(self.factors):
            for g, (a, b) in enumerate(parts):
                a_all[i, g * most : g * most + len(a)] = a
                b_all[g][i, :, : b.shape[1]] = b
        return a_all, b_all

    def base_cost(self) -> Cost:
        M, K, N, size = self.cell.M, self.cell.K, sum(self.cell.N), self.cell.dtype.itemsize
        return Cost(2 * M * K * N, size * (M * K + N * K + M * N))

    def adapters_cost(self) -> Cost:
        return registry.ops()["batched_lora_"].cost(self.base(), *self.arguments())["forward"]


def copies(cell: Cell, device: torch.device) -> int:
    """How many layers a step goes through."""
    return layer_arms.copies(cell.dtype.itemsize * cell.K * sum(cell.N), device)


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """Both base arms and the arms of the given kinds; and for each contender that cannot be here, why.

    Their costs are those of one layer.
    """
    made = [_of_one_layer(cell, device, kinds) for _ in range(copies(cell, device))]
    arms, left_out = made[0]
    if len(made) > 1:
        behind = zip(*(arms for arms, _ in made), strict=True)
        arms = [Arm(each[0].name, each[0].backend, _one_by_one(each), each[0].cost) for each in behind]
    return arms, left_out


def _of_one_layer(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    problem = Problem(cell, device)
    base = [Arm(name, "torch", problem.base, problem.base_cost()) for name in ("base", "base_again")]
    arms, left_out = arms_of(problem, _MAKERS, kinds)
    return base + arms, left_out


def _one_by_one(arms: tuple[Arm, ...]) -> Callable[[], object]:
    return lambda: [arm.run() for arm in arms]


def _with_base(problem: Problem, name: str, backend: str, add: Callable[[list[Tensor]], object]) -> list[Arm]:
    """`add(y)` adds the adapters' part in place: on top of the base, and alone."""
    base, adapters, y = problem.base_cost(), problem.adapters_cost(), problem.base()

    def whole():
        out = problem.base()
        add(out)
        return out

    def alone():
        add(y)
        return y

    # y is written by the base and neither read again nor written twice in the least that both together need
    both = Cost(base.flops + adapters.flops, base.bytes + _factor_bytes(problem, adapters))
    return [Arm(name, backend, whole, both), Arm(f"{name} alone", backend, alone, adapters)]


def _factor_bytes(problem: Problem, adapters: Cost) -> int:
    cell = problem.cell
    rows = int((problem.adapter >= 0).sum())
    return adapters.bytes - cell.dtype.itemsize * rows * (cell.K + 2 * sum(cell.N))


def _op(problem: Problem) -> list[Arm]:
    arguments, made = problem.arguments(), []
    for backend in backends.linked("batched_lora_", problem.device.type):
        if backend != "reference":
            op = getattr(torch.ops, f"peft_kernels_{backend}").batched_lora_.default
            made += _with_base(problem, "op", backend, lambda y, op=op: call_in_place(op, y, *arguments))
    if not made:
        raise NotHere(f"no backend but the reference is linked for {problem.device.type}")
    return hopper.beside(made, problem.device)


def _route(problem: Problem) -> list[Arm]:
    route = torch.ops.peft_kernels.batched_lora_route.default
    ids, slots = problem.ids, problem.pool.slots
    least = Cost(0, 4 * (ids.numel() + route(ids, slots).numel()))
    return [Arm("route", backends.bound(problem.device.type), lambda: route(ids, slots), least)]


def _peft(problem: Problem) -> list[Arm]:
    if problem.device.type == "cuda":
        raise NotHere("its mixed batch copies indices from the host in every call, which no CUDA graph takes")
    try:
        from peft import LoraConfig, get_peft_model
    except Exception as error:  # a PEFT beside a transformers that it does not fit fails in many ways
        raise NotHere(f"PEFT cannot be imported: {type(error).__name__}: {error}") from error
    linears = [nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in problem.weight]
    for linear, weight in zip(linears, problem.weight, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    targets = [str(g) for g in range(len(linears))]
    model = None
    for i, parts in enumerate(problem.factors):
        r = len(parts[0][0])
        config = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=targets)
        if model is None:
            model = get_peft_model(nn.Sequential(*linears), config, f"a{i}", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
        for layer, (a, b) in zip(model.base_model.model, parts, strict=True):
            layer.lora_A[f"a{i}"].weight.data = a
            layer.lora_B[f"a{i}"].weight.data = b
    layers = list(model.eval().base_model.model)
    names = [name or "__base__" for name in problem.names]
    cost = _with_base(problem, "", "", lambda y: None)[0].cost
    return [Arm("peft", "peft", lambda: [layer(problem.x, adapter_names=names) for layer in layers], cost)]


def _gather_bmm(problem: Problem) -> list[Arm]:
    a_all, b_all = problem.padded()
    copied = problem.cell.M * (a_all[0].nbytes + sum(b[0].nbytes for b in b_all))
    if copied > MOST_GATHERED:
        raise NotHere(f"it would gather {copied / 1e9:.1f} GB of copies of factors")
    R, x = b_all[0].shape[2], problem.x
    ids = problem.adapter.clamp(min=0).to(problem.device)
    scaling = torch.where(problem.adapter >= 0, SCALING, 0.0).to(problem.device, x.dtype)[:, None]

    def add(y):
        h = torch.bmm(a_all[ids], x[:, :, None])  # [M, G R, 1]
        for g, (out, b) in enumerate(zip(y, b_all, strict=True)):
            out.addcmul_(torch.bmm(b[ids], h[:, g * R : (g + 1) * R])[:, :, 0], scaling)

    return _with_base(problem, "gather_bmm", "torch", add)


def _grouped_mm(problem: Problem) -> list[Arm]:
    """The rows are sorted before, as the route is made before."""
    if not hasattr(functional, "grouped_mm"):
        raise NotHere("this torch has no grouped_mm")
    a_all, b_all = problem.padded()
    a_all, b_all, R = a_all.mT, [b.mT for b in b_all], b_all[0].shape[2]
    order = problem.adapter.argsort(stable=True)
    order = order[problem.adapter[order] >= 0]
    counts = torch.bincount(problem.adapter[order], minlength=problem.cell.adapters)
    order, offsets = order.to(problem.device), counts.cumsum(0).to(problem.device, torch.int32)

    def add(y):
        h = functional.grouped_mm(problem.x[order], a_all, offs=offsets)  # [rows, G R]
        for g, (out, b) in enumerate(zip(y, b_all, strict=True)):
            delta = functional.grouped_mm(h[:, g * R : (g + 1) * R].contiguous(), b, offs=offsets)
            out.index_add_(0, order, delta, alpha=SCALING)

    return _with_base(problem, "grouped_mm", "torch", add)


def _merged(problem: Problem) -> list[Arm]:
    present = problem.adapter.unique().tolist()
    if len(present) != 1 or present[0] < 0:
        raise NotHere("no one weight serves rows of several adapters")
    merged = [
        torch.addmm(weight, b, a, alpha=SCALING)
        for weight, (a, b) in zip(problem.weight, problem.factors[present[0]], strict=True)
    ]
    return [Arm("merged", "torch", lambda: [functional.linear(problem.x, w) for w in merged], problem.base_cost())]


@cache
def _serving(module: ModuleType, device: torch.device) -> dict[str, Callable] | str:
    """A serving engine's kernels, or why they cannot be here."""
    try:
        return module.load(device)
    except ImportError as error:
        return str(error)


def _engine(module: ModuleType, name: str, problem: Problem) -> list[Arm]:
    """An engine's own layer: one product for all projections, whose outputs lie side by side."""
    found = _serving(module, problem.device)
    if isinstance(found, str):
        raise NotHere(found)
    cell = problem.cell
    if cell.dtype.itemsize != 2:
        raise NotHere("its kernels are for 16 bits")
    if problem.device.type == "cuda" and (cell.popularity, cell.r, cell.M <= 256) != ("distinct", "16", True):
        raise NotHere("compiled anew for every shape, it is timed for at most 256 rows of distinct adapters of r = 16")
    batch = batch_of(problem.factors, problem.ids, SCALING)
    add, x, weight = found[name](batch), problem.x, torch.cat(problem.weight)
    y = functional.linear(x, weight)

    def pieces(out):
        return list(out.split([len(w) for w in problem.weight], 1))

    cost = _with_base(problem, "", "", lambda y: None)[0].cost
    whole = Arm(name, "peer", lambda: pieces(add(x, lambda: functional.linear(x, weight))), cost)
    return [whole, Arm(f"{name} alone", "peer", lambda: pieces(add(x, lambda: y)), problem.adapters_cost())]


_MAKERS = {
    "peft": _peft,
    "gather_bmm": _gather_bmm,
    "grouped_mm": _grouped_mm,
    "merged": _merged,
    **{name: partial(_engine, sglang, name) for name in sglang.NAMES},
    **{name: partial(_engine, vllm, name) for name in vllm.NAMES},
    "op": _op,
    "route": _route,
}
