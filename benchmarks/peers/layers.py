"""Other projects' LoRA functions in the layers of a Llama that HF PEFT has adapted.

The forwards of its linear layers are replaced, on the instances: q, k and v come of one call, which q_proj's makes; so
the model's own attention and its own norms run, and all arms of a benchmark differ in the LoRA functions alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Member(NamedTuple):
    """One projection with its adapter."""

    weight: Tensor  # [N, K]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scaling: float


@dataclass(frozen=True)
class Functions:
    """x [B, S, K]; p is the probability of dropout, drawn as the peer's own training draws it."""

    qkv: Callable[[Tensor, list[Member], float], tuple[Tensor, Tensor, Tensor]]
    mlp: Callable[[Tensor, list[Member], float], Tensor]  # of gate, up, down
    projection: Callable[[Tensor, Member, float], Tensor]


def put_into(layers: nn.ModuleList, functions: Functions, p: float) -> None:
    """Lets the decoder layers of a Llama, adapted by PEFT, compute through `functions`."""
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        attended = _members(attention, ("q_proj", "k_proj", "v_proj"))
        _share(functions, attended, attention, p)
        fed = _members(mlp, ("gate_proj", "up_proj", "down_proj"))
        mlp.forward = lambda x, fed=fed: functions.mlp(x, fed, p)
        (out,) = _members(attention, ("o_proj",))
        attention.o_proj.forward = lambda x, out=out: functions.projection(x, out, p)


def _members(owner: nn.Module, names: tuple[str, ...]) -> list[Member]:
    found = [owner.get_submodule(name) for name in names]
    return [
        Member(m.base_layer.weight, m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"])
        for m in found
    ]


def _share(functions: Functions, members: list[Member], attention: nn.Module, p: float) -> None:
    """k and v are kept from the call for q until they are asked for."""
    kept = []

    def q(x):
        first, *rest = functions.qkv(x, members, p)
        kept[:] = rest
        return first

    attention.q_proj.forward = q
    attention.k_proj.forward = attention.v_proj.forward = lambda x: kept.pop(0)
