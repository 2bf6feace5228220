"""Bottleneck adapters that AdapterHub's package `adapters` has saved (Poth et al. 2023, arXiv:2311.11077), as ours.

Its files are adapter_config.json and adapter.safetensors. With h the block's output and the stream that is added to it
next, what it calls original_ln_before is reads="sum" here, is_parallel is reads="stream", neither of them is
reads="output". It puts its adapters behind the model's dropout, we put ours in front of it: in evaluation that is the
same. Options without an equal are refused, each by its name.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from peft_kernels.integrations.blocks import Site, file_key, sites_of
from peft_kernels.methods import ALIASES, BottleneckConfig
from peft_kernels.ops.common.activations import ACTIVATIONS

WEIGHTS = "adapter.safetensors"
REMEDY = "load it once with the package adapters and save it with save_adapter(..., use_safetensors=True)"
MODEL_TYPES = ("bart", "bert", "gpt2", "llama", "roberta", "t5")
PLACES = {  # how the name of one of its adapters' places ends -> how the name of the block's owner may end instead
    ".attention_adapters": (".self_attn", ".attn"),
    ".output_adapters": ("", ".mlp"),
    "": ("", ".SelfAttention", ".DenseReluDense"),
}
PARAMETERS = {
    "adapter_down.0.weight": "down_weight",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
    "scaling": "scale",
}
AGAIN = "train one without it"
REFUSED = {  # option -> the value that it must have, and what to do where it has another one
    "architecture": (None, "LoRA, prefix tuning and unions of methods (mam, unipelt) are not read"),
    "ln_before": (
        False,
        "adapters cannot write it as safetensors; norm='layer_norm' of a BottleneckConfig is the same",
    ),
    "ln_after": (False, AGAIN),
    "use_gating": (
        False,
        "its gate is a mean over the sequence; gate=True of a BottleneckConfig has one for each token",
    ),
    "phm_layer": (False, f"Compacter's weights are not read; {AGAIN}"),
    "inv_adapter": (None, f"invertible adapters are not read; {AGAIN}"),
    "cross_adapter": (False, f"adapters at the cross-attention are not read; {AGAIN}"),
    "original_ln_after": (True, "train one with original_ln_after=True"),
    "residual_before_ln": (True, "train one with residual_before_ln=True"),
}
READ = {
    "mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before", "init_weights",
    "is_parallel", "scaling", "leave_out", "dropout", "stochastic_depth",
}  # fmt: skip
WITHOUT_EFFECT = (  # how the names begin of options that say nothing where those above are as they must be
    "adapter_residual_before_ln", "init_weights_seed", "inv_adapter_reduction_factor", "phm_", "learn_phm",
    "factorized_phm", "shared_", "hypercomplex_nonlinearity",
)  # fmt: skip


def is_adapterhubs(about: Any) -> bool:
    """Whether an adapter_config.json is AdapterHub's."""
    return isinstance(about, dict) and "peft_type" not in about and isinstance(about.get("config"), dict)


def config_of(about: dict[str, Any], root: nn.Module, source: str | PathLike) -> BottleneckConfig:
    """What AdapterHub's adapter_config.json says. Raises ValueError for what there is no equal for in this model."""
    model_type = getattr(getattr(root, "config", None), "model_type", None)
    if model_type not in MODEL_TYPES or about.get("model_type") != model_type:
        raise ValueError(
            f"load: {source} is an adapter of AdapterHub for a model of type {about.get('model_type')}, this one is a "
            f"{model_type}; both must be the same one of {', '.join(MODEL_TYPES)}"
        )
    options = about["config"]
    _refuse(options, source)
    sites = sites_of(root)
    width = next((site.width for site in sites), None)
    if about.get("hidden_size") != width:
        raise ValueError(f"load: {source} is for a hidden_size of {about.get('hidden_size')}, this model has {width}")
    parallel, left_out = options.get("is_parallel", False), options.get("leave_out") or []
    places = {(True, True): "both", (True, False): "attention", (False, True): "ffn"}
    init = options.get("init_weights", "bert")
    return BottleneckConfig(
        r=max(1, int(width // options["reduction_factor"])),
        activation=options["non_linearity"].lower(),
        insertion="parallel" if parallel else "serial",
        reads="stream" if parallel else "sum" if options.get("original_ln_before", False) else "output",
        representation=places[options["mh_adapter"], options["output_adapter"]],
        scaling=options.get("scaling", 1.0),
        dropout_p=options.get("dropout", 0.0),
        dropout_on="output",
        drop_path=0.0 if parallel else options.get("stochastic_depth", 0.0),  # a parallel one of theirs has none
        init="mam" if init == "mam_adapter" else init,
        layers=sorted({site.layer for site in sites} - set(left_out)) if left_out else None,
    )


def _refuse(options: dict[str, Any], source: str | PathLike) -> None:
    """Raises for an option that has no equal here."""
    summed = options.get("original_ln_before", False) and not options.get("is_parallel", False)
    for option, (expected, remedy) in REFUSED.items():
        found = options.get(option, expected)
        if found != expected and (summed or option != "residual_before_ln"):
            raise ValueError(f"load: {option} in {source} must be {expected}, got {found!r}: {remedy}")
    strangers = sorted(o for o in options.keys() - REFUSED.keys() - READ if not o.startswith(WITHOUT_EFFECT))
    if strangers:
        raise ValueError(f"load: {source} has an option that is not known, {strangers[0]}={options[strangers[0]]!r}")
    if absent := sorted({"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"} - options.keys()):
        raise ValueError(f"load: adapter_config.json in {source} has no {absent[0]}")
    factor, function = options["reduction_factor"], options["non_linearity"]
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise ValueError(
            f"load: reduction_factor in {source} must be one number for all layers, got {factor!r}; train one with that"
        )
    if ALIASES.get(str(function).lower(), str(function).lower()) not in ACTIVATIONS:
        names = ", ".join((*ACTIVATIONS, *ALIASES))
        raise ValueError(f"load: non_linearity in {source} must be one of {names}, got {function!r}")
    if not (options["mh_adapter"] or options["output_adapter"]):
        raise ValueError(f"load: {source} has neither an mh_adapter nor an output_adapter")


def renamed(tensors: Mapping[str, Tensor], about: dict[str, Any], root: nn.Module, source) -> dict[str, Tensor]:
    """AdapterHub's tensors by the names that they have in our files. Raises ValueError for one without a place."""
    sites = {_bare(site.name, root): site for site in sites_of(root)}
    found = {}
    for key, tensor in tensors.items():
        place, _, parameter = key.partition(f".adapters.{about.get('name')}.")
        site = _site(_bare(place, root), sites)
        if site is None or parameter not in PARAMETERS:
            raise ValueError(f"load: this model has no place for {key} of {source}")
        found[file_key(site, PARAMETERS[parameter])] = tensor
    return found


def _bare(name: str, root: nn.Module) -> str:
    """A name without what a model with a head puts in front of it: bert., model., transformer."""
    head, _, rest = name.partition(".")
    return rest if head in ("model", "transformer", getattr(root, "base_model_prefix", "")) else name


def _site(place: str, sites: dict[str, Site]) -> Site | None:
    end = next(end for end in PLACES if place.endswith(end))
    owners = (place.removesuffix(end) + ours for ours in PLACES[end])
    return next((sites[owner] for owner in owners if owner in sites), None)
