"""The op families. Importing one registers it; nothing else happens here."""

from peft_kernels.ops.batched_lora import AdapterPool, Site, SiteAdapter, batched_lora, batched_lora_route
from peft_kernels.ops.bottleneck_adapter import bottleneck_adapter
from peft_kernels.ops.common.dropout import lora_dropout_mask, new_seed
from peft_kernels.ops.lora_linear import (
    dora_linear,
    dora_norm,
    dora_scale,
    lora_add,
    lora_add_,
    lora_embedding,
    lora_linear,
    lora_linear_group,
    lora_mlp,
)
from peft_kernels.ops.prefix_attention import prefix_attention

__all__ = [
    "AdapterPool",
    "Site",
    "SiteAdapter",
    "batched_lora",
    "batched_lora_route",
    "bottleneck_adapter",
    "dora_linear",
    "dora_norm",
    "dora_scale",
    "lora_add",
    "lora_add_",
    "lora_dropout_mask",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
    "new_seed",
    "prefix_attention",
]
