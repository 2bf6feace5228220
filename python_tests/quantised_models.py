"""Models on bases that are another kernel (4-bit, 8-bit, torchao, a class of your own), and their twins in fp64."""

import copy

import pytest
import torch
from models import LAYERS, Operators, assert_as_close_as_peft, base_model, lora_config, randomise, results
from peft import get_peft_model
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from torch import nn

import peft_kernels
from peft_kernels.integrations.dora import dequantised

PROJECTIONS = 7 * LAYERS


def four_bit(layer):
    bnb = pytest.importorskip("bitsandbytes")
    quantised = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
    )
    quantised.load_state_dict(layer.state_dict())
    quantised.support_avx512bf16_for_cpu = False  # would be packed anew, with scales of 16 bits, which has a test
    return quantised.to("cpu")


def eight_bit(layer):
    bnb = pytest.importorskip("bitsandbytes")
    quantised = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
    )
    quantised.load_state_dict(layer.state_dict())
    return quantised.to("cpu")


def subclassed(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


class Halved(nn.Linear):
    """A layer of somebody who keeps other weights."""

    def forward(self, x):
        return super().forward(x) / 2


def halved(layer):
    twin = Halved(layer.in_features, layer.out_features, layer.bias is not None)
    twin.load_state_dict(layer.state_dict())
    return twin


KINDS = {four_bit: "is_loaded_in_4bit", eight_bit: "is_loaded_in_8bit", subclassed: "", halved: ""}


def quantised(quantise, dtype=torch.float32):
    model = base_model("llama", attention_bias=True).to(dtype)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(owner), child, quantise(module))
    if KINDS[quantise]:
        setattr(model, KINDS[quantise], True)
    return model


def lora_on(quantise, dtype=torch.float32, **changes):
    return randomise(get_peft_model(quantised(quantise, dtype), lora_config(**changes)))


def exactly(model):
    """A twin in fp64 whose bases are the linear layers that the quantised ones stand for."""
    twin = copy.deepcopy(model)
    peft_kernels.unpatch(twin)
    for name, module in model.named_modules():
        base = module._modules.get("base_layer")
        if isinstance(base, nn.Linear):
            scale = 0.5 if isinstance(base, Halved) else 1
            plain = nn.Linear(base.in_features, base.out_features, base.bias is not None)
            plain.weight = nn.Parameter(scale * dequantised(base).detach().double(), requires_grad=False)
            if base.bias is not None:
                plain.bias = nn.Parameter(scale * base.bias.detach().double(), requires_grad=False)
            twin.get_submodule(name).base_layer = plain
            if isinstance(module, AdaLoraLayer):
                twin.get_submodule(name).__class__ = SVDLinear  # that on 8 bits casts x to fp32
    return twin.double()


def assert_step_like_peft(model, calls=PROJECTIONS):
    plain, exact = results(model), results(exactly(model))
    with peft_kernels.patch(model, strict=True) as report, Operators() as operators:
        assert_as_close_as_peft(results(model), plain, exact)
    assert operators.calls["lora_add"] == calls and not report.fallbacks
    assert report.fused == calls
