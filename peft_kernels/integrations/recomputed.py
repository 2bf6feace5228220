"""MLPs whose three projections and activation are one call in training, which keeps no activation: `recompute_mlp`.

For each MLP in `targets.GROUPS` there is a subclass of its grouped class here, found by its name for a pickle
(`RecomputedLlamaMLP`). In training, and wherever gradients are enabled, its forward is one `lora_mlp`; elsewhere, and
where the call cannot be one at this moment, it is the grouped class's, and in the latter case the reason is counted.
"""

import functools
from typing import NamedTuple

import torch
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peft_kernels.integrations.counts import count_fallback, count_fused
from peft_kernels.integrations.gathering import PLAIN, Call, intercepted
from peft_kernels.integrations.groups import add_member, fused_class
from peft_kernels.integrations.rows import current
from peft_kernels.integrations.targets import GROUPS, Group
from peft_kernels.ops import new_seed

LORA_MLP = torch.ops.peft_kernels.lora_mlp.default
PREFIX = "Recomputed"
KIND = "gate_up"  # of the groups that an MLP owns
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BY_ROW = "rows with adapters of their own"
_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
ACTIVATIONS = {type(ACT2FN[name]): activation for name, activation in _NAMES.items()}


class MLP(NamedTuple):
    """The arguments of one call, as they are gathered from the MLP's layers."""

    outer: Call  # gate and up
    inner: Call  # down
    activation: str

    def run(self, x: Tensor) -> Tensor:
        outer, inner = self.outer, self.inner
        seed = new_seed(x.device) if outer.drops or inner.drops else None
        return LORA_MLP(
            x, outer.weight + inner.weight, outer.bias + inner.bias, outer.lora_A + inner.lora_A,
            outer.lora_B + inner.lora_B, outer.lora_bias + inner.lora_bias, outer.member + [2] * len(inner.member),
            outer.scaling + inner.scaling, outer.dropout_p + inner.dropout_p, seed, self.activation,
        )[0]  # fmt: skip


def gather(owner: nn.Module, x: Tensor, types=PLAIN) -> MLP | str:
    """The call of an MLP in its present state, or why there is none."""
    if type(x) not in types:
        return f"x is a {type(x).__name__}"
    if current(owner) is not None:
        return BY_ROW
    modules = owner._modules
    act = modules["act_fn"]
    if type(act) not in ACTIVATIONS:
        return f"act_fn is a {type(act).__name__}"
    if intercepted(act, x):
        return "act_fn: hook"
    mlp = MLP(Call(), Call(), ACTIVATIONS[type(act)])
    for name in PROJECTIONS:
        call = mlp.inner if name == PROJECTIONS[-1] else mlp.outer
        reason = add_member(call, modules[name], x, types)
        if not reason and call.gains is not None:
            reason = "a variant"
        if not reason and isinstance(modules[name], VeraLayer) and torch.is_autocast_enabled(x.device.type):
            reason = "VeRA under autocast: its output is cast"
        if reason:
            return f"{name}: {reason}"
    return mlp


def why_not(owner: nn.Module, types) -> str:
    """Why the next training step of an MLP would keep its activation, or nothing."""
    mlp = gather(owner, owner._modules[PROJECTIONS[0]].weight, types)
    return mlp if type(mlp) is str else ""


def _forward(self, x: Tensor) -> Tensor:
    # A reentrant checkpoint runs the forward once without gradients: it has to draw the same masks then.
    if not (torch.is_grad_enabled() or self.training):
        return self.by_group.forward(self, x)
    mlp = gather(self, x)
    if type(mlp) is str:
        count_fallback(self, f"not recomputed: {mlp}")
        return self.by_group.forward(self, x)
    if not (mlp.outer.lora_A or mlp.inner.lora_A):
        return self.by_group.forward(self, x)
    count_fused(self)
    if mlp.inner.lora_A:
        count_fused(self._modules[PROJECTIONS[-1]])
    return mlp.run(x)


@functools.cache
def recomputed_class(group: Group) -> type:
    """The subclass whose instances compute an MLP in one call, where gradients are enabled."""
    by_group = fused_class(group)
    members = {
        "__doc__": f"{group.owner} in one call that keeps no activation for its backward.",
        "__module__": __name__,
        "family_class": by_group.family_class,
        "by_group": by_group,
        "forward": _forward,
    }
    return type(PREFIX + group.owner, (by_group,), members)


def __getattr__(name: str):  # how pickle finds a class by its name
    for group in GROUPS.values():
        if group.kind == KIND and name == PREFIX + group.owner:
            return recomputed_class(group)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
