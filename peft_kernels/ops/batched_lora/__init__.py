"""batched_lora: many LoRA adapters in one batch, each row with its own: for training, and over a pool for inference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels.ops.batched_lora import pooled  # noqa: F401  (importing it registers batched_lora_)
from peft_kernels.ops.batched_lora.entries import SiteAdapter
from peft_kernels.ops.batched_lora.op import check
from peft_kernels.ops.batched_lora.pool import AdapterPool, Site
from peft_kernels.ops.batched_lora.route import OUT_OF_RANGE
from peft_kernels.ops.batched_lora.route import check as check_ids
from peft_kernels.ops.batched_lora.watch import watch

__all__ = ["AdapterPool", "Site", "SiteAdapter", "batched_lora", "batched_lora_route"]


def batched_lora_route(adapter_ids: Tensor, adapters: int) -> Tensor:
    """Sorts the rows of a batch by adapter, once per step, for every `batched_lora` call on these rows.

    Args:
        adapter_ids: int32 or int64 `[M]`, or of x's leading shape: the adapter of each row of x, or -1 for none.
        adapters: how many adapters there are; ids are below it.

    Returns:
        An int32 tensor whose size depends on M and `adapters` alone, on the device of the ids; nothing waits for a GPU.

    Raises:
        ValueError: an id on the CPU is below -1 or not below `adapters`. On a GPU, which is not waited for, such a row
            counts as -1, entry 2 of the route says how many there are, and a later call raises.
        TypeError: adapter_ids is no tensor of integers.

    Example:
        >>> ids = torch.tensor([0, 0, -1, 2], dtype=torch.int32)
        >>> route = peft_kernels.batched_lora_route(ids, adapters=3)
    """
    if isinstance(adapter_ids, Tensor):
        adapter_ids = adapter_ids.reshape(-1)
    try:
        route = torch.ops.peft_kernels.batched_lora_route.default(adapter_ids, adapters)
    except (RuntimeError, TypeError):
        check_ids(adapter_ids, adapters)  # says in words what the operator refused
        raise
    if torch.compiler.is_compiling():
        return route
    if route.is_cuda:
        _watch(route)
    elif route.is_cpu and int(route[OUT_OF_RANGE]):
        outside = [i for i in adapter_ids.tolist() if not -1 <= i < adapters]
        raise ValueError(
            f"batched_lora_route: adapter_ids must be -1 or lie in [0, {adapters}), got {outside[0]} "
            f"({len(outside)} of {adapter_ids.numel()} rows are out of range)"
        )
    return route


def _watch(route: Tensor) -> None:
    capturing = torch.cuda.is_current_stream_capturing()
    watched = watch(route.device, make=not capturing)
    if watched is not None:
        if not capturing:
            watched.check()
        watched.note(route)


def batched_lora(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    member: Sequence[int],
    adapter: Sequence[int],
    scaling: Sequence[float],
    adapter_ids: Tensor | None = None,
    route: Tensor | None = None,
    dropout_p: Sequence[float] | None = None,
    seed: Tensor | None = None,
    lora_bias: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """y_g[i] = x[i] W_g^T + b_g + s_l ((drop_l(x)[i] A_l^T) B_l^T + b_Bl),  l the entry of projection g for i's adapter

    Several projections of one x (q, k and v; gate and up; or one alone), each row with the adapter that its id names
    (many LoRAs in one batch: Chen et al. 2023, arXiv:2310.18547). Rows without one, and projections that an adapter
    does not touch, are plain linear layers. Each entry has its own dropout mask (stream l of the one seed).

    Args:
        x: `[..., K]`, M rows; weight: G tensors `[N_g, K]`; bias: G of `[N_g]` or None. Dtypes and strides as in
            `lora_linear`.
        lora_A, lora_B: L entries `[r_l, K]` and `[N_member[l], r_l]`, all of one dtype; ranks may differ.
        member, adapter: entry l is what adapter[l] adds to projection member[l]; at most one entry for each pair.
        scaling, dropout_p: L floats (dropout_p None: no dropout); lora_bias: L of `[N_member[l]]` or None, or None.
        adapter_ids: int32 or int64 `[M]`, or of x's leading shape: an id of `adapter`, one below their largest, or -1.
        route: instead of adapter_ids, from `batched_lora_route`: made once, for all layers of a model.
        seed: as in `lora_linear`.

    Returns:
        G tensors `[..., N_g]` in x's dtype, accumulated in float32 (float64 for float64).

    Differentiable in x, weight, bias, lora_A, lora_B and lora_bias. The gradients of an entry are dense, those of an
    adapter that no row has are zeros, and NaN in one adapter or row reaches no other.

    Raises:
        ValueError, TypeError: as `lora_linear`, naming the entry; or both or none of adapter_ids and route are given.

    Example:
        >>> x, weight = torch.randn(4, 64), torch.randn(32, 64)
        >>> lora_A = [torch.randn(r, 64, requires_grad=True) for r in (8, 16)]
        >>> lora_B = [torch.zeros(32, r, requires_grad=True) for r in (8, 16)]
        >>> (y,) = peft_kernels.batched_lora(
        ...     x, [weight], [None], lora_A, lora_B, member=[0, 0], adapter=[0, 1], scaling=[2.0, 1.0],
        ...     adapter_ids=torch.tensor([1, 0, -1, 1]))
        >>> y.sum().backward()
    """
    if (adapter_ids is None) == (route is None):
        raise ValueError("batched_lora: adapter_ids or route must be given, and not both")
    if route is None:
        route = batched_lora_route(adapter_ids, 1 + max(adapter, default=0))
    count = len(lora_A)
    arguments = (
        x,
        route,
        list(weight),
        list(bias),
        list(lora_A),
        list(lora_B),
        [None] * count if lora_bias is None else list(lora_bias),
        list(member),
        list(adapter),
        list(scaling),
        [0.0] * count if dropout_p is None else list(dropout_p),
        seed,
    )
    try:
        return torch.ops.peft_kernels.batched_lora.default(*arguments)[0]
    except (RuntimeError, TypeError):
        check(*arguments)  # says in words what the operator refused
        raise
