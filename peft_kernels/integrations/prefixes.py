"""Prefixes on a model: which attentions can have them, how they come into it, and how the model attends to them.

The attentions are those whose forward asks transformers' attention interface for a function; their prefixes are a child
of theirs. While a model has any, its attention implementation is the one of `attending.py`; with the last one gone it
has its own again. Checkpointed layers take what belongs to a call along into the backward (`named.py`).
"""

import functools
import inspect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_kernels.integrations.attending import CHILD, KEY
from peft_kernels.integrations.blocks import layers_of, sites_of
from peft_kernels.integrations.checkpoints import PREFIX
from peft_kernels.integrations.named import again_over, asks_for_rows, beneath, keeping_class, subclass
from peft_kernels.integrations.packed import require_own_attention
from peft_kernels.integrations.prefix_positions import (
    Shifts,
    activate_shift,
    add_shift,
    remove_shift,
    require_positions,
    tables_of,
)
from peft_kernels.integrations.transformers import POOL_SITE, keeps_its_class, made_by_fsdp, swap
from peft_kernels.methods import PrefixTuningConfig
from peft_kernels.modules import Prefix, PrefixEncoder, Prefixes
from peft_kernels.modules.prefix import encoded
from peft_kernels.ops.prefix_attention.op import MAX_HEAD_DIM

NOTE = "prefix_attention_before"
FLASH = "_supports_flash_attn"
NAMES = "prefix_names"  # of all prefixes of the model: one set, that its parts share
CROSS = frozenset({"encoder_attn", "EncDecAttention", "crossattention"})
UNSUPPORTED = (  # model types that compute their attention themselves
    "bloom", "codegen", "deberta", "deberta-v2", "falcon", "gpt_neo", "gptj", "led", "longformer", "mpt", "xglm",
    "xlnet",
)  # fmt: skip


@dataclass(frozen=True)
class PrefixSite:
    """An attention in a model."""

    name: str
    layer: int
    slot: str  # "encoder", "decoder" or "cross"
    heads: int  # of keys
    query_heads: int
    head_dim: int

    def key(self, parameter: str = "weight") -> str:
        """Of a tensor in the file."""
        return f"{PREFIX}{self.name}.{CHILD}.{parameter}"


def prefix_sites(root: nn.Module) -> list[PrefixSite]:
    """All attentions that ask transformers' interface, in the order of the model; layers count as in `sites_of`."""
    slots = {name: _slot(root, name, m) for name, m in root.named_modules() if _asks_interface(type(m))}
    blocks = {site.name: site.block.representation for site in sites_of(root)}
    layers = layers_of(root, blocks | slots)
    index = {layer: i for i, layer in enumerate(dict.fromkeys(layers.values()))}
    return [
        PrefixSite(name, index[layers[name]], slot, *_sizes(root, name, root.get_submodule(name)))
        for name, slot in slots.items()
    ]


