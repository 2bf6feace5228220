"""Unsloth's fused projection (`unsloth.kernels.fast_lora.LoRA_W`; tried with 2026.10.9), without the framework."""

import logging

import torch
from packaging.version import Version

from benchmarks.peers.isolated import import_isolated

NAME = "unsloth"


def _stand_ins(device: torch.device) -> dict[str, dict]:
    """Unsloth's probing of the machine, answered for one device; and its companion package, named at import only."""
    absent = dict.fromkeys(("is_hip", "npu_is_available", "arch_lacks_bf16", "is_mlx_available", "hip_visible_archs"))
    return {
        "unsloth.device_type": {name: lambda *_: False for name in absent}
        | {
            "get_device_type": lambda: device.type,
            "DEVICE_TYPE": device.type,
            "DEVICE_TYPE_TORCH": device.type,
            "DEVICE_COUNT": 1 if device.type == "cuda" else 0,
            "ALLOW_PREQUANTIZED_MODELS": True,
            "ALLOW_BITSANDBYTES": False,
        },
        "unsloth.bnb_availability": {"native_kernels_ready": lambda *_: False},
        "unsloth_zoo.utils": {"Version": lambda version: Version(str(version))},
        "unsloth_zoo.log": {"logger": logging.getLogger("unsloth")},
        "unsloth_zoo.temporary_patches.common": {
            "torch_compile": lambda function=None, **_: function or (lambda inner: inner),
            "torch_compile_options": {},
        },
    }


def load(device):
    """f(x, weight, lora_A, lora_B, scaling, p); the kernel takes x in three dimensions."""
    module = import_isolated("unsloth.kernels.fast_lora", _stand_ins(device), required=("triton", "transformers"))

    def call(x, weight, lora_A, lora_B, scaling, p):
        dropout = (p,) if p else ()  # a release without dropout refuses the argument, and is named for it
        return module.LoRA_W.apply(x[None], weight, None, lora_A, lora_B, scaling, *dropout)[0]

    return call
