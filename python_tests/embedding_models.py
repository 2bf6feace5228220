"""Models whose tables of embeddings have LoRA, and one table alone."""

import torch
from models import HIDDEN, VOCAB, inputs, lora_config, peft_model, randomise
from peft import get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

TABLES = {
    "llama": ["embed_tokens"],
    "gemma3": ["embed_tokens"],
    "gpt2": ["wte", "wpe"],
    "bert": ["word_embeddings", "position_embeddings", "token_type_embeddings"],
    "bart": ["embed_tokens"],
}


def embedding_model(name: str = "llama", base_changes: dict | None = None, **changes) -> nn.Module:
    return peft_model(name, base_changes, **{"target_modules": TABLES[name]} | changes)


def padded() -> dict[str, Tensor]:
    """Inputs with padding and with tokens that come twice."""
    ids = inputs()["input_ids"].clone()
    ids[:, :2] = 0
    ids[1] = ids[0]
    return {"input_ids": ids, "labels": ids}


def tables(model: nn.Module) -> list[lora.Embedding]:
    return [module for module in model.modules() if isinstance(module, lora.Embedding)]


def several_adapters(name: str = "llama") -> nn.Module:
    model = embedding_model(name)
    targets = {"target_modules": TABLES[name]}
    model.add_adapter("stable", lora_config(r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.5, **targets))
    model.add_adapter("minor", lora_config(r=2, init_lora_weights="mica", **targets))
    model.add_adapter("elsewhere", lora_config(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "stable", "minor", "elsewhere"])
    return randomise(model).train()


class Block(nn.Module):
    """One table called `layer`, the target of the adapters."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, ids, *args, **kwargs):
        return self.layer(ids, *args, **kwargs)


def block(layer: nn.Module | None = None, **changes) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.Embedding(VOCAB, HIDDEN, padding_idx=3) if layer is None else layer
    return randomise(get_peft_model(Block(layer), lora_config(target_modules=["layer"], **changes)))


def ids_of(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape or (2, 7), generator=torch.Generator().manual_seed(3))


def step(model: nn.Module, *args, **kwargs) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(*args or [ids_of()], **kwargs)
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found = {"y": y} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()}
