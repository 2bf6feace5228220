"""A tiny model and adapters on it, for the tests of bottleneck adapters."""

import torch
from models import base_model, inputs
from torch import nn

from peft_kernels import BottleneckConfig

SERIAL = BottleneckConfig.houlsby(r=4)
PARALLEL = BottleneckConfig.scaled_parallel(r=3)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=inputs()["input_ids"]).logits


def llama(**changes) -> nn.Module:
    return base_model("llama", **changes).eval()


def with_values(model: nn.Module, *names: str) -> nn.Module:
    """Adapters that do something, each its own."""
    with torch.no_grad():
        for seed, name in enumerate(names):
            generator = torch.Generator().manual_seed(seed)
            for key, parameter in model.named_parameters():
                if f".bottleneck.{name}." in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    return model
