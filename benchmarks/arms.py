"""The arms of a cell: the same projection with the same kind of adapter, computed by each contender.

Every arm owns its weight, as every layer of a model does: were it shared, each arm would find it in the cache that
the one before it has filled, and M = 1 would measure the cache.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import peft_kernels
from benchmarks import hopper, peers
from benchmarks.shapes import Cell, Variant

SCALING = 2.0  # lora_alpha = 2 r, as most recipes have it


@dataclass(frozen=True, eq=False)
class Arm:
    """`call(x)` is one forward; `parameters` are what it owns (weight first)."""

    name: str
    backend: str
    variant: Variant | None  # None: a frozen layer, which has no adapter
    call: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    behind: tuple["Arm", ...] = ()  # equal layers with weights of their own, which a graph goes through after it


MOST_COPIES, MOST_WEIGHTS, FEW_ROWS = 8, 1 << 29, 64


def copies(weight_bytes: int, device: torch.device) -> int:
    """How many layers a graph goes through where one takes not much more than events resolve."""
    return max(1, min(MOST_COPIES, MOST_WEIGHTS // weight_bytes)) if device.type == "cuda" else 1


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], list[str]]:
    """Both frozen arms and, for every variant, the arms of the given kinds; and a line for each that cannot be here."""
    count = copies(cell.dtype.itemsize * cell.K * cell.N, device) if cell.M <= FEW_ROWS else 1
    if count == 1:
        return _of_one_layer(cell, device, kinds)
    made = [_of_one_layer(cell, device, tuple(kind for kind in kinds if kind != "compiled")) for _ in range(count)]
    left_out = made[0][1] + ["compiled, of few rows: it would be compiled for every layer of a graph"] * (
        "compiled" in kinds
    )
    each = zip(*(arms for arms, _ in made), strict=True)
    return [dataclasses.replace(first, behind=tuple(rest)) for first, *rest in each], left_out


def _of_one_layer(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], list[str]]:
    arms = [_frozen(cell, device, name) for name in ("frozen", "frozen_again")]
    left_out = []
    without = _peft_missing()
    if without:
        left_out += [f"{kind}: {without}" for kind in kinds if kind in _NEED_PEFT]
        kinds = tuple(kind for kind in kinds if kind not in _NEED_PEFT)
    for variant in cell.variants:
        for kind in kinds:
            made, missing = _MAKERS[kind](cell, variant, device)
            arms += made
            left_out += missing
    return arms, list(dict.fromkeys(left_out))


@cache
def _peft_missing() -> str:
    """Why PEFT cannot be imported; empty where it can."""
    try:
        import peft  # noqa: F401
    except Exception as error:  # a PEFT beside a transformers that it does not fit fails in many ways
        return f"PEFT cannot be imported: {type(error).__name__}: {error}"
    return ""


def _frozen(cell: Cell, device: torch.device, name: str) -> Arm:
    layer = nn.Linear(cell.K, cell.N, bias=False, device=device, dtype=cell.dtype).requires_grad_(False)
    return Arm(name, "torch", None, layer, (layer.weight,))


def _peft_model(cell: Cell, variant: Variant, device: torch.device) -> nn.Module:
    """A PEFT model of one projection, in training mode; its lora_B is not zero, so that no gradient is."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(cell.K, cell.N, bias=False, device=device, dtype=cell.dtype))
    config = LoraConfig(r=cell.r, lora_alpha=SCALING * cell.r, lora_dropout=variant.p, target_modules=["0"])
    widened = variant.factor_dtype is not cell.dtype
    model = get_peft_model(base, config, autocast_adapter_dtype=widened).train()
    factors = _layer(model).lora_A["default"].weight, _layer(model).lora_B["default"].weight
    if any(factor.dtype is not variant.factor_dtype for factor in factors):
        raise AssertionError(f"PEFT made factors of {factors[0].dtype}, the cell asks for {variant.factor_dtype}")
    nn.init.normal_(factors[1], std=cell.r**-0.5)
    return model


def _layer(model: nn.Module) -> nn.Module:
    return model.base_model.model[0]


def _peft(cell, variant, device):
    layer = _layer(_peft_model(cell, variant, device))
    return [Arm("peft", "peft", variant, layer, tuple(layer.parameters()))], []


def _compiled(cell, variant, device):
    layer = _layer(_peft_model(cell, variant, device))
    return [Arm("compiled", "inductor", variant, torch.compile(layer, dynamic=False), tuple(layer.parameters()))], []


def _patched(cell, variant, device):
    model = _peft_model(cell, variant, device)
    # verify raises where the layer would run PEFT's own forward: that must not pass for ours
    peft_kernels.patch(model, strict=True).verify(input=torch.zeros(1, cell.K, device=device, dtype=cell.dtype))
    layer = _layer(model)
    return [Arm("patched", peft_kernels.backends.bound(device.type), variant, layer, tuple(layer.parameters()))], []


def _op(cell, variant, device):
    """The operator of every linked backend but the reference, called with the arguments the patched layer gives it."""
    linked = peft_kernels.backends.linked("lora_linear", device.type)
    kernels = [name for name in linked if name != "reference"]
    missing = [] if kernels else [f"op: no backend but the reference is linked for {device.type}"]
    return hopper.beside([_backend(name, cell, variant, device) for name in kernels], device), missing


def _reference(cell, variant, device):
    return [_backend("reference", cell, variant, device)], []


def factors(cell: Cell, variant: Variant, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, K], lora_A [r, K], lora_B [N, r]; the factors want gradients."""
    weight = torch.randn(cell.N, cell.K, device=device).mul_(cell.K**-0.5).to(cell.dtype)
    a = torch.randn(cell.r, cell.K, device=device).mul_(cell.K**-0.5).to(variant.factor_dtype)
    b = torch.randn(cell.N, cell.r, device=device).mul_(cell.r**-0.5).to(variant.factor_dtype)
    return weight, a.requires_grad_(), b.requires_grad_()


def _backend(name: str, cell: Cell, variant: Variant, device: torch.device) -> Arm:
    op = getattr(torch.ops, f"peft_kernels_{name}").lora_linear.default
    weight, a, b = factors(cell, variant, device)
    p = variant.p

    def call(x):
        seed = peft_kernels.new_seed(x.device) if p else None
        return op(x, [weight], [None], [a], [b], [None], [0], [SCALING], [p], seed)[0][0]

    return Arm("op", name, variant, call, (weight, a, b))


def _peers(cell, variant, device):
    """Peers, with adapters in the base's dtype: what is wider they would round."""
    if variant.factor_dtype is not cell.dtype:
        return [], []
    found, missing = peers.find(device)
    made = []
    for name, function in found.items():
        weight, a, b = factors(cell, variant, device)

        def call(x, function=function, weight=weight, a=a, b=b):
            return function(x, weight, a, b, SCALING, variant.p)

        made.append(Arm(name, "peer", variant, call, (weight, a, b)))
    return made, missing


_NEED_PEFT = ("peft", "compiled", "patched")
_MAKERS = {
    "peft": _peft,
    "compiled": _compiled,
    "patched": _patched,
    "op": _op,
    "reference": _reference,
    "peers": _peers,
}
