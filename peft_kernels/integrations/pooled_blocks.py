"""Bottleneck adapters in a pool: at which places of a model, and how a checkpoint of them is read.

A block that `blocks.sites_of` knows has two sites. `<owner>.bottleneck.parallel` reads the block's input,
`<owner>.bottleneck.serial` its output; both add to the output, in this order, before what the model does next. They are
a child of the block's owner, in the place that `attach` gives to a `BottleneckAdapters`, without parameters.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.integrations.adapter_folders import check_tensors, read
from peft_kernels.integrations.adapterhub import is_adapterhubs
from peft_kernels.integrations.blocks import CHILD, chosen_sites, file_key, shapes
from peft_kernels.integrations.own_parameters import require_base_values
from peft_kernels.integrations.transformers import POOL_SITE
from peft_kernels.integrations.widened import require_unwidened
from peft_kernels.methods import CONFIGS, BitFitConfig, BottleneckConfig, prefix_of
from peft_kernels.modules import OF_STREAM
from peft_kernels.ops import SiteAdapter

FORMS = ("parallel", "serial")
HELD = {"down_weight", "down_bias", "up_weight", "up_bias", "scale"}


def site_name(owner: str, form: str) -> str:
    return f"{owner}.{CHILD}.{form}"


def require_base(model: nn.Module, function: str) -> None:
    """Raises ValueError for a model that gives all rows what adapters have made of it."""
    require_unwidened(model, function)
    require_base_values(model, function)


def read_bottleneck(
    root: nn.Module, source: str | PathLike, said: Any, sites: Mapping[str, nn.Module], name: str
) -> dict[str, SiteAdapter]:
    """The parts of an adapter by site. `said` is its adapter_config.json; `sites` raises for a name that is none."""
    kind = said.get("peft_type") if isinstance(said, dict) else None
    if not is_adapterhubs(said) and kind not in [*CONFIGS]:
        raise ValueError(f"adapter '{name}': the peft_type in {source} must be LORA or BOTTLENECK, got {kind}")
    config, tensors = read(root, source, said)
    _refuse(config, source, name)
    blocks = {site_name(block.name, config.insertion): block for block in chosen_sites(root, config)}
    for site in blocks:
        _check_place(sites, site, name)
    check_tensors(shapes(config, blocks.values()), tensors, source, finite=False)  # the pool's add sees to that
    parts = {site: {key: tensors.get(file_key(block, key)) for key in HELD} for site, block in blocks.items()}
    return {site: _entry(config, held) for site, held in parts.items()}


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


def _refuse(config: BottleneckConfig | BitFitConfig, source, name: str) -> None:
    """Raises for what a pool does not compute."""
    if prefix_of(config):
        raise ValueError(
            f"adapter '{name}': a pool holds no prefixes; peft_kernels.load(model, {str(source)!r}) gives the model's "
            "attentions this one, and peft_kernels.adapter_ids gives it to rows"
        )
    if not isinstance(config, BottleneckConfig):
        raise ValueError(
            f"adapter '{name}': BitFit trains biases of the model, which all adapters share here; "
            f"peft_kernels.load(model, {str(source)!r}) serves it alone"
        )
    reasons = {
        f"norm={config.norm!r} normalises what the adapter reads": config.norm != "none",
        "gate=True works a gate out for each token": config.gate,
        f"modules_to_save={config.modules_to_save!r} trains parts of the model": config.modules_to_save is not None,
        f"reads={config.reads!r} reads the residual stream (reads='output', or 'input', does not)": (
            config.reads in OF_STREAM
        ),
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