def _asks_interface(kind: type) -> bool:
    own = next((base for base in kind.__mro__ if "family_class" not in base.__dict__ and "forward" in vars(base)), None)
    forward = own and inspect.unwrap(own.forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _slot(root: nn.Module, name: str, module: nn.Module) -> str:
    parts = name.split(".")
    if CROSS.intersection(parts):
        return "cross"
    if getattr(root.config, "is_encoder_decoder", False):
        return next((part for part in parts if part in ("encoder", "decoder")), "decoder")  # a BERT has an encoder too
    return "decoder" if getattr(module, "is_causal", True) else "encoder"


def _sizes(root: nn.Module, name: str, module: nn.Module) -> tuple[int, int, int]:
    """Hkv, Hq and D."""
    config = getattr(module, "config", None) or root.config.get_text_config()
    D = _first(module, "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
    Hq = _first(module, "num_heads", "num_attention_heads", "n_heads") or _first(
        config, "num_attention_heads", "num_heads", "n_head"
    )
    if D is None or Hq is None:
        raise ValueError(f"attach: the heads of {name}, a {type(module).__name__}, are not known")
    projection = next((module._modules[child] for child in ("k_proj", "key", "k") if child in module._modules), None)
    if projection is not None and hasattr(projection, "out_features"):
        return projection.out_features // D, Hq, D
    return _first(module, "num_key_value_heads") or _first(config, "num_key_value_heads") or Hq, Hq, D


def _first(owner, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)


def plan_prefixes(root: nn.Module, config: PrefixTuningConfig) -> dict[str, PrefixSite]:
    """The attentions that get a prefix. Raises for what cannot be done."""
    if not isinstance(root, PreTrainedModel):
        raise ValueError(
            f"attach: prefixes are for transformers' models, which a {type(root).__name__} is not, though it may be a "
            "part of one or have one inside: pass that"
        )
    every = prefix_sites(root)
    family = getattr(root.config, "model_type", type(root).__name__)
    if not every or not root._can_set_attn_implementation():
        raise ValueError(
            f"attach: {family} computes its attention itself and does not ask transformers' attention interface for "
            f"it, so no prefix can reach it; the same holds for {', '.join(UNSUPPORTED)}"
        )
    if sinks := [site.name for site in every if getattr(root.get_submodule(site.name), "sinks", None) is not None]:
        raise ValueError(f"attach: {sinks[0]} has attention sinks, which do not go together with prefixes")
    if config.shift_positions:
        require_positions(root)
        if any(POOL_SITE in table.__dict__ for table in tables_of(root)):
            raise ValueError(
                "attach: shift_positions: the model's learned positions have a place in its pool; take that off with "
                "peft_kernels.unpatch(model), attach the prefix, and then the pool again"
            )
    require_own_attention(root)
    slots = config.slots or {site.slot for site in every}
    if missing := [slot for slot in slots if not any(site.slot == slot for site in every)]:
        has = ", ".join(dict.fromkeys(site.slot for site in every))
        raise ValueError(f"attach: slots: a {type(root).__name__} has no {missing[0]} attention; it has {has}")
    count = 1 + max(site.layer for site in every)
    if outside := [layer for layer in config.layers or () if layer >= count]:
        raise ValueError(f"attach: layers must lie in [0, {count}), the layers of this model, got {outside[0]}")
    chosen = (site for site in every if site.slot in slots)
    places = {site.name: site for site in chosen if config.layers is None or site.layer in config.layers}
    if not places:
        raise ValueError(f"attach: there is no {' or '.join(slots)} attention in the layers {list(config.layers)}")
    for site in places.values():
        if not 8 <= site.head_dim <= MAX_HEAD_DIM or site.head_dim % 8:
            raise ValueError(
                f"attach: {site.name} has heads of {site.head_dim}; they must be a multiple of 8 up to {MAX_HEAD_DIM}"
            )
    return places


def prefix_shapes(config: PrefixTuningConfig, places: list[PrefixSite]) -> dict[str, list[int]]:
    """Of the tensors in a file, by their keys."""
    P, found = config.num_virtual_tokens, {}
    for site in places:
        found[site.key()] = [P, 2, site.heads, site.head_dim]
        if config.gate:
            found[site.key("gate")] = [1, site.query_heads]
    return found


def prefix_tensors(root: nn.Module, name: str) -> dict[str, Tensor]:
    """What is saved of a prefix, baked, by the keys in the file."""
    found = {}
    for owner, prefixes in prefixes_in(root):
        if name in prefixes:
            found[f"{PREFIX}{owner}.{CHILD}.weight"] = prefixes[name].baked()
            if prefixes[name].gate is not None:
                found[f"{PREFIX}{owner}.{CHILD}.gate"] = prefixes[name].gate
    return found


def prefix_names(root: nn.Module) -> set[str]:
    """Names of all prefixes of a model: a set that changes with them."""
    return root.__dict__.get(NAMES, set())


def prefixes_in(root: nn.Module) -> list[tuple[str, Prefixes]]:
    """The prefixes of each attention, with its name; none are in there where a method left it out."""
    return [(n.rpartition(".")[0], module) for n, module in root.named_modules() if isinstance(module, Prefixes)]


def device_of(attention: nn.Module) -> torch.device:
    """Where its prefixes go: where its weights are, which are buffers where some quantised layers have them."""
    return next(itertools.chain(attention.parameters(), attention.buffers())).device


# -- in and out -------------------------------------------------------------------------------------------------------


def add_prefixes(
    root: nn.Module,
    config: PrefixTuningConfig,
    name: str,
    places: list[PrefixSite],
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Puts a prefix in, a new one or that of a file; it is not attended to yet."""
    made, encoders = {}, {}
    for site in places:
        attention = root.get_submodule(site.name)
        if device_of(attention).type == "meta":
            raise ValueError(f"attach: the parameters of {site.name} are on meta; move them to a device first")
        double = any(parameter.dtype is torch.float64 for parameter in attention.parameters())
        where = {"device": device_of(attention), "dtype": torch.float64 if double else torch.float32}
        encoder = None
        if config.prefix_projection:
            width = root.config.get_text_config().hidden_size
            sizes = config.num_virtual_tokens, width, config.encoder_hidden_size or width
            encoder = encoders.get(site.slot) or encoders.setdefault(site.slot, PrefixEncoder(*sizes, **where))
        made[site.name] = Prefix(
            config.num_virtual_tokens, site.heads, site.head_dim, site.query_heads, composition=config.composition,
            gate=config.gate, init="zero" if config.init == "zero" else "random", dropout_p=config.prefix_dropout,
            encoder=encoder, **where,
        )  # fmt: skip
        if encoder is not None and not any(m.encoder is encoder for m in list(made.values())[:-1]):
            made[site.name].add_module("own_encoder", encoder)  # the first layer of a slot has it, the others share it
        if tensors is not None:
            with torch.no_grad():
                for key, parameter in made[site.name].named_parameters():
                    parameter.copy_(tensors[site.key(key)])
    if config.init == "text":
        _fill_with_text(root, config, {site: made[site.name] for site in places})
    of_model = root.__dict__.setdefault(NAMES, set())
    of_model.add(name)
    if config.shift_positions:
        swap(add_shift(root, name, config.num_virtual_tokens, of_model))
    for site in prefix_sites(root):
        owner = root.get_submodule(site.name)
        if CHILD not in owner._modules:
            before = getattr(owner.config, "_attn_implementation", None) or "eager"
            owner._modules[CHILD] = Prefixes(site.slot, before, of_model).train(owner.training)
        if site.name in made:
            owner._modules[CHILD][name] = made[site.name].train(owner.training)
    _attend_to_prefixes(root)


@torch.no_grad()
def _fill_with_text(root: nn.Module, config: PrefixTuningConfig, prefixes: dict[PrefixSite, Prefix]) -> None:
    """Gives prefixes the keys and values that the model has for a text. Those behind which the tokens' positions start
    are where the model would have them then: at -P to -1, seen from the first token."""
    if any(site.slot != "decoder" for site in prefixes) or root.config.is_encoder_decoder:
        raise ValueError(f"attach: init='text' is for decoder-only models, which a {type(root).__name__} is not")
    P, count = config.num_virtual_tokens, root.get_input_embeddings().num_embeddings
    if not all(0 <= token < count for token in config.text):
        raise ValueError(f"attach: text must be ids in [0, {count}), the tokens of this model, got {list(config.text)}")
    tokens = torch.tensor([config.text], device=root.device)
    turned = config.shift_positions and not tables_of(root)  # learned ones are at 0 to P - 1 either way
    shifted = {"position_ids": torch.arange(-P, 0, device=root.device)[None]} if turned else {}
    training = [module for module in root.modules() if module.training]
    others = [(m, m.active_name) for m in root.modules() if isinstance(m, (Prefixes, Shifts))]
    root.eval()
    try:
        for module, _ in others:
            module.active_name = None  # a model attends to one prefix, and this one is not there yet
        layers = root(input_ids=tokens, use_cache=True, **shifted).past_key_values.layers
    finally:
        for module, name in others:
            module.active_name = name
        for module in training:
            module.training = True
    for site, prefix in prefixes.items():
        layer = layers[root.get_submodule(site.name).layer_idx]
        if layer.keys.shape[2] != P:
            raise ValueError(f"attach: init='text': {site.name} keeps {layer.keys.shape[2]} keys of the text's {P}")
        prefix.weight.copy_(torch.stack([layer.keys[0], layer.values[0]]).permute(2, 0, 1, 3))


def activate_prefixes(root: nn.Module, names: Iterable[str], trained: Iterable[str], skip_layers: tuple) -> None:
    """Every row has the prefix among these names, of which there may be one."""
    found = prefixes_in(root)
    layers = {site.name: site.layer for site in prefix_sites(root)} if skip_layers and found else {}
    for owner, prefixes in found:
        here = () if layers.get(owner) in skip_layers else names
        prefixes.active_name = next((name for name in here if name in prefixes), None)
        for name, prefix in prefixes.items():
            prefix.requires_grad_(name in trained and name == prefixes.active_name)
    for _, prefixes in found:  # an MLP lies in one layer, which may be skipped, and others have it too
        active = prefixes[prefixes.active_name] if prefixes.active_name in trained else None
        if active is not None and active.encoder is not None:
            active.encoder.requires_grad_(True)
    activate_shift(root, tuple(names))


def require_own_classes(root: nn.Module) -> None:
    """Raises ValueError where another class was made over one that prefixes need, which could not be given back."""
    for name, module in root.named_modules():
        if hasattr(type(module), "for_prefixes") and (made_by_fsdp(module) or is_parametrized(module)):
            name = name or f"the {type(root).__name__}"
            raise ValueError(f"detach: {name} has a class that was made after attach; undo that before")


def remove_prefix(root: nn.Module, name: str) -> None:
    """Takes a prefix off; with the last one, the model attends as it did before."""
    root.__dict__.get(NAMES, set()).discard(name)
    for _, prefixes in prefixes_in(root):
        if name in prefixes:
            del prefixes[name]
            prefixes.active_name = None if prefixes.active_name == name else prefixes.active_name
    if NOTE in root.__dict__ and not any(len(prefixes) for _, prefixes in prefixes_in(root)):
        for owner, _ in prefixes_in(root):
            del root.get_submodule(owner)._modules[CHILD]
        del root.__dict__[NAMES]
        for config, before in root.__dict__.pop(NOTE):
            config._attn_implementation_internal = before
        for module in root.modules():
            module.__dict__.pop(FLASH, None)
    swap(remove_shift(root, name))
    _swap_callers(root)


def _attend_to_prefixes(root: nn.Module) -> None:
    models = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
    if NOTE not in root.__dict__:
        configs = {id(module.config): module.config for module in models}
        for config in list(configs.values()):
            children = (getattr(config, key, None) for key in config.sub_configs)
            configs |= {id(child): child for child in children if child is not None}
        root.__dict__[NOTE] = [(config, config._attn_implementation_internal) for config in configs.values()]
    for model in models:  # the root is the first; transformers 5.17 leaves out T5's stacks, whose configs are copies
        if model.config._attn_implementation != KEY:
            model.set_attn_implementation(KEY)
        model.__dict__[FLASH] = False  # transformers' continuous batching would take that where it can, and lose them
    _swap_callers(root)


# -- classes: a model that runs the MLPs, checkpointed layers that keep their call ------------------------------------


def _swap_callers(root: nn.Module) -> None:
    """Gives the root, and the checkpointed layers around an attention, the class that prefixes need, or takes it."""
    names = [owner for owner, _ in prefixes_in(root)]
    encodes = any(prefix.encoder is not None for _, prefixes in prefixes_in(root) for prefix in prefixes.values())
    swaps = []
    for name, module in root.named_modules():
        kind = beneath(type(module))
        if isinstance(module, GradientCheckpointingLayer) and not keeps_its_class(module):
            wanted = any(owner.startswith(f"{name}.") for owner in names) or _has_rows(module)
            if wanted is not hasattr(kind, "family_class"):
                fits = keeping_class(kind) if wanted else kind.family_class
                swaps.append((module, again_over(type(module), fits)))
    kind = type(root)
    if encodes is not hasattr(kind, "encodes_prefixes"):
        swaps.append((root, encoding_class(kind) if encodes else kind.family_class))
    swap(swaps)


def _has_rows(layer: nn.Module) -> bool:
    return any(asks_for_rows(module) for module in layer.modules())


@functools.cache
def encoding_class(family_class: type) -> type:
    """A model whose forward first runs the MLPs of its prefixes."""

    @functools.wraps(family_class.forward)
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return family_class.forward(self, *args, **kwargs)
        every = (prefix for _, prefixes in prefixes_in(self) for prefix in prefixes.values())
        encoders = {prefix.encoder: None for prefix in every if prefix.encoder is not None}
        with encoded(encoders):
            return family_class.forward(self, *args, **kwargs)

    return subclass(encoding_class, family_class, {"forward": forward, "encodes_prefixes": True, "for_prefixes": True})
