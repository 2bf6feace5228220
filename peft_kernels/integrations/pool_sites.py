"""Where a layer finds its adapters in a pool, and the one in-place call that adds to y what those of the rows say.

An embedding has no x: h[i] is column `token` of its A, gathered, and the identity in place of A makes the rest the call
of a linear layer with R features.
"""

import torch
from torch import Tensor

from peft_kernels.integrations.rows import Rows, rows_in_pool
from peft_kernels.ops import AdapterPool
from peft_kernels.ops.batched_lora.pool import Tables
from peft_kernels.ops.batched_lora.pooled_reference import FIRST_PAGE, PAGE
from peft_kernels.ops.batched_lora.route import HEADER
from peft_kernels.ops.common.in_place import call_in_place

BATCHED_LORA_ = torch.ops.peft_kernels.batched_lora_.default


class PoolSite:
    """Where a layer finds its adapters: a place of a pool. Copies of a model share it. `output`: it is the lm_head."""

    def __init__(self, pool: AdapterPool, name: str, output: bool):
        self.pool, self.name, self.output = pool, name, output

    def rows(self) -> Rows | object | None:
        """What the rows of the present call have in the pool; None where no call gives adapters to rows."""
        return rows_in_pool(self.pool)

    def tables(self) -> Tables:
        return self.pool.tables(self.name)

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("a model cannot be pickled with its AdapterPool; peft_kernels.unpatch(model) takes it off")


# -- one call ---------------------------------------------------------------------------------------------------------


def add_(rows: Rows, x: Tensor, ys: list[Tensor], sites: list[PoolSite]) -> None:
    """Adds to each y what the adapters of the rows say. x [..., K], y_g [..., N_g]."""
    touched = [(y, site) for y, site in zip(ys, sites, strict=True) if site.pool.touched(site.name)]
    if not touched:
        return
    for y, site in touched:
        _check(y, site)
    ys, tables = [y for y, _ in touched], [site.tables() for _, site in touched]
    route = rows.route(x.shape[:-1], x.device)
    x = x.reshape(-1, x.shape[-1]).to(ys[0].dtype)
    call_in_place(
        BATCHED_LORA_,
        [y.view(-1, y.shape[-1]) for y in ys],
        x if x.stride(1) == 1 else x.contiguous(),
        route,
        tables[0].pages_in,
        [t.pages_out for t in tables],
        [t.table for t in tables],
        [t.scaling for t in tables],
        [t.down_bias for t in tables],
    )


def _check(y: Tensor, site: PoolSite) -> None:
    """Whether the pool can add to what a layer has returned."""
    if not isinstance(y, Tensor):
        raise TypeError(f"AdapterPool: {site.name} returns a {type(y).__name__}, to which no adapter can be added")
    if y.requires_grad:
        raise RuntimeError(
            "AdapterPool: a pool is for inference; call the model inside torch.no_grad() or torch.inference_mode(), "
            "and train adapters with PEFT and peft_kernels.patch"
        )
    dtype = site.pool.dtype
    if dtype is not y.dtype and (dtype is not torch.float32 or y.dtype is torch.float64):
        raise TypeError(
            f"AdapterPool: {site.name} computes in {y.dtype} and its pool stores {dtype}; a pool in float32, "
            "attach_pool(model, dtype=torch.float32), serves all layers but those in float64"
        )


def add_embedded_(rows: Rows, tokens: Tensor, y: Tensor, site: PoolSite) -> None:
    """The same for an embedding. tokens [...], y [..., N]; A of the site has a column for each token."""
    if not site.pool.touched(site.name):
        return
    _check(y, site)
    pages_in, pages_out, table, scaling, down_bias = site.tables()
    route = rows.route(tokens.shape, tokens.device)
    T, M = (table.shape[1] - FIRST_PAGE) // 2, tokens.numel()
    slots = route[HEADER : HEADER + M].clamp(min=0).long()
    pages = table[slots, FIRST_PAGE : FIRST_PAGE + T].long()  # [M, T]
    h = pages_in[pages, :, tokens.reshape(-1, 1)].flatten(1)  # [M, 8 T]
    h = h.where(torch.arange(PAGE * T, device=h.device) < table[slots, :1], 0)  # past a rank there may be anything
    identity = torch.eye(PAGE * T, dtype=h.dtype, device=h.device).view(T, PAGE, PAGE * T)
    table = table.clone()
    table[:, FIRST_PAGE : FIRST_PAGE + T] = torch.arange(T, dtype=table.dtype, device=table.device)
    y = y.view(-1, y.shape[-1])
    sums = y.to(h.dtype)  # y itself, where it is of that type
    call_in_place(BATCHED_LORA_, [sums], h, route, identity, [pages_out], [table], [scaling], [down_bias])
    if sums is not y:
        y.copy_(sums)
