"""Bottleneck adapters in a pool: at which places of a model, and how a checkpoint of them is read.

A block that `blocks.sites_of` knows has two sites. `<owner>.bottleneck.parallel` reads the block's input,
`<owner>.bottleneck.serial` its output; both add to the output, in this order, before what the model does next. They are
a child of the block's owner, in the place that `attach` gives to a `BottleneckAdapters`, without parameters.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from peft_kernels.integrations.blocks import CHILD, Site
from peft_kernels.integrations.checkpoints import PREFIX
from peft_kernels.integrations.transformers import POOL_SITE
from peft_kernels.methods import BottleneckConfig
from peft_kernels.modules import OF_STREAM
from peft_kernels.ops import SiteAdapter

FORMS = ("parallel", "serial")
HELD = {"down_weight", "down_bias", "up_weight", "up_bias", "scale"}


def site_name(owner: str, form: str) -> str:
    return f"{owner}.{CHILD}.{form}"


def bottleneck_config(source) -> dict | None:
    """What adapter_config.json says where it is one of a bottleneck adapter."""
    try:
        about = json.loads(Path(cached_file(source, CONFIG_NAME)).read_text())
    except (OSError, ValueError):
        return None  # PEFT's reader says what is wrong
    ours = isinstance(about, dict) and about.pop("peft_type", None) == BottleneckConfig.peft_type
    return about if ours else None


def read_bottleneck(
    source, about: dict, blocks: list[Site], sites: Mapping[str, nn.Module], name: str
) -> dict[str, SiteAdapter]:
    """The parts of an adapter by site. `sites` raises for a name that is none; `name` is for messages."""
    about.pop("base_model_name_or_path", None)
    config = BottleneckConfig.from_dict(about)
    _refuse(config, source, name)
    try:
        tensors = load_file(cached_file(source, SAFETENSORS_WEIGHTS_NAME))
    except OSError as error:
        raise ValueError(f"adapter '{name}': {source} has no {SAFETENSORS_WEIGHTS_NAME}") from error
    except SafetensorError as error:
        raise ValueError(f"adapter '{name}': {SAFETENSORS_WEIGHTS_NAME} in {source} cannot be read: {error}") from error
    by_owner = defaultdict(dict)
    for key, tensor in tensors.items():
        owner, found, parameter = key.removeprefix(PREFIX).rpartition(f".{CHILD}.")
        if not found or parameter not in HELD:
            raise ValueError(f"adapter '{name}': the tensor {key} is not known to a pool")
        by_owner[owner][parameter] = tensor
    wanted = {
        block.name: block
        for block in blocks
        if block.block.representation in config.representations
        and (config.layers is None or block.layer in config.layers)
    }
    if missing := [owner for owner in wanted if owner not in by_owner]:
        raise ValueError(f"adapter '{name}': its config has an adapter at {missing[0]}, of which it has no tensors")
    entries = {}
    for owner, parts in by_owner.items():
        site = site_name(owner, config.insertion)
        _check_place(sites, site, name)
        if owner not in wanted:
            raise ValueError(f"adapter '{name}': it has tensors at {owner}, where its config has no adapter")
        _check_parts(config, wanted[owner], parts, name)
        entries[site] = _entry(config, parts)
    return entries


def _check_parts(config: BottleneckConfig, block: Site, parts: dict[str, Tensor], name: str) -> None:
    """Raises where the tensors at a block are not those of its config."""
    made = config.adapter(block.width, "meta")
    expected = {key: list(parameter.shape) for key, parameter in made.named_parameters()}
    if missing := expected.keys() - parts.keys():
        raise ValueError(f"adapter '{name}': {block.name} has no {min(missing)}")
    if strangers := parts.keys() - expected.keys():
        raise ValueError(f"adapter '{name}': {block.name} has a {min(strangers)}, which its config has not")
    for key, shape in expected.items():
        if list(parts[key].shape) != shape:
            got = list(parts[key].shape)
            raise ValueError(f"adapter '{name}': {key} of {block.name} must have shape {shape}, got {got}")


def _check_place(sites: Mapping[str, nn.Module], site: str, name: str) -> None:
    """Raises where a model has no such site, or had it: `attach` takes the places that no adapter has touched."""
    try:
        there = POOL_SITE in sites[site].__dict__
    except AttributeError:
        there = False
    if not there:
        raise ValueError(
            f"adapter '{name}': the block of {site} has bottleneck adapters of the model's own; peft_kernels.detach "
            "takes them off, and after peft_kernels.unpatch attach_pool makes a pool with a site there"
        )


def _refuse(config: BottleneckConfig, source, name: str) -> None:
    """Raises for what a pool does not compute."""
    reasons = {
        f"norm={config.norm!r} normalises what the adapter reads": config.norm != "none",
        "gate=True works a gate out for each token": config.gate,
        f"reads={config.reads!r} is where a pool has no site": config.reads in OF_STREAM,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(
                f"adapter '{name}': {reason}, which a pool does not hold; "
                f"peft_kernels.load(model, {str(source)!r}) serves it alone"
            )


def _entry(config: BottleneckConfig, parts: dict[str, Tensor]) -> SiteAdapter:
    """A learned number becomes the scaling; a scale for each channel goes into the up projection and its bias."""
    up, bias, scaling = parts["up_weight"], parts["up_bias"], config.scaling
    if scaling == "learned":
        scaling = float(parts["scale"])
    elif scaling == "channel":
        scale = parts["scale"].to(torch.promote_types(parts["scale"].dtype, torch.float32))
        up, bias, scaling = scale[:, None] * up, scale * bias, 1.0
    return SiteAdapter(parts["down_weight"], up, scaling, bias, None, config.activation, parts["down_bias"])
