"""prefix_attention: o = softmax(scale q [P_k ; K]^T) [P_v ; V], the prefixes never copied behind the keys."""

import torch
from torch import Tensor

from peft_kernels.ops.prefix_attention.op import check


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    gate: Tensor | None = None,
    key_gate: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    composition: str = "merge",
    scale: float | None = None,
    is_causal: bool = False,
    sliding_window: int = 0,
    window_over_prefix: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o = softmax(scale q [P_k ; K]^T + mask) [P_v ; V]

    Prefix tuning (Li and Liang 2021, arXiv:2101.00190): every query attends to P trained keys and values beside its
    own. A prefix is read once for all rows that share it; each row of a batch may have another, or none.

    Args:
        query: q `[B, Hq, S, D]`, float32, float16, bfloat16 or float64, any strides; D a multiple of 8 up to 256.
        key, value: `[B, Hkv, T, D]` in q's dtype; Hkv divides Hq, and query head h reads head h // (Hq / Hkv).
        prefix_key, prefix_value: `[n, Hkv, P, D]` in q's dtype.
        prefix_ids: int32 `[B]`, the prefix of each row, -1 for none; None: the only one, for all rows.
        prefix_lengths: int32 `[n]`, how many of the P positions a prefix has; None: all.
        attn_mask: for own keys, `[1|B, 1|Hq, 1|S, T]`: bool (True is seen) or a number that is added. No gradient.
        prefix_bias: added to the logits of the prefix, `[1|B, 1|Hq, 1|S, P]`. No gradient.
        gate: g `[1|rows, 1|Hq]` in float32 or q's dtype, a factor of the prefix's values.
        key_gate: c, likewise, a factor of the prefix's logits.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`, where packed sequences begin and end in a batch of 1. They
            rise from 0 to the number of tokens; on a GPU that is not checked, and what no sequence has is undefined. A
            sequence sees its own keys alone, and ids and gates have one row for each.
        composition: "merge", one softmax over both; "add", one for each, the results added (LLaMA-Adapter,
            arXiv:2303.16199); "relu", relu(scale q P_k^T) for the prefix (multi-head adapter, arXiv:2110.04366);
            "linear", (elu(q) + 1) P_k^T (arXiv:2506.13674).
        scale: None: 1 / sqrt(D).
        is_causal: query i sees keys up to i + T - S. The prefix is seen by every query.
        sliding_window: how many keys up to its own a query sees; 0: all.
        window_over_prefix: whether the prefix slides out of the window too, as if it lay in the cache (HF PEFT).
        softcap: the logits of a softmax become softcap tanh(logits / softcap), before the mask; 0: they do not.
        dropout_p: probability of dropping a weight, in [0, 1); seed: 0-d int64 from `new_seed`, where it is above 0.
        return_lse: also return the log-sum-exp.

    Returns:
        o `[B, Hq, S, D]` in q's dtype, in memory as `[B, S, Hq, D]`; a query that sees nothing gets 0. With
        return_lse also lse `[B, Hq, S]` in float32 (float64 for float64), natural, over what o's softmax was over:
        prefix and own keys for "merge", else own keys.

    Differentiable in query, key, value, prefix_key, prefix_value, gate and key_gate; not through lse.

    Raises:
        ValueError: a shape, a size, a name or a number is out of range, or the seed is missing.
        TypeError: a dtype, a layout or a device does not fit, or a mask requires a gradient.

    Example:
        >>> q, k, v = torch.randn(2, 8, 16, 64), torch.randn(2, 2, 16, 64), torch.randn(2, 2, 16, 64)
        >>> prefix_k, prefix_v = (torch.randn(3, 2, 20, 64, requires_grad=True) for _ in range(2))
        >>> ids = torch.tensor([2, -1], dtype=torch.int32)
        >>> o = peft_kernels.prefix_attention(q, k, v, prefix_k, prefix_v, ids, is_causal=True)
        >>> o.sum().backward()
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = (query, key, value, prefix_key, prefix_value, prefix_ids, prefix_lengths)
    tensors += (attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q, cu_seqlens_k)
    numbers = (composition, scale, is_causal, sliding_window, window_over_prefix, softcap, dropout_p, seed)
    try:
        out, lse, _ = torch.ops.peft_kernels.prefix_attention.default(*tensors, *numbers)
    except (RuntimeError, TypeError):
        check(*tensors, *numbers)  # says in words what the operator refused
        raise
    return (out, lse) if return_lse else out
