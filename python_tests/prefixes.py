"""Prefixes on tiny models, and the slow way to attend to them: row by row, the prefix copied in front of the keys."""

import copy

import torch
from models import VOCAB, base_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

import peft_kernels
from peft_kernels import PrefixTuningConfig

SLOW = "slow_prefix_attention"
LENGTHS = {"long": 5, "short": 2}
ROWS: list[str | None] = []  # the prefix of each row, for the slow attention; []: the active one


def slow_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, softcap=None, **_
):
    """Concatenation; every query sees the whole prefix, and of its own keys what the full mask says. A prefix that does
    not share the softmax adds its part, with its gate."""
    prefixes, outs = module.prefixes, []
    names = [*ROWS] or [prefixes.active_name]
    names = [name for name in names for _ in range(len(query) // len(names))]
    group = query.shape[1] // key.shape[1]
    for r, name in enumerate(names):
        pk, pv = prefixes[name]() if name in prefixes else (key[r, :, :0], value[r, :, :0])
        k, v = (torch.cat([p.to(t.dtype), t[r]], 1).repeat_interleave(group, 0) for p, t in ((pk, key), (pv, value)))
        logits = query[r] @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        raw = logits[..., : pk.shape[1]]
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        before, own = logits.split([pk.shape[1], key.shape[2]], -1)
        own = own if position_bias is None else own + position_bias[0]
        own = own.masked_fill(~attention_mask[r], -torch.inf)
        if name not in prefixes or prefixes[name].composition == "merge":
            weights = torch.softmax(torch.cat([before, own], -1), -1).nan_to_num(0)  # a query that sees nothing
        else:
            features = (nn.functional.elu(query[r]) + 1) @ k[:, : pk.shape[1]].mT
            joins = {"add": torch.softmax(before, -1), "relu": torch.relu(raw), "linear": features}
            gate = 1 if prefixes[name].gate is None else prefixes[name].gate[0, :, None, None]
            part = gate * joins[prefixes[name].composition]
            weights = torch.cat([part, torch.softmax(own, -1).nan_to_num(0)], -1)
        outs.append(weights @ v)
    return torch.stack(outs).transpose(1, 2).contiguous(), None


def full_mask(*, allow_is_causal_skip=True, allow_is_bidirectional_skip=True, **more) -> Tensor:
    return sdpa_mask(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **more)


AttentionInterface.register(SLOW, slow_attention)
AttentionMaskInterface.register(SLOW, full_mask)


def slow(model: nn.Module) -> nn.Module:
    """A copy of a model with prefixes that attends to them the slow way."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != SLOW:
            part.set_attn_implementation(SLOW)
    return model


def with_values(model: nn.Module, deviation: float = 1.0) -> nn.Module:
    """Prefixes whose part of the attention is as large as the tokens'; always the same ones."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".prefixes." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model


def prefixed(name: str = "llama", config: PrefixTuningConfig | None = None, **changes) -> nn.Module:
    """A model with one active prefix."""
    model = base_model(name, **changes).eval()
    peft_kernels.attach(model, config or PrefixTuningConfig(num_virtual_tokens=3))
    return with_values(model)


def several(name: str = "llama", **changes) -> nn.Module:
    """A model with prefixes of different lengths, none of them active."""
    model = base_model(name, **changes).eval()
    for prefix, P in LENGTHS.items():
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=P), prefix)
    peft_kernels.set_active(model, [])
    return with_values(model)


PADDINGS = {"none": None, "right": [7, 4, 2], "left": [-7, -4, -2]}


def padded(padding: str, **more) -> dict[str, Tensor]:
    """Three sequences of up to seven tokens, padded on a side."""
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "labels": ids}
    if lengths := PADDINGS[padding]:
        seen = torch.zeros_like(ids)
        for row, length in zip(seen, lengths, strict=True):
            row[slice(length) if length > 0 else slice(length, None)] = 1
        batch |= {"attention_mask": seen, "labels": ids.where(seen > 0, -100)}
    return batch | more


def of_tokens(model: nn.Module, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Those of the tokens that are no padding; the decoders of encoder-decoders have none here."""
    whole = "attention_mask" not in batch or model.config.is_encoder_decoder
    return logits if whole else logits[batch["attention_mask"] > 0]


def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits of the tokens that are no padding, and every gradient of one step."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    found = {"loss": out.loss, "logits": of_tokens(model, out.logits, batch)}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()}
