"""PEFT's variants of a LoRA adapter, as far as they are products that the ops compute; which ones are not, and why.

DoRA is in `dora.py`. MiCA changes how factors begin and which of them train; VeLoRA what training keeps of x;
MonteCLoRA samples A in training. KaSA (arXiv:2412.06071) scales each rank: y = x W^T + b + s (e * (drop(x) A^T)) B^T.
aLoRA (arXiv:2504.12397) is LoRA for the tokens from an invocation on; the others have no adapter (`invocations.py`).
"""

import torch
from peft.tuners.lora import Linear, variants
from torch import Tensor

from peft_kernels.integrations.dora import add_dora
from peft_kernels.integrations.gathering import Call, add_adapter, describe_type, fold

NO_PLACE = "ALora without a place of invocation"


def add_variant(call: Call, layer: Linear, name: str, x: Tensor, types) -> str:
    """Adds an adapter that is a variant to the call's last projection; returns why it cannot be added, or nothing."""
    kind = type(layer.lora_variant[name])
    if kind is variants.DoraLinearVariant:
        return add_dora(call, layer, name, x, types)
    if kind is variants.MiCALinearVariant:
        return add_adapter(call, layer, name, x, types)
    if kind is variants.KasaLinearVariant:
        return _add_kasa(call, layer, name, x, types)
    if kind is variants.ALoraLinearVariant:
        by_token = call.rows is not None and call.rows.by_token
        return add_adapter(call, layer, name, x, types) if by_token else NO_PLACE
    sampled = kind is variants.MontecloraLinearVariant and not layer.training
    compressed = kind is variants.VeloraLinearVariant and not (layer.training and torch.is_grad_enabled())
    if sampled or compressed:
        return add_adapter(call, layer, name, x, types)
    return kind.__name__.removesuffix("LinearVariant") + " changes the maths"


def _add_kasa(call: Call, layer: Linear, name: str, x: Tensor, types) -> str:
    if name in layer._lora_kasa_truncation_deferred:
        return "Kasa has yet to truncate the base layer"
    by_rank = layer._modules["lora_diag"]._parameters[name]
    if type(by_rank) not in types:
        return describe_type(by_rank)
    if by_rank.dtype is not layer._modules["lora_A"]._modules[name].weight.dtype:
        return "factors of several dtypes in one call"
    if reason := add_adapter(call, layer, name, x, types):
        return reason
    call.lora_A[-1], call.lora_B[-1] = fold(call.lora_A[-1], call.lora_B[-1], by_rank)
    return ""
