"""peft_kernels: one frozen model, any number of adapters, at almost the price of the frozen model alone.

import peft_kernels
report = peft_kernels.patch(model)      # the PEFT model that is there trains and generates on fused kernels
"""

import importlib

from peft_kernels import backends, registry
from peft_kernels.methods import BitFitConfig, BottleneckConfig, MAMConfig, PrefixTuningConfig, PTuningV2Config
from peft_kernels.ops import (
    AdapterPool,
    Site,
    SiteAdapter,
    batched_lora,
    batched_lora_route,
    bottleneck_adapter,
    dora_linear,
    dora_norm,
    dora_scale,
    lora_add,
    lora_add_,
    lora_dropout_mask,
    lora_embedding,
    lora_linear,
    lora_linear_group,
    lora_mlp,
    new_seed,
    prefix_attention,
)

registry.link()

__version__ = "0.1.0"
__all__ = [
    "AdapterPool",
    "BitFitConfig",
    "BottleneckConfig",
    "MAMConfig",
    "PTuningV2Config",
    "PatchReport",
    "PeftKernelsCallback",
    "PrefixTuningConfig",
    "Runner",
    "Site",
    "SiteAdapter",
    "active_adapters",
    "adapter_ids",
    "attach",
    "attach_pool",
    "backends",
    "batched_lora",
    "batched_lora_route",
    "bottleneck_adapter",
    "detach",
    "dora_linear",
    "dora_norm",
    "dora_scale",
    "export_prefix",
    "generate_batch",
    "init_continuous_batching",
    "load",
    "lora_add",
    "lora_add_",
    "lora_dropout_mask",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
    "new_seed",
    "patch",
    "prefix_attention",
    "print_trainable_parameters",
    "registry",
    "save_pretrained",
    "set_active",
    "train_all",
    "train_top_layers",
    "unpatch",
    "unwiden",
    "widen",
]

_FROM_INTEGRATIONS = {
    "PatchReport": "transformers",
    "PeftKernelsCallback": "transformers",
    "Runner": "runner",
    "active_adapters": "attach",
    "adapter_ids": "rows",
    "attach": "attach",
    "attach_pool": "pooled",
    "detach": "attach",
    "export_prefix": "adapter_files",
    "generate_batch": "continuous",
    "init_continuous_batching": "continuous",
    "load": "adapter_files",
    "patch": "transformers",
    "print_trainable_parameters": "attach",
    "save_pretrained": "adapter_files",
    "set_active": "attach",
    "train_all": "selective",
    "train_top_layers": "selective",
    "unpatch": "transformers",
    "unwiden": "widening",
    "widen": "widening",
}


def __getattr__(name):  # transformers and peft are imported when patching is asked for, not before
    if name in _FROM_INTEGRATIONS:
        return getattr(importlib.import_module(f"peft_kernels.integrations.{_FROM_INTEGRATIONS[name]}"), name)
    raise AttributeError(f"module 'peft_kernels' has no attribute '{name}'")
