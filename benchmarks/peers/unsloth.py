"""Unsloth's LoRA functions (`unsloth.kernels.fast_lora`; tried with 2026.10.9), without the framework.

LoRA_W is one projection; LoRA_QKV and LoRA_MLP are those of a layer of a Llama.
"""

import logging
from functools import cache

import torch
from packaging.version import Version

from benchmarks.peers.isolated import import_isolated
from benchmarks.peers.layers import Functions

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


@cache
def _module(device: torch.device):
    return import_isolated("unsloth.kernels.fast_lora", _stand_ins(device), required=("triton", "transformers"))


def load(device):
    """f(x, weight, lora_A, lora_B, scaling, p); the kernel takes x in three dimensions."""
    return _projection(_module(device).LoRA_W)


def _projection(function):
    def call(x, weight, lora_A, lora_B, scaling, p):
        dropout = (p,) if p else ()  # a release without dropout refuses the argument, and is named for it
        return function.apply(x[None], weight, None, lora_A, lora_B, scaling, *dropout)[0]

    return call


def layer_functions(device) -> Functions:
    """As Unsloth puts them into a model: gradients of x are written into x where that is a norm's output."""
    module = _module(device)

    def arguments(members):
        return [given for weight, a, b, scaling in members for given in (weight, None, a, b, scaling)]

    def together(function, x, members, kernels, p):
        dropout = ((p,) * 3,) if p else ()
        return function.apply(x, *arguments(members), *kernels, True, *dropout)

    def qkv(x, members, p):
        return together(module.LoRA_QKV, x, members, (), p)

    def mlp(x, members, p):
        kernels = module.swiglu_fg_kernel, module.swiglu_DWf_DW_dfg_kernel
        return together(module.LoRA_MLP, x, members, kernels, p)

    def projection(x, member, p):
        return module.LoRA_W.apply(x, *arguments([member]), *((p,) if p else ()))

    return Functions(qkv, mlp, projection)
