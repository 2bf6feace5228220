"""widen and unwiden: the bottleneck adapters of a model become part of its own products, for inference and export.

`widen` looks at every block that has active adapters. One of a form that cannot be widened keeps running its adapters
and gets a reason in the report; one whose state forbids it (training, sharded, quantised, tied, LoRA, hooks) makes
`widen` raise, and nothing is changed. What then runs, and how it stays right, is in `widened.py`.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from peft_kernels.integrations.blocks import CHILD, Site, adapted_class, sites_of, unfit
from peft_kernels.integrations.gathering import PLAIN
from peft_kernels.integrations.named import beneath
from peft_kernels.integrations.report import render
from peft_kernels.integrations.targets import MLP_FORWARD, fingerprint
from peft_kernels.integrations.transformers import POOL_SITE, forward_was_replaced, keeps_its_class, swap
from peft_kernels.integrations.widened import (
    WIDENED,
    Form,
    Widened,
    gated_class,
    ranged_class,
    require_unwidened,
    wide_class,
)
from peft_kernels.modules import OF_STREAM, BottleneckAdapters
from peft_kernels.ops.common.activations import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FC1 = Form(("fc1",), "activation_fn")

FORMS = {  # fingerprint of the owner's forward -> how it reads
    MLP_FORWARD: Form(("gate_proj", "up_proj"), "act_fn", gated=True),  # Llama, Qwen, Mistral, Gemma, OLMo, ...
    "08abefa8": Form(("gate_up_proj",), "activation_fn", gated=True),  # Phi-3, GLM
    "1556a397": Form(("wi_0", "wi_1"), "act", gated=True),  # T5 1.1, mT5, UMT5
    "24df7868": Form(("wi",), "act"),  # T5
    "c1d0c12c": Form(("c_fc",), "act"),  # GPT-2, GPT-Neo
    "fbd19826": Form(("c_fc",), "act"),  # StarCoder2
    "0b913dc8": Form(("dense_h_to_4h",), "act"),  # GPT-NeoX
    "94dc9dbd": _FC1,  # Phi, CLIP
    "e0db189e": _FC1,  # OPT
    "b8288eae": _FC1,  # BART's encoder
    "20c18aca": _FC1,  # its decoder
    "ed23fc1b": _FC1,  # the encoder of mBART and Whisper
    "c346e6be": _FC1,  # mBART's decoder
    "ad723fc4": _FC1,  # Whisper's
    "bb6e533c": Form(("dense",), "intermediate_act_fn", before="intermediate"),  # BERT, RoBERTa, ELECTRA
}
BEFORE = "6dc8726f"  # the forward of BertIntermediate


@dataclass(frozen=True)
class WideningRow:
    """One block with active adapters: the hidden units it got and in which form, or why it was left as it is."""

    name: str
    adapters: tuple[str, ...]
    units: int = 0
    form: str = ""
    reason: str = ""


@dataclass(frozen=True)
class WideningReport:
    """What `peft_kernels.widen` returns: a row for each block that has active adapters.

    `widened` and `left` are the rows of each kind; `print(report)` shows a table.

        >>> print(peft_kernels.widen(model))
    """

    rows: tuple[WideningRow, ...]

    @property
    def widened(self) -> tuple[WideningRow, ...]:
        return tuple(row for row in self.rows if row.units)

    @property
    def left(self) -> tuple[WideningRow, ...]:
        return tuple(row for row in self.rows if not row.units)

    def __str__(self) -> str:
        alike = Counter()
        for row in self.rows:
            name, form = re.sub(r"\.\d+(?=\.|$)", ".*", row.name), row.form or f"left: {row.reason}"
            alike[name, ", ".join(row.adapters), form, str(row.units)] += 1
        lines = [(f"{name} (x{n})", *cells) for (name, *cells), n in alike.items()]
        head = f"{len(self.widened)} blocks widened, {len(self.left)} left as they are"
        return f"{head}\n{render([('block', 'adapters', 'form', 'hidden units'), *lines])}"


@dataclass(frozen=True)
class _Plan:
    """How one block is widened: `held` as in `Widened`, the classes that its modules get, and words for the report."""

    site: Site
    owner: nn.Module
    held: tuple[tuple[nn.Module, str, nn.Module], ...]
    up: int
    kinds: tuple[type, ...]  # of the projections and the activation
    owner_kind: type
    form: str


def widen(model: nn.Module, *, serial: bool = False) -> WideningReport:
    """Builds the active parallel adapters of a model into its FFNs as more hidden units, for inference and export.

    y = act(x W_u^T) W_d^T + s f(x A^T) B^T becomes the FFN with [W_u; A] and [W_d | s B]: exact, with no launch more
    than the FFN alone where it is gated, or where f is the model's own activation, and two small ones more elsewhere.
    The block's weights become views into the wide tensors, so that memory grows by E rows and columns. The state dict
    keeps its keys and values.

    Args:
        model: a transformers model with bottleneck adapters attached, in eval mode.
        serial: fold serial adapters too, where a block has one: A W_d joins the last projection (FFN and attention).

    `to`, `half`, `cuda`, `load_state_dict` and copies keep the wide tensors right; a write through `.data`, and in a
    compiled model any write in place, is not seen: unwiden before it and widen again. `set_active`, `attach`, `load`
    and `detach` ask for `unwiden` first; training does as well, and no parameter of the widened blocks requires
    gradients. In 16 bits A and s B are rounded to the block's dtype.

    Returns:
        A report with a row for each block that has active adapters; blocks of another form run as before.

    Raises:
        ValueError: the model is in training mode, widened already, or has no active adapter; a projection is sharded,
            quantised, tied, offloaded, parametrised, hooked, or adapted by PEFT; no block has a form that can be
            widened. It names the module and the remedy. Nothing is changed then.

    Example:
        >>> model.eval()
        >>> print(peft_kernels.widen(model))
        >>> model.generate(input_ids)
        >>> peft_kernels.unwiden(model)
    """
    require_unwidened(model, "widen")
    rows, plans, shares = [], [], _shares(model)
    for site in sites_of(model):
        owner = model.get_submodule(site.name)
        adapters = owner._modules.get(CHILD)
        if not isinstance(adapters, BottleneckAdapters) or not adapters.active_names:
            continue
        plan, reason = _plan(model, site, owner, serial)
        if plan is None:
            rows.append(WideningRow(site.name, adapters.active_names, reason=reason))
            continue
        _require_possible(plan, shares)
        plans.append((plan, len(rows)))
        rows.append(None)
    if not rows:
        raise ValueError("widen: no block has an active adapter; peft_kernels.attach or set_active comes first")
    if not plans:
        reasons = "\n  ".join(dict.fromkeys(row.reason for row in rows))
        raise ValueError(f"widen: no block can be widened:\n  {reasons}")
    for plan, place in plans:
        widened = _widen(plan)
        rows[place] = WideningRow(plan.site.name, widened.names, widened.E, plan.form)
    return WideningReport(tuple(rows))


def unwiden(model: nn.Module) -> None:
    """Gives every widened block its own projections and its adapters back, bit for bit; training can go on.

    Raises:
        RuntimeError: a module of a widened block was replaced or has changed class since; nothing is changed then.

    Example:
        >>> peft_kernels.unwiden(model)
    """
    owners = [owner for owner in model.modules() if WIDENED in owner._modules]
    for owner in owners:
        owner._modules[WIDENED].require_intact()
    for owner in owners:
        widened = owner._modules.pop(WIDENED)
        widened.clear()
        swaps = [(owner, adapted_class(widened.block, beneath(type(owner))))]
        for _, _, module in widened.held[1:]:
            swaps.append((module, beneath(type(module))))
            del module.__dict__[WIDENED]
        swap(swaps)
    swap(unfit(model))  # an inactive adapter may need the residual stream


def _widen(plan: _Plan) -> Widened:
    widened = Widened(plan.site.name, plan.site.block, plan.held, plan.up)
    widened.train(plan.owner.training)
    modules = [module for _, _, module in plan.held]
    swap([(plan.owner, plan.owner_kind), *zip(modules[1:], plan.kinds, strict=True)])
    for module in modules[1:]:
        module.__dict__[WIDENED] = widened  # no child: it is one of the owner
    for module, key in widened.trained:
        module.get_parameter(key).requires_grad_(False)
    plan.owner.add_module(WIDENED, widened)
    widened.build()
    return widened


# -- which form a block has -------------------------------------------------------------------------------------------


def _plan(model: nn.Module, site: Site, owner: nn.Module, serial: bool) -> tuple[_Plan | None, str]:
    """How to widen a block, or why its form has no wide one."""
    adapters = owner._modules[CHILD]
    active = [adapters[name] for name in adapters.active_names]
    in_series = [name for name in adapters.active_names if adapters.reads_by_name[name] == "output"]
    if any(adapter.norm != "none" for adapter in active):
        return None, "an adapter has a norm of its own"
    if any(adapter.gate_weight is not None for adapter in active):
        return None, "an adapter has a gate"
    if any(adapters.reads_by_name[name] in OF_STREAM for name in adapters.active_names):
        return None, "an adapter reads the residual stream, which the block's own products do not"
    if not site.block.output:
        return None, "a mixture of experts has no one last projection"
    held = (owner, CHILD, adapters), (owner, site.block.output, owner._modules[site.block.output])
    if in_series:
        if not serial:
            return None, "the adapter is serial: widen(model, serial=True) folds it into the last projection"
        if len(active) > 1:
            return None, "a serial adapter is folded only where it is the only active one"
        return _Plan(site, owner, held, 0, (_as("folded", held[1]),), beneath(type(owner)), "serial, folded"), ""
    return _parallel_plan(model, site, owner, held)


def _parallel_plan(model, site, owner, held) -> tuple[_Plan | None, str]:
    if site.block.representation != "ffn":
        return None, "a parallel adapter of an attention block has no hidden units to join"
    kind = beneath(type(owner))
    plain = getattr(kind, "family_class", kind)
    form = FORMS.get(fingerprint(plain.forward))
    inner = owner
    if form and form.before:
        around = model.get_submodule(site.name.rpartition(".")[0])
        inner = around._modules.get(form.before)
        form = form if inner is not None and fingerprint(type(inner).forward) == BEFORE else None
    if form is None or any(name not in inner._modules for name in form.up):
        return None, f"the forward of {plain.__name__} is not one that is known"
    adapters, down = held
    ups = [(inner, name, inner._modules[name]) for name in form.up]
    act = inner, form.activation, inner._modules.get(form.activation)
    if act[2] is None:
        return None, f"{plain.__name__} has no module for its activation"
    first, *others = ups
    kinds = _as("linear" if form.gated else "first", first), *(_as("linear", other) for other in (*others, down))
    held = adapters, *ups, down
    if form.gated:
        return _Plan(site, owner, held, len(ups), kinds, gated_class(form, kind), "parallel, gated"), ""
    names = {adapters[2][name].activation for name in adapters[2].active_names}
    if len(names) == 1 and _computes(act[2], *names):
        return _Plan(site, owner, held, len(ups), kinds, kind, "parallel"), ""
    kinds = *kinds, ranged_class(type(act[2]))
    return _Plan(site, owner, (*held, act), len(ups), kinds, kind, "parallel, two activations"), ""


def _as(role: str, place: tuple) -> type:
    return wide_class(role, type(place[2]))


def _computes(act: nn.Module, name: str) -> bool:
    """Whether a model's activation is the one of that name, whatever its class is called."""
    points = torch.linspace(-8, 8, 161, dtype=torch.float64)
    return torch.allclose(act(points), ACTIVATIONS[name](points))


