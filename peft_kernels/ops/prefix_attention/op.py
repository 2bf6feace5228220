"""prefix_attention declared: schema, check, fake, autograd, cost.

o = softmax(scale q [P_k ; K]^T + mask) [P_v ; V] without the concatenation; one prefix per row, shared, or none.
reference.py has the definition, with the other compositions and the gradients.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops.common import projections
from peft_kernels.ops.common.projections import (
    FLOATS,
    accumulator,
    any_requires_grad,
    autocast_to,
    check_seed,
    check_shape,
    dtype_name,
    refuse_tangents,
    require,
)
from peft_kernels.ops.prefix_attention import reference
from peft_kernels.ops.prefix_attention.samples import bad_inputs, evaluate, samples
from peft_kernels.registry import Cost, Function, Op, below_autograd, register

NAME = "prefix_attention"
COMPOSITIONS = ("merge", "add", "relu", "linear")
MAX_HEAD_DIM = 256
TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? prefix_ids, "
    "Tensor? prefix_lengths, Tensor? attn_mask, Tensor? prefix_bias, Tensor? gate, Tensor? key_gate, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
)
NUMBERS = (
    "str composition, float scale, bool is_causal, int sliding_window, bool window_over_prefix, float softcap, "
    "float dropout_p, Tensor? seed"
)
SCHEMA = f"({TENSORS}{NUMBERS}) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor dout, {TENSORS}Tensor out, Tensor lse, Tensor prefix_lse, {NUMBERS}, bool[] needs) -> Tensor[]"
)
GRADIENTS = ("query", "key", "value", "prefix_key", "prefix_value", "gate", "key_gate")

check_tensor = partial(projections.check_tensor, of="query")

# -- check ------------------------------------------------------------------------------------------------------------


def _check_own(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_tensor(NAME, "query", query, query, FLOATS, "float32, float16, bfloat16 or float64")
    require(NAME, query.dim() == 4, f"query must have shape [batch, heads, queries, head_dim], got {list(query.shape)}")
    B, Hq, _, D = query.shape
    require(NAME, Hq >= 1, f"query must have at least one head, got shape {list(query.shape)}")
    text = f"head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {D}"
    require(NAME, 8 <= D <= MAX_HEAD_DIM and D % 8 == 0, text)
    check_tensor(NAME, "key", key, query, (query.dtype,), f"{dtype_name(query.dtype)}, as query")
    text = f"key must have shape [batch={B}, kv_heads, keys, head_dim={D}], got {list(key.shape)}"
    require(NAME, key.dim() == 4 and key.shape[0] == B and key.shape[3] == D and key.shape[1] >= 1, text)
    text = f"key must have a number of heads that divides query's {Hq}, got {key.shape[1]}"
    require(NAME, Hq % key.shape[1] == 0, text)
    check_tensor(NAME, "value", value, query, (query.dtype,), f"{dtype_name(query.dtype)}, as query")
    check_shape(NAME, "value", value, tuple(key.shape), f"{list(key.shape)}, as key")


def _check_prefix(query, key, prefix_key, prefix_value, prefix_ids, prefix_lengths, rows: int) -> None:
    Hkv, D = key.shape[1], key.shape[3]
    check_tensor(NAME, "prefix_key", prefix_key, query, (query.dtype,), f"{dtype_name(query.dtype)}, as query")
    text = (
        f"prefix_key must have shape [prefixes, kv_heads={Hkv}, prefix_length, head_dim={D}], "
        f"got {list(prefix_key.shape)}"
    )
    require(NAME, prefix_key.dim() == 4 and prefix_key.shape[1] == Hkv and prefix_key.shape[3] == D, text)
    check_tensor(NAME, "prefix_value", prefix_value, query, (query.dtype,), f"{dtype_name(query.dtype)}, as query")
    check_shape(NAME, "prefix_value", prefix_value, tuple(prefix_key.shape), f"{list(prefix_key.shape)}, as prefix_key")
    n = prefix_key.shape[0]
    text = f"prefix_ids must be given where there are {n} prefixes: None is for one that every row has"
    require(NAME, prefix_ids is not None or n == 1, text)
    vectors = (("prefix_ids", prefix_ids, rows, "rows"), ("prefix_lengths", prefix_lengths, n, "prefixes"))
    for name, tensor, size, words in vectors:
        if tensor is not None:
            check_tensor(NAME, name, tensor, query, (torch.int32,), "int32")
            check_shape(NAME, name, tensor, (size,), f"[{words}={size}]")


def _check_broadcast(name: str, tensor: Tensor, sizes: dict[str, int], exact: int) -> None:
    """Every size is 1 or the one wanted; the last `exact` ones are the wanted ones."""
    wanted = list(sizes.values())
    free = len(wanted) - exact
    fits = tensor.dim() == len(wanted) and all(
        have == want or (have == 1 and i < free)
        for i, (have, want) in enumerate(zip(tensor.shape, wanted, strict=True))
    )
    words = ", ".join(f"1 or {k}={v}" if i < free else f"{k}={v}" for i, (k, v) in enumerate(sizes.items()))
    require(NAME, fits, f"{name} must have shape [{words}], got {list(tensor.shape)}")


def _check_masks(query, key, prefix_key, attn_mask, prefix_bias, gate, key_gate, rows: int, packed: bool) -> None:
    B, Hq, S, _ = query.shape
    additive = dict.fromkeys((query.dtype, accumulator(query.dtype)))
    rule = " or ".join(dtype_name(dtype) for dtype in additive)
    if attn_mask is not None:
        require(NAME, not packed, "attn_mask must be None where cu_seqlens_q says which keys a sequence has")
        check_tensor(NAME, "attn_mask", attn_mask, query, (torch.bool, *additive), f"bool or {rule}")
        sizes = {"batch": B, "heads": Hq, "queries": S, "keys": key.shape[2]}
        _check_broadcast("attn_mask", attn_mask, sizes, 1)
    if prefix_bias is not None:
        require(NAME, not packed, "prefix_bias must be None where cu_seqlens_q is given")
        check_tensor(NAME, "prefix_bias", prefix_bias, query, tuple(additive), rule)
        sizes = {"batch": B, "heads": Hq, "queries": S, "prefix_length": prefix_key.shape[2]}
        _check_broadcast("prefix_bias", prefix_bias, sizes, 1)
    for name, tensor in (("gate", gate), ("key_gate", key_gate)):
        if tensor is not None:
            check_tensor(NAME, name, tensor, query, tuple(additive), rule)
            _check_broadcast(name, tensor, {"rows": rows, "heads": Hq}, 0)


def _check_packed(query, key, cu_seqlens_q, cu_seqlens_k) -> int:
    """The number of rows: sequences where they are packed, the batch where not."""
    text = "cu_seqlens_q and cu_seqlens_k must be given together"
    require(NAME, (cu_seqlens_q is None) == (cu_seqlens_k is None), text)
    if cu_seqlens_q is None:
        return query.shape[0]
    require(NAME, query.shape[0] == 1, f"query must have a batch of 1 where sequences are packed, got {query.shape[0]}")
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(NAME, name, tensor, query, (torch.int32,), "int32")
        require(
            NAME, tensor.dim() == 1 and len(tensor) >= 1, f"{name} must be [sequences + 1], got {list(tensor.shape)}"
        )
    check_shape(NAME, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "as cu_seqlens_q")
    return len(cu_seqlens_q) - 1


def check(
    query, key, value, prefix_key, prefix_value, prefix_ids, prefix_lengths,
    attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q, cu_seqlens_k,
    composition, scale, is_causal, sliding_window, window_over_prefix, softcap, dropout_p, seed,
) -> None:  # fmt: skip
    """Refuses what the op cannot take, in words. Ids, lengths and cu_seqlens are values: backends bound them."""
    _check_own(query, key, value)
    rows = _check_packed(query, key, cu_seqlens_q, cu_seqlens_k)
    _check_prefix(query, key, prefix_key, prefix_value, prefix_ids, prefix_lengths, rows)
    packed = cu_seqlens_q is not None
    _check_masks(query, key, prefix_key, attn_mask, prefix_bias, gate, key_gate, rows, packed)
    text = f"composition must be one of {', '.join(COMPOSITIONS)}, got '{composition}'"
    require(NAME, composition in COMPOSITIONS, text)
    text = f"prefix_bias must be None where composition is '{composition}': its prefix has no softmax"
    require(NAME, prefix_bias is None or composition in ("merge", "add"), text)
    require(NAME, math.isfinite(scale), f"scale must be finite, got {scale}")
    require(NAME, sliding_window >= 0, f"sliding_window must not be negative (0: none), got {sliding_window}")
    require(NAME, math.isfinite(softcap) and softcap >= 0, f"softcap must be finite, not negative, got {softcap}")
    require(NAME, 0 <= dropout_p < 1, f"dropout_p must lie in [0, 1), got {dropout_p}")
    check_seed(NAME, query, seed, [dropout_p])


def check_values(query, key, prefix_key, prefix_ids, prefix_lengths, cu_seqlens_q, cu_seqlens_k) -> None:
    """What can be read without waiting for a device: on the CPU."""
    for name, tensor, low, high in (
        ("prefix_ids", prefix_ids, -1, prefix_key.shape[0] - 1),
        ("prefix_lengths", prefix_lengths, 0, prefix_key.shape[2]),
    ):
        if tensor is not None and tensor.numel():
            least, most = tensor.min().item(), tensor.max().item()
            text = f"{name} must lie in [{low}, {high}], got {least if least < low else most}"
            require(NAME, low <= least and most <= high, text)
    for name, tensor, size in (
        ("cu_seqlens_q", cu_seqlens_q, query.shape[2]),
        ("cu_seqlens_k", cu_seqlens_k, key.shape[2]),
    ):
        if tensor is not None:
            ends = tensor.tolist()
            rises = ends[0] == 0 and ends[-1] == size and ends == sorted(ends)
            require(NAME, rises, f"{name} must rise from 0 to {size}, got {ends}")


def check_backward(dout, *arguments) -> None:
    """The same for the backward."""
    op = f"{NAME}_backward"
    *tensors, out, lse, prefix_lse = arguments[:16]
    *numbers, needs = arguments[16:]
    check(*tensors, *numbers)
    query, gates = tensors[0], tensors[9:11]
    require(op, len(needs) == len(GRADIENTS), f"needs must have {len(GRADIENTS)} entries, got {len(needs)}")
    for name, tensor in (("dout", dout), ("out", out)):
        check_tensor(op, name, tensor, query, (query.dtype,), f"{dtype_name(query.dtype)}, as query")
        check_shape(op, name, tensor, tuple(query.shape), f"{list(query.shape)}, as query")
    shapes = {"lse": tuple(query.shape[:3]), "prefix_lse": tuple(query.shape[:3]) if numbers[0] == "add" else (0,)}
    wide = accumulator(query.dtype)
    for (name, shape), tensor in zip(shapes.items(), (lse, prefix_lse), strict=True):
        check_tensor(op, name, tensor, query, (wide,), dtype_name(wide))
        check_shape(op, name, tensor, shape, f"{list(shape)}, as the forward returned it")
    for name, tensor, need in zip(GRADIENTS[5:], gates, needs[5:], strict=True):
        require(op, tensor is not None or not need, f"{name} must be given for its gradient")


# -- fake and reference -----------------------------------------------------------------------------------------------


def fake(*arguments):
    check(*arguments)
    query, composition = arguments[0], arguments[13]
    lse = query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))
    prefix_lse = torch.empty_like(lse) if composition == "add" else lse.new_empty(0)
    return reference.by_token(query), lse, prefix_lse


def backward_fake(dout, query, key, value, prefix_key, prefix_value, *rest):
    gates, needs = rest[4:6], rest[-1]
    full = [reference.by_token(t) for t in (query, key, value)]
    full += [t if t is None else t.new_empty(t.shape) for t in (prefix_key, prefix_value, *gates)]
    return [t if need else query.new_empty(0) for t, need in zip(full, needs, strict=True)]


def _check_read(arguments) -> None:
    if not arguments[0].is_cuda:
        check_values(*arguments[:2], arguments[3], *arguments[5:7], *arguments[11:13])


def forward_reference(*arguments):
    check(*arguments)
    _check_read(arguments)
    return reference.forward(*arguments)


def backward_reference(*arguments):
    check_backward(*arguments)
    _check_read(arguments[1:])
    return reference.backward(*arguments)


# -- autograd and autocast --------------------------------------------------------------------------------------------

LEAVES = (0, 1, 2, 3, 4, 9, 10)  # where GRADIENTS stand among the forward's tensors


def autograd(namespace):
    """The kernel of a namespace's Autograd key: a plain call where nothing needs a gradient, else one Function."""
    forward_op, backward_op = namespace.prefix_attention.default, namespace.prefix_attention_backward.default

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, numbers, seed, *tensors):
            with below_autograd():
                out, lse, prefix_lse = forward_op(*tensors, *numbers, seed)
            ctx.save_for_backward(seed, *tensors, out, lse, prefix_lse)
            ctx.numbers = numbers
            ctx.mark_non_differentiable(lse, prefix_lse)
            ctx.set_materialize_grads(False)
            return out, lse, prefix_lse

        @staticmethod
        @once_differentiable
        def backward(ctx, dout, *_):
            grads = [None] * 13
            needs = [ctx.needs_input_grad[2 + i] for i in LEAVES]
            if dout is not None and any(needs):
                seed, *tensors = ctx.saved_tensors
                found = backward_op(dout, *tensors, *ctx.numbers, seed, needs)
                for i, grad, need in zip(LEAVES, found, needs, strict=True):
                    grads[i] = grad if need else None
            return None, None, *grads

    def kernel(*arguments):
        tensors, numbers, seed = arguments[:13], arguments[13:20], arguments[20]
        refuse_tangents(NAME, tensors[0], [tensors[1:]])
        if torch.is_grad_enabled() and any_requires_grad(tensors[0], [tensors[1:]]):
            for name, tensor in (("attn_mask", tensors[7]), ("prefix_bias", tensors[8])):
                text = f"{name} has no gradient here; detach() it, or add it by an attention that differentiates it"
                require(NAME, tensor is None or not tensor.requires_grad, text, TypeError)
            return Attention.apply(numbers, seed, *tensors)
        with below_autograd():
            return forward_op(*arguments)

    return kernel


