"""Models with widened blocks, and what a widened model is compared with."""

import copy

import torch
import transformers as hf
from models import VOCAB, assert_as_close_as_peft, base_model, inputs
from torch import nn

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.integrations.widened import Widened
from peft_kernels.modules import bottleneck
from peft_kernels.ops.common.activations import ACTIVATIONS

MODELS = ["llama", "mistral", "qwen2", "gemma", "gpt2", "bert", "bart", "opt", "t5", "gated t5", "phi3"]
OWN = {"llama": "silu", "gpt2": "gelu_tanh", "bert": "gelu", "bart": "gelu", "opt": "relu", "t5": "relu"}  # activations
_PHI3 = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def plain(name: str = "llama") -> nn.Module:
    if name == "phi3":
        torch.manual_seed(1)
        return hf.Phi3ForCausalLM(hf.Phi3Config(**_PHI3)).eval()
    if name == "gated t5":
        return base_model("t5", feed_forward_proj="gated-gelu").eval()
    return base_model(name).eval()


def trained(model: nn.Module, seed: int = 2) -> nn.Module:
    """Gives the adapters weights whose part of the output is as large as the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".bottleneck." in key:
                width = parameter.shape[-1] if parameter.dim() == 2 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5 / 2)
    return model


def adapted(name: str = "llama", config: BottleneckConfig | None = None, **changes) -> nn.Module:
    """A model with one adapter, in eval mode."""
    model = plain(name)
    changes = {"r": 8, "activation": OWN.get(name, "gelu")} | changes
    peft_kernels.attach(model, config or BottleneckConfig.scaled_parallel(**changes))
    return trained(model)


@torch.no_grad()
def logits(model: nn.Module, **more) -> dict:
    return {"logits": model(**inputs() | more).logits}


def by_plain_pytorch(x, r, A, a, B, b, *, activation, scaling, scale, **nothing):
    s = scaling if scale is None else scaling * scale
    r = x if r is None else r
    return r + s * (ACTIVATIONS[activation](x @ A.mT + a) @ B.mT + b)


def reference(model: nn.Module, monkeypatch) -> dict:
    """Logits in float64, the adapters in plain PyTorch."""
    with monkeypatch.context() as patch:
        patch.setattr(bottleneck, "bottleneck_adapter", by_plain_pytorch)
        return logits(copy.deepcopy(model).double())


def assert_same(widened: nn.Module, model: nn.Module, monkeypatch) -> None:
    """Of a widened model: it is as close to plain PyTorch in float64 as the op is."""
    assert_as_close_as_peft(logits(widened), logits(model), reference(model, monkeypatch))


def blocks(model: nn.Module) -> list[Widened]:
    return [module for module in model.modules() if isinstance(module, Widened)]


def snapshot(model: nn.Module) -> tuple:
    tensors = {key: t.detach().clone() for key, t in model.state_dict().items()}
    classes = [(name, type(module)) for name, module in model.named_modules()]
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return tensors, classes, trains


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    tensors, classes, trains = snapshot(model)
    assert list(tensors) == list(before[0])
    assert all(torch.equal(tensors[key], t) and tensors[key].dtype == t.dtype for key, t in before[0].items())
    assert (classes, trains) == before[1:]