# -- what forbids it --------------------------------------------------------------------------------------------------


def _shares(model: nn.Module) -> Counter[int]:
    """How many places of a model have a module, or a memory as that of their parameters, by its address."""
    every = (p for _, p in model.named_parameters(remove_duplicate=False))
    memories = Counter(p.untyped_storage().data_ptr() for p in every if type(p) in PLAIN and not p.is_meta)
    return memories + Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


def _require_possible(plan: _Plan, shares: Counter[int]) -> None:
    if plan.owner.training:
        raise ValueError(f"widen: {plan.site.name} is in training mode; widening is for inference: model.eval() first")
    if keeps_its_class(plan.owner):
        raise ValueError(
            f"widen: {plan.site.name} cannot change class: FSDP or a parametrization has made its class, or its "
            "forward was replaced; undo that first"
        )
    for i, (around, name, module) in enumerate(plan.held[1:]):
        reason = _obstacle(module)
        if shares[id(module)] > 1:
            reason = reason or "is a module of another block too; give it one of its own: copy.deepcopy(module)"
        if i <= plan.up:  # after the last projection there may be an activation
            reason = reason or _obstacle_of_projection(module, shares)
        if reason:
            inside = "" if around is plan.owner else " of the module before it"
            raise ValueError(f"widen: {name}{inside} in {plan.site.name} {reason}")
    if len(dtypes := {str(module.weight.dtype) for _, _, module in plan.held[1 : plan.up + 1]}) > 1:
        raise ValueError(f"widen: {plan.site.name} reads x with weights of {' and '.join(sorted(dtypes))}; cast to one")


