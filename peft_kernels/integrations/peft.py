"""HF PEFT's LoRA layer, fused: y = x W^T + b + sum over the active adapters of s (drop(x) A^T) B^T, in one call.

`FusedLinear` is `peft.tuners.lora.Linear` with another forward and no state of its own, so that an instance can change
class and back. PEFT's switches are read at every call, in PEFT's order: disabled, adapter names, merged, the active
adapters, training, a variant of the maths. What the kernel does not compute is left to PEFT's forward and counted.

Other methods whose layers add low-rank products have the same forward, made by `fused_forward` around another `add`.
"""

from collections.abc import Callable

from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from peft_kernels.integrations.counts import count_fallback, count_fused
from peft_kernels.integrations.dora import ForgetsNorms
from peft_kernels.integrations.gathering import (
    DISABLED,
    INACTIVE,
    MERGED,
    MERGED_ROWS,
    NAMED,
    PLAIN,
    UNMERGES,
    Call,
    add_adapter,
    add_base,
    kept,
)
from peft_kernels.integrations.rows import OUTSIDE, by_peft, current, outside_graph
from peft_kernels.integrations.variants import add_variant


def add_active(call: Call, layer: BaseTunerLayer, known: dict, variants, add_one: Callable, x: Tensor, types) -> str:
    """Adds the active ones of a layer's `known` adapters to the call's last projection, or says why it cannot be."""
    active = layer._active_adapter
    for name in (active,) if type(active) is str else active:
        if name in known:
            add_this = add_variant if name in variants else add_one
            if reason := add_this(call, layer, name, x, types):
                return reason
    return ""


def adding(adapters: str, store: str, add_one: Callable, has_variants: bool = False) -> Callable[..., str]:
    """What adds a layer in its present state to a call: its base as the next projection, and the adapters that are
    active, or those that the rows have.

    `adapters` names the layer's dictionary of adapters, which keeps them in its `store`; `add_one` adds one of them.
    """

    def add(call: Call, layer: BaseTunerLayer, x: Tensor, types=PLAIN) -> str:
        modules = layer._modules
        if reason := add_base(call, modules["base_layer"], x, types):
            return reason
        if layer._disable_adapters:
            return UNMERGES if layer.merged_adapters else ""
        if layer.merged_adapters:
            return MERGED_ROWS if call.rows else ""
        known = modules[adapters].__dict__[store]
        variants = layer.lora_variant if has_variants else ()
        if call.rows:
            return add_for_rows(call, layer, known, variants, x, types)
        return add_active(call, layer, known, variants, add_one, x, types)

    def add_for_rows(call, layer, known, variants, x, types) -> str:
        call.rows.look(known)
        for i, name in enumerate(call.rows.adapters):
            if name in known:
                add_this = add_variant if name in variants else add_one
                if reason := add_this(call, layer, name, x, types):
                    return reason
                call.adapter.append(i)
        return ""

    return add


def fused_forward(family_class: type[BaseTunerLayer], add: Callable[..., str]) -> Callable[..., Tensor]:
    """The forward of a subclass of a PEFT layer; `add` adds the layer to a call."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        rows = current(self)
        if rows is OUTSIDE:
            return outside_graph(forward, self, x, *args, **kwargs)
        if args or kwargs or type(x) not in PLAIN:
            reason = NAMED if args or kwargs else f"x is a {type(x).__name__}"
            count_fallback(self, reason)
            return by_peft(family_class.forward, self, rows, x, *args, reason=reason, **kwargs)
        disabled, merged = self._disable_adapters, self.merged_adapters
        if disabled or merged:
            if merged and (disabled or rows):
                reason = UNMERGES if disabled else MERGED_ROWS
                count_fallback(self, reason)
                return by_peft(family_class.forward, self, rows, x, reason=reason)
            count_fallback(self, DISABLED if disabled else MERGED)
            return self._modules["base_layer"](x)
        call = kept(rows, self, x)
        if call is None:
            call = Call(rows)
            if reason := add(call, self, x):
                count_fallback(self, reason)
                return by_peft(family_class.forward, self, rows, x, reason=reason)
            if not call.lora_A:
                count_fallback(self, INACTIVE)
                return self._modules["base_layer"](x)
            call.keep(self, x)
        count_fused(self)
        return call.run(x)[0]

    return forward


def forward_over_base(
    family_class: type[BaseTunerLayer], add: Callable[..., str], run: Callable[..., Tensor], mixed: str
) -> Callable[..., Tensor]:
    """The forward of a subclass of a PEFT layer whose base layer is called. `add` adds the layer's adapters to a call,
    `run` adds the call to what the base layer returns; `mixed`: why rows have no adapters of their own in it."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        rows = current(self)
        if rows is OUTSIDE:
            return outside_graph(forward, self, x, *args, **kwargs)
        disabled, merged = self._disable_adapters, self.merged_adapters
        reason = ""
        if args or kwargs or type(x) not in PLAIN:
            reason = NAMED if args or kwargs else f"x is a {type(x).__name__}"
        elif merged and (disabled or rows):
            reason = UNMERGES if disabled else MERGED_ROWS
        elif disabled or merged:
            count_fallback(self, DISABLED if disabled else MERGED)
            return self._modules["base_layer"](x)
        elif rows is not None:
            reason = mixed
        call = Call()
        reason = reason or add(call, self, x)
        if reason:
            count_fallback(self, reason)
            return by_peft(family_class.forward, self, rows, x, *args, reason=reason, **kwargs)
        if not call.lora_A:
            count_fallback(self, INACTIVE)
            return self._modules["base_layer"](x)
        count_fused(self)
        return run(call, self, x)

    return forward


add_layer = adding("lora_A", "_modules", add_adapter, has_variants=True)


class FusedLinear(ForgetsNorms, Linear):
    """`peft.tuners.lora.Linear` whose forward is one op; `peft_kernels.patch` gives the class to instances."""

    asks_for_rows = True
    forward = fused_forward(Linear, add_layer)
