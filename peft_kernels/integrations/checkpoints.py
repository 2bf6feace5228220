"""HF PEFT's LoRA adapters, from a folder, the hub or a PeftModel in memory, as what an AdapterPool stores at each site.

Factors keep the checkpoint's values. The scaling is alpha / r (rsLoRA: alpha / sqrt(r), arXiv:2312.03732) with the
patterns for r and alpha applied. DoRA (arXiv:2402.09353, eq. 5) becomes the row's gain and bias: with the layer's
y0 = x W^T + b,

    g (x W^T + s x A^T B^T) + b  =  g (y0 + s x A^T B^T) + (1 - g) b,      g = m / |W + s B A| (norm of each row)

What a pool cannot hold is refused by name: parts of the base model that were trained too, or a base that the method
has changed.
"""

import math
from collections import defaultdict
from collections.abc import Container, Mapping
from os import PathLike

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from peft_kernels.ops import SiteAdapter

Source = str | PathLike | PeftModel

PREFIX = "base_model.model."
SUFFIXES = {  # end of a key -> which tensor of its site it is
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also rewrite the base's weights


def read_adapter(
    source: Source, adapter_name: str, modules: Mapping[str, nn.Module], name: str
) -> dict[str, SiteAdapter]:
    """The parts of an adapter by site. `modules` are the layers that can take adapters; `name` is for messages."""
    if isinstance(source, nn.Module):
        config, tensors, scalings = _of_model(source, adapter_name, name)
    else:
        config, tensors, scalings = *_of_files(source, name), None
    _refuse(config, name)
    sites = _by_site(tensors, modules, name)
    _check_complete(config, sites, modules, name)
    found = {}
    for site, parts in sites.items():
        scaling = _scaling(config, site, len(parts["A"]), name) if scalings is None else scalings[site]
        found[site] = _site_adapter(site, parts, scaling, modules[site])
    return found


def _of_files(source: str | PathLike, name: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    config = PeftConfig.from_pretrained(source)
    try:
        weights = cached_file(source, SAFETENSORS_WEIGHTS_NAME)
    except OSError as error:
        raise ValueError(
            f"adapter '{name}': {source} has no {SAFETENSORS_WEIGHTS_NAME}; a .bin file is a pickle and is not read: "
            "load it with PEFT and save it again"
        ) from error
    return config, load_file(weights)


def _of_model(model: nn.Module, adapter_name: str, name: str) -> tuple[PeftConfig, dict[str, Tensor], dict[str, float]]:
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, PeftModel) or adapter_name not in configs:
        has = f"with the adapters {', '.join(configs)}" if configs else "without adapters"
        raise ValueError(
            f"adapter '{name}': source must be a folder, a hub id or a PeftModel with an adapter '{adapter_name}', "
            f"got a {type(model).__name__} {has}"
        )
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    layers = ((n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer))
    return configs[adapter_name], tensors, {n: m.scaling[adapter_name] for n, m in layers if adapter_name in m.scaling}


def _refuse(config: PeftConfig, name: str) -> None:
    """Raises for what is more than factors on layers."""
    start = f"adapter '{name}':"
    if not isinstance(config, LoraConfig):
        if config.peft_type == PeftType.PREFIX_TUNING:
            raise ValueError(
                f"{start} a pool holds no prefixes; peft_kernels.load(model, folder) gives the model's attentions this "
                "one, and peft_kernels.adapter_ids gives it to rows"
            )
        raise ValueError(f"{start} its peft_type is {config.peft_type.value}; a pool holds LoRA")
    trained = {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": config.bias if config.bias != "none" else None,
    }
    for field, value in trained.items():
        if value:
            raise ValueError(f"{start} {field}={value!r} trains parts of the base model, which all adapters share here")
    unsupported = {
        "target_parameters": config.target_parameters,
        "layer_replication": config.layer_replication,
        "alora_invocation_tokens": config.alora_invocation_tokens,
        "arrow_config": config.arrow_config,
        "use_qalora": config.use_qalora,
        "kasa_config": getattr(config, "kasa_config", None),
        "use_bdlora": getattr(config, "use_bdlora", None),
        "monteclora_config": getattr(config, "monteclora_config", None),
    }
    for field, value in unsupported.items():
        if value:
            raise ValueError(f"{start} {field} is not supported by a pool")
    initial = config.init_lora_weights
    if isinstance(initial, str) and initial.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{start} init_lora_weights={initial!r} has changed the base model too; save it again with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )


def _by_site(tensors: dict[str, Tensor], modules: Mapping[str, nn.Module], name: str) -> dict[str, dict[str, Tensor]]:
    sites = defaultdict(dict)
    for key, tensor in tensors.items():
        site, is_base, _ = key.removeprefix(PREFIX).partition(".base_layer.")
        if is_base:  # PEFT saves an embedding together with the LoRA on it
            weight = modules[site].weight
            if tensor.shape != weight.shape or not torch.equal(tensor.to(weight), weight):
                raise ValueError(f"adapter '{name}': its {key} is not the model's, which all adapters share here")
            continue
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            raise ValueError(f"adapter '{name}': the tensor {key} is not known to a pool")
        sites[key.removesuffix(suffix).removeprefix(PREFIX)][SUFFIXES[suffix]] = tensor
    for site, parts in sites.items():
        modules[site]  # raises where there is none
        if missing := {"A", "B"} - parts.keys():
            raise ValueError(f"adapter '{name}': {site} has no lora_{missing.pop()}")
    return sites


def _check_complete(config: LoraConfig, sites: Container[str], modules: Mapping[str, nn.Module], name: str) -> None:
    """Whether the file has all layers that its config names."""
    if config.target_modules is None:
        return
    missing = [n for n in modules if n not in sites and check_target_module_exists(config, n)]
    if missing:
        raise ValueError(
            f"adapter '{name}': its config targets {missing[0]}, of which it has no tensors ({len(missing)} layers of "
            "the model are missing)"
        )


def _scaling(config: LoraConfig, site: str, rank: int, name: str) -> float:
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), site), config.r)
    if r != rank:
        raise ValueError(f"adapter '{name}': its config says r={r} for {site}, and lora_A has rank {rank}")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), site), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _site_adapter(site: str, parts: dict[str, Tensor], scaling: float, module: nn.Module) -> SiteAdapter:
    a, b, bias = parts["A"], parts["B"], parts.get("bias")
    if isinstance(module, nn.Embedding):
        if "magnitude" in parts:
            raise ValueError(f"{site}: DoRA on an embedding is not supported by a pool")
        return SiteAdapter(a, b, scaling * float(getattr(module, "embed_scale", 1.0)))
    if "magnitude" not in parts:
        return SiteAdapter(a, b, scaling, bias)
    if not scaling:
        b, scaling = torch.zeros_like(b), 1.0
    gain = parts["magnitude"].float() / _norm(module, a, b, scaling)
    base_bias = getattr(module, "bias", None)
    if base_bias is not None:
        bias = (1 - gain) * base_bias.detach().to(gain) / scaling  # the pool adds scaling * bias
    return SiteAdapter(a, b, scaling, bias, gain)


def _norm(module: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """|W + s B A| of each row, in fp32; one dense matrix for the while."""
    weight = module.weight.detach()
    if not weight.is_floating_point():
        raise ValueError(f"DoRA on a quantised {type(module).__name__} is not supported by a pool")
    weight = (weight.t() if isinstance(module, Conv1D) else weight).float()
    return torch.linalg.norm(torch.addmm(weight, b.to(weight), a.to(weight), alpha=scaling), dim=1).cpu()
