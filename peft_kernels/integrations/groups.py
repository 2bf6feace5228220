"""Modules that own several projections of one x, with the projections computed in one call: q, k, v and gate, up.

For each class in `targets.GROUPS` there is a subclass here, made when it is first asked for and found by its name
(`FusedLlamaAttention`), so that a patched model can be pickled. Its forward is the family's own around the one call.
Where a member cannot be fused at this moment, the family's own forward runs, and each projection decides for itself.
"""

import functools
import importlib
from collections.abc import Callable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_kernels.integrations.counts import count_fallback, count_fused
from peft_kernels.integrations.gathering import (
    DISABLED,
    INACTIVE,
    MERGED,
    ONE_EACH,
    PLAIN,
    Call,
    add_base,
    intercepted,
    kept,
)
from peft_kernels.integrations.other_methods import ADDS
from peft_kernels.integrations.rows import OUTSIDE, current, outside_graph
from peft_kernels.integrations.targets import GROUPS, Group

PREFIX = "Fused"


def add_member(call: Call, member: nn.Module, x: Tensor, types=PLAIN) -> str:
    """Adds a projection, with adapters or without, to a call; returns why it cannot be added, or nothing."""
    if intercepted(member, x):
        return "hook"  # it has to be called as a module
    return ADDS.get(type(member), add_base)(call, member, x, types)  # a PEFT class: an adapter that came after patch


def project(owner: nn.Module, x: Tensor) -> list[Tensor] | None:
    """y of each projection, or None where the call cannot be one now."""
    if type(x) not in PLAIN:
        count_fallback(owner, f"x is a {type(x).__name__}")
        return None
    rows = current(owner)
    if rows is OUTSIDE:
        return outside_graph(project, owner, x)
    call = kept(rows, owner, x)
    if call is None:
        call = Call(rows)
        modules = owner._modules
        for name in owner.group.projections:
            if reason := add_member(call, modules[name], x):
                count_fallback(owner, f"{name}: {reason}")
                return None
        if not call.lora_A:
            count_fallback(owner, _idle([modules[name] for name in owner.group.projections]))
            return None
        if call.gains is not None and any(gain.dropout is not None for gain in call.gains.values()):
            count_fallback(owner, ONE_EACH)
            return None
        call.keep(owner, x)
    count_fused(owner)
    projected = call.run(x)
    if projected[0].dtype is x.dtype:
        return projected
    members = (owner._modules[name] for name in owner.group.projections)
    return [y.to(x.dtype) if isinstance(m, VeraLayer) else y for m, y in zip(members, projected, strict=True)]


def _idle(members: list[nn.Module]) -> str:
    """Why none of the projections adds anything of its own."""
    layers = [member for member in members if isinstance(member, BaseTunerLayer)]
    if any(layer._disable_adapters for layer in layers):
        return DISABLED
    return MERGED if any(layer.merged_adapters for layer in layers) else INACTIVE


def _mlp_forward(self, x: Tensor) -> Tensor:
    projected = self.project(x)
    if projected is None:
        return self.ungrouped.forward(self, x)
    gate, up = projected
    return self.down_proj(self.act_fn(gate) * up)


def _attention_forward(
    self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
):
    projected = self.project(hidden_states)
    if projected is None:
        return self.ungrouped.forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
    batch = hidden_states.shape[:-1]
    q, k, v = (y.view(*batch, -1, self.head_dim).transpose(1, 2) for y in projected)  # [B, H, S, D]
    if self.group.family.norms:
        q_norm, k_norm = self.group.family.norms
        q, k = getattr(self, q_norm)(q), getattr(self, k_norm)(k)
    q, k = self.modeling.apply_rotary_pos_emb(q, k, *position_embeddings)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, self.modeling.eager_attention_forward
    )
    for argument, place in self.group.family.reads:
        where, _, attribute = place.rpartition(".")
        kwargs[argument] = getattr(self.config if where else self, attribute, None)
    dropout = self.attention_dropout if self.training else 0.0
    mixed, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(mixed.reshape(*batch, -1).contiguous()), weights


_FORWARDS = {"qkv": _attention_forward, "gate_up": _mlp_forward}


def grouped_class(prefix: str, group: Group, project: Callable[[nn.Module, Tensor], list[Tensor] | None]) -> type:
    """A subclass whose instances get y of each projection of x from `project`, where that gives any."""
    modeling = importlib.import_module(group.family.module)
    family_class = getattr(modeling, group.owner)
    members = {
        "__doc__": f"{group.owner} with {', '.join(group.projections)} in one call.",
        "__module__": __name__,
        "group": group,
        "family_class": family_class,
        "ungrouped": family_class,  # the same; a subclass over this one has a family_class of its own
        "modeling": modeling,
        "project": project,
        "forward": _FORWARDS[group.kind],
    }
    return type(prefix + group.owner, (family_class,), members)


@functools.cache
def fused_class(group: Group) -> type:
    """The subclass whose instances compute a group in one call."""
    return grouped_class(PREFIX, group, project)


def __getattr__(name: str):  # how pickle finds a class by its name
    for group in GROUPS.values():
        if name == PREFIX + group.owner:
            return fused_class(group)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