def _obstacle(module: nn.Module) -> str:
    """What a module is that it must not be, and the remedy; or nothing."""
    if isinstance(module, BaseTunerLayer):
        return f"is a PEFT layer ({type(module).__name__}); model.merge_and_unload() first puts it into the weight"
    if is_parametrized(module):
        return "is parametrised; torch.nn.utils.parametrize.remove_parametrizations first"
    if POOL_SITE in module.__dict__:
        return "is served by a pool; peft_kernels.unpatch(model) first takes it off"
    if "_hf_hook" in module.__dict__:
        return "is moved by accelerate (offloading); load the model whole on one device"
    if forward_was_replaced(module):
        return "has a forward of its own; restore that of its class"
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "has hooks, which would see other tensors; remove them first" if any(hooks) else ""


def _obstacle_of_projection(module: nn.Module, shares: Counter[int]) -> str:
    weight = module._parameters.get("weight")
    if type(module) not in (nn.Linear, Conv1D):
        kind = f"{type(module).__module__}.{type(module).__name__}"
        return f"is a {kind}, and only nn.Linear and Conv1D are widened; load the model unquantised and unsharded"
    if type(weight) not in PLAIN or weight.dim() != 2:
        return f"has a sharded or quantised weight ({type(weight).__name__}); load the model unquantised and unsharded"
    if weight.is_meta:
        return "has its weight on meta: offloaded, or not loaded yet; load it first"
    if weight.dtype not in DTYPES:
        return f"has a weight of {weight.dtype}; load the model in float32, float16 or bfloat16"
    for parameter in module._parameters.values():
        if parameter is not None and shares[parameter.untyped_storage().data_ptr()] > 1:
            return "shares its memory with another parameter (tied weights); give it its own: p.data = p.data.clone()"
    return ""
