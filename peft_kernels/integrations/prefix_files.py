"""Prefixes of HF PEFT: its prefix_tuning files read and written.

PEFT has one tensor `prompt_embeddings` [P, 2 L Hkv D]; layer l has entries 2l (keys) and 2l + 1 (values) of the second
dimension. Its prefix lies in the cache, so the tokens' positions start at P. It is right for decoder-only models: in an
encoder-decoder its encoder has no prefix and half of the parameters are dead, and a sliding window loses the prefix.
Beside it lies the head that PEFT trains whole with a task_type of `HEADS`: our modules_to_save.
"""

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.integrations.checkpoints import PREFIX
from peft_kernels.integrations.own_parameters import NOTE
from peft_kernels.integrations.prefix_positions import tables_of, turned
from peft_kernels.integrations.prefixes import PrefixSite, device_of, plan_prefixes, prefixes_in
from peft_kernels.methods import PrefixTuningConfig

KIND, TENSOR = "PREFIX_TUNING", "prompt_embeddings"
HEAD = "base_model."  # PEFT puts nothing else around a model with a prefix
HEADS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # end of a class's name -> the task_type with which PEFT trains its head
CLASSIFIERS = ("classifier", "score", "qa_outputs")  # the heads that PEFT then wants in a file


def from_peft(
    root: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor], source: str | PathLike
) -> tuple[PrefixTuningConfig, dict[str, Tensor]]:
    """The config and the tensors, by our keys, of a file of PEFT's for a model."""
    beside = {PREFIX + key.removeprefix(HEAD): tensor for key, tensor in tensors.items() if key.startswith(HEAD)}
    heads = dict.fromkeys(key.removeprefix(PREFIX).rpartition(".")[0] for key in beside)
    config = PrefixTuningConfig(
        num_virtual_tokens=about.get("num_virtual_tokens"), shift_positions=True, modules_to_save=[*heads] or None
    )
    sites = list(plan_prefixes(root, PrefixTuningConfig()).values())
    _require_pefts_layout(f"load: {source}", root, sites)
    P, L, Hkv, D = config.num_virtual_tokens, len(sites), sites[0].heads, sites[0].head_dim
    flat = tensors.get(TENSOR)
    if flat is None or list(flat.shape) != [P, 2 * L * Hkv * D]:
        got = "none" if flat is None else list(flat.shape)
        raise ValueError(f"load: {TENSOR} of {source} must have shape {[P, 2 * L * Hkv * D]} in this model, got {got}")
    if not flat.is_floating_point():
        raise ValueError(f"load: {TENSOR} of {source} must be of a floating-point dtype, got {flat.dtype}")
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))  # what is turned in 16 bits is rounded again
    if absent := [site.name for site in sites if device_of(root.get_submodule(site.name)).type == "meta"]:
        raise ValueError(f"load: the parameters of {absent[0]} are on meta; move them to a device first")
    found = beside
    for site, both in zip(sites, flat.view(P, L, 2, Hkv, D).unbind(1), strict=True):
        attention = root.get_submodule(site.name)
        keys, values = both.permute(1, 2, 0, 3)
        keys = turned(root, attention, keys.to(device_of(attention)), -P).to(values.device)
        found[site.key()] = torch.stack([keys, values]).permute(2, 0, 1, 3)
    return config, found


def to_peft(root: nn.Module, config: Any, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The other way: what PEFT's adapter_config.json says of a prefix, and its tensors. Raises where it has no form."""
    what = f"export_prefix: {name!r}"
    if not isinstance(config, PrefixTuningConfig):
        raise ValueError(f"{what} is no prefix, or is one beside other adapters")
    sites = list(plan_prefixes(root, PrefixTuningConfig()).values())
    _require_pefts_layout(what, root, sites)
    prefixes = dict(prefixes_in(root))
    if config.composition != "merge" or config.gate or any(name not in prefixes[site.name] for site in sites):
        raise ValueError(f"{what}: PEFT has prefixes in all layers, that share the softmax, without gates")
    if tables_of(root) and not config.shift_positions:
        raise ValueError(f"{what}: PEFT's positions start behind the prefix; this one has shift_positions=False")
    task = next((task for end, task in HEADS.items() if type(root).__name__.endswith(end)), None)
    if config.modules_to_save and not task:
        raise ValueError(f"{what}: PEFT's form has no place for modules_to_save={list(config.modules_to_save)}")
    P, L, Hkv, D = config.num_virtual_tokens, len(sites), sites[0].heads, sites[0].head_dim
    layers = []
    for site in sites:
        keys, values = prefixes[site.name][name].baked().detach().permute(1, 2, 0, 3)
        keys = turned(root, root.get_submodule(site.name), keys, P)
        layers.append(torch.stack([keys, values]).permute(2, 0, 1, 3).cpu())  # [P, 2, Hkv, D]
    about = {
        "peft_type": KIND, "task_type": task or ("CAUSAL_LM" if root.can_generate() else "FEATURE_EXTRACTION"),
        "inference_mode": True, "num_virtual_tokens": P, "modules_to_save": config.modules_to_save,
        "num_layers": L, "num_attention_heads": Hkv, "token_dim": Hkv * D, "num_transformer_submodules": 1,
        "prefix_projection": False, "encoder_hidden_size": Hkv * D, "init_weights": None,
        "base_model_name_or_path": root.config._name_or_path or None,
    }  # fmt: skip
    own = root.__dict__[NOTE].own
    heads = {key: value for key, value in root.named_parameters() if task and key.partition(".")[0] in CLASSIFIERS}
    base = {key: value for active in own.base.values() for key, (value, _) in active.items() if key in heads}
    heads = {HEAD + key: value for key, value in (heads | base | own.values(name)).items()}
    return about, heads | {TENSOR: torch.stack(layers, 1).reshape(P, -1)}


def _require_pefts_layout(what: str, root: nn.Module, sites: list[PrefixSite]) -> None:
    if any(site.slot != "decoder" for site in sites) or getattr(root.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{what}: PEFT's prefixes are those of decoder-only models, which a {type(root).__name__} is not; in an "
            "encoder-decoder PEFT's encoder has none and half of its parameters are dead"
        )
    if len({(site.heads, site.head_dim) for site in sites}) > 1:
        raise ValueError(f"{what}: the layers of this model differ in heads or head_dim; PEFT's form is for equal ones")
