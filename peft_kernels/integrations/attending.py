"""The attention function of transformers that knows prefixes, and the masks that go with it.

Both are registered under one key: a key without masks of its own would be given none, and a causal model would look
ahead. The prefixes are a child of the attention module that calls; they never enter the cache, so its length, its
positions and what beams do to it are as without them.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peft_kernels.integrations.packed import from_paged_cache, packed_rows
from peft_kernels.integrations.rows import OUTSIDE, Rows, current, outside_graph
from peft_kernels.modules import Prefix, Prefixes
from peft_kernels.ops import new_seed, prefix_attention

KEY = "peft_kernels"
CHILD = "prefixes"


def mask(*, q_length: int, kv_length: int, q_offset=0, kv_offset: int = 0, allow_is_causal_skip: bool = True, **more):
    """Which keys each query sees [B, 1, S, T], True where it does; None where that is all, up to the causal ones.

    A static cache has keys behind the last query, of which the op would not know: it is given a mask. In a step of
    continuous batching the op is told where each request ends.
    """
    if packed_rows() is not None:
        return None
    last = isinstance(q_offset, int) and q_length + q_offset == kv_length + kv_offset
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        allow_is_causal_skip=allow_is_causal_skip and (last or q_length == kv_length), **more,
    )  # fmt: skip


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, position_bias: Tensor | None = None,
    softcap: float | None = None, **more,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of a module to its own keys and to the prefix of each row."""
    if more.get("s_aux") is not None:
        raise ValueError("prefix_attention: attention sinks (s_aux) and prefixes are not supported together")
    prefixes, cache = module._modules.get(CHILD), more.pop("cache", None)
    rows = None if prefixes is None else current(prefixes) if cache is None else packed_rows()
    if rows is OUTSIDE:
        kept = {"is_causal": is_causal, "position_bias": position_bias, "softcap": softcap}
        return outside_graph(attend, module, query, key, value, attention_mask, dropout, scaling, **kept, **more)
    if rows is not None and prefixes.of_model.isdisjoint(rows.adapters):
        rows = None  # they have adapters of another kind, and the active prefix
    found = _prefixes_of_rows(prefixes, rows, query) if prefixes is not None else None
    if found is None and cache is None and not softcap and (prefixes is None or prefixes.base_attention == "sdpa"):
        plain = {"is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **plain, **more
        )
    causal, where = getattr(module, "is_causal", True) if is_causal is None else is_causal, {}
    if cache is not None:
        key, value, where = from_paged_cache(module, cache, key, value, more.get("sliding_window"), more)
    keys, values, composition, by_row = found or (*_none(key), "merge", {})
    out = prefix_attention(
        query, key, value, keys, values,
        attn_mask=_biased(attention_mask, position_bias, prefixes), **where,
        composition=composition, scale=scaling, is_causal=bool(causal) and attention_mask is None,
        softcap=softcap or 0.0, dropout_p=dropout, seed=new_seed(query.device) if dropout else None, **by_row,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(KEY, attend)
AttentionMaskInterface.register(KEY, mask)


def _biased(seen: Tensor | None, bias: Tensor | None, prefixes: Prefixes | None) -> Tensor | None:
    """The mask and T5's bias as one; its cross-attention has a bias of zeros."""
    cross = prefixes is not None and prefixes.slot == "cross"
    if bias is None or cross or (bias.is_leaf and bias.requires_grad):  # zeros again, in a checkpointed T5
        return seen
    if seen is None:
        return bias
    return bias.masked_fill(~seen, -torch.inf) if seen.dtype is torch.bool else bias + seen


def _none(key: Tensor) -> tuple[Tensor, Tensor]:
    """A prefix of no positions."""
    nothing = key.new_empty(1, key.shape[1], 0, key.shape[3])
    return nothing, nothing


def _prefixes_of_rows(prefixes: Prefixes, rows: Rows | None, query: Tensor):
    """Keys and values [n, Hkv, P, D], the composition, and what says which row has which; None where none has any."""
    if rows is None:
        if prefixes.active_name is None:
            return None
        prefix = prefixes[prefixes.active_name]
        keys, values = (t[None].to(query.dtype) for t in prefix())
        gate = {} if prefix.gate is None else {"gate": prefix.gate.to(_of_gates(query))}
        return keys, values, prefix.composition, gate
    rows.look(prefixes)
    names = [*rows.adapters, prefixes.active_name if rows.others_active else None]  # the last is that of -1
    here = [name for name in dict.fromkeys(names) if name in prefixes]
    if not here:
        return None
    place = [here.index(name) if name in here else -1 for name in names]
    ids = rows.of_sequences(query.shape[0]).to(query.device)
    ids = torch.tensor(place, dtype=torch.int32, device=query.device)[ids.long()]
    found = [prefixes[name] for name in here]
    if len({prefix.composition for prefix in found}) > 1:
        raise ValueError(f"adapter_ids: the prefixes {', '.join(here)} must have the same composition")
    lengths = torch.tensor([prefix.shape[0] for prefix in found], dtype=torch.int32, device=query.device)
    keys, values = _stacked(found, query.dtype)
    by_row = {"prefix_ids": ids, "prefix_lengths": lengths}
    if any(prefix.gate is not None for prefix in found):
        dtype = _of_gates(query)
        ones = torch.ones(1, query.shape[1], device=query.device, dtype=dtype)
        gates = torch.cat([ones if prefix.gate is None else prefix.gate.to(dtype) for prefix in found])
        by_row["gate"] = gates[ids.long().clamp(min=0)]
    return keys, values, found[0].composition, by_row


def _of_gates(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _stacked(prefixes: list[Prefix], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [n, Hkv, P, D] of prefixes of different lengths, zeros behind the shorter ones."""
    P = max(prefix.shape[0] for prefix in prefixes)
    pairs = [prefix() for prefix in prefixes]
    keys, values = (
        torch.stack([nn.functional.pad(t.to(dtype), (0, 0, 0, P - t.shape[1])) for t in of_each])
        for of_each in zip(*pairs, strict=True)
    )
    return keys, values
