"""batched_lora_ in plain PyTorch: the definition that every backend is measured against. Never optimised.

y_g[i] += s (sum_r u[i, r] B^T[r] + b),  u[i, r] = f(sum_k x[i, k] A[r, k] + a[r]),  all of the slot of row i in slice g
y_g[i] <- (1 + d) (y_g[i] + s sum_r u[i, r] B^T[r]) + s b                      where the slot has a gain, stored as d
LoRA has no a and the identity for f; a bottleneck adapter (arXiv:1902.00751) may have both. Factors lie in pages of 8
rank rows, A in pages_in and B^T in pages_out_g. A row of table_g: rank, rows of b and d among the rows of pages_out_g
(or -1), f by its place in ACTIVATIONS, then T pages of A and T pages of B^T. down_bias_g [slots, 8 T] holds a, or is
empty where no slot has one. Rank 0: the slot does not touch slice g. Arithmetic in fp32 for all 16- and 32-bit inputs,
in fp64 for fp64; the result is rounded once. Pages that no routed slot names are not read, nor anything past a rank.
All of x is read before y is written: x may lie where some y lies (an adapter behind a layer reads the layer's output).
"""

import torch
from torch import Tensor

from peft_kernels.ops.batched_lora.route import HEADER
from peft_kernels.ops.common.activations import EXACT, NAMES

PAGE = 8  # rank rows of a page
FIRST_PAGE = 4  # where the page numbers begin in a table row


def tiles(route: Tensor, M: int) -> list[tuple[int, Tensor]]:
    """(slot, rows) of each tile of a route."""
    order, entries = route[HEADER + M : HEADER + 2 * M].long(), route[HEADER + 2 * M :].view(-1, 3).tolist()
    return [(slot, order[first : first + count]) for slot, first, count in entries[: int(route[0])]]


def rank_rows(pages: Tensor, numbers: Tensor, rank: int) -> Tensor:
    """The rows of one factor, from its pages: [rank, width]."""
    return pages[numbers[: -(-rank // PAGE)].long()].flatten(0, 1)[:rank]


def add_(y, x, route, pages_in, pages_out, table, scaling, down_bias) -> None:
    accumulator = torch.float64 if x.dtype is torch.float64 else torch.float32
    x = x.to(accumulator, copy=True)
    for slot, rows in tiles(route, x.shape[0]):
        slices = zip(y, pages_out, table, scaling, down_bias, strict=True)
        for y_g, pages, table_g, scaling_g, down_bias_g in slices:
            rank, bias_row, gain_row, activation, *_ = table_g[slot].tolist()
            if rank == 0:
                continue
            s, stored = scaling_g[slot], pages.flatten(0, 1)
            numbers_a, numbers_b = table_g[slot, FIRST_PAGE:].chunk(2)
            a = rank_rows(pages_in, numbers_a, rank).to(accumulator)  # [R, K]
            b = rank_rows(pages, numbers_b, rank).to(accumulator)  # [R, N]
            h = x[rows] @ a.mT
            if down_bias_g.numel():
                h += down_bias_g[slot, :rank]
            delta = EXACT[NAMES[activation]](h) @ b
            if bias_row >= 0 and gain_row < 0:
                delta += stored[bias_row].to(accumulator)
            total = y_g[rows].to(accumulator) + s * delta
            if gain_row >= 0:
                total += stored[gain_row].to(accumulator) * total
            if bias_row >= 0 and gain_row >= 0:
                total += s * stored[bias_row].to(accumulator)
            y_g[rows] = total.to(y_g.dtype)