def autocast(namespace, device_type: str):
    """The kernel of a namespace's Autocast key: queries, keys, values and prefixes take the autocast dtype."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))
    forward_op = namespace.prefix_attention.default

    def kernel(*arguments):
        dtype = torch.get_autocast_dtype(device_type)
        own, mask = [autocast_to(dtype, t) for t in arguments[:5]], arguments[7:9]
        mask = [autocast_to(dtype, t) for t in mask]
        with torch._C._ExcludeDispatchKeyGuard(key):
            return forward_op(*own, *arguments[5:7], *mask, *arguments[9:])

    return kernel


# -- cost and registration --------------------------------------------------------------------------------------------


def cost(query, key, value, prefix_key, *rest) -> dict[str, Cost]:
    """Least flops and bytes, of a batch without packed sequences. A causal query sees half of the last S keys; every
    prefix is read once. Backward: five products for the forward's two; q, K, V, dO, o in, dq, dK, dV out."""
    (B, Hq, S, D), (T, Hkv), P = query.shape, (key.shape[2], key.shape[1]), prefix_key.shape[2]
    is_causal = rest[11]
    pairs = B * Hq * (S * T - (S * (S - 1) // 2 if is_causal and S <= T else 0) + S * P)
    size = query.element_size()
    own, prefix = 2 * B * Hkv * T * D, 2 * len(prefix_key) * Hkv * P * D
    q, lse = B * Hq * S * D, 4 * B * Hq * S
    return {
        "forward": Cost(4 * pairs * D, size * (2 * q + own + prefix) + lse),
        "backward": Cost(10 * pairs * D, size * (4 * q + 2 * (own + prefix)) + lse),
    }


PREFIX_ATTENTION = register(
    Op(
        name=NAME,
        formula="o = softmax(q [P_k ; K]^T) [P_v ; V]",
        functions=(
            Function(NAME, SCHEMA, fake, forward_reference),
            Function(f"{NAME}_backward", BACKWARD_SCHEMA, backward_fake, backward_reference),
        ),
        samples=samples,
        bad_inputs=bad_inputs,
        evaluate=evaluate,
        cost=cost,
        size=(partial(reference.forward, size=True), partial(reference.backward, size=True)),
        rows="query",
        constants=("attn_mask", "prefix_bias"),
        check=check,
        public=NAME,
        autograd=autograd,
        autocast=autocast,
        backends=("reference", "cpu", "cuda"),
    )
)
