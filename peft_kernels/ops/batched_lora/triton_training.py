"""batched_lora, the training form, on CUDA tensors in Triton: the same signatures and results as reference.py.

Forward: the entries' table (triton_entries.py); shrink, h [M, H]; for each projection expand, which writes b_g and what
the adapters add to every row of y, and the base x W_g^T on top of it, torch's GEMM with beta = 1.
Backward: shrink, ds [M, H]; expand, the adapters' part of dx; dx += dy_g W_g by GEMM; gradients of the factors. dW, db:
PyTorch (a LoRA's base is frozen). The kernels are in triton_rows.py.
Nothing is read back and shapes alone decide the launches, so that calls can be captured in CUDA graphs, and the graph
replayed with other ids in the route. Work is cut by shapes, and sums are added in a fixed order: results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.batched_lora.op import check, check_backward
from peft_kernels.ops.batched_lora.reference import h_columns
from peft_kernels.ops.batched_lora.route import HEADER, TILE
from peft_kernels.ops.batched_lora.triton_entries import entry_table
from peft_kernels.ops.batched_lora.triton_rows import _expand_kernel, _gradient_kernel, _shrink_kernel, _sum_kernel
from peft_kernels.ops.common.dropout import threshold
from peft_kernels.ops.common.triton_products import (
    PROGRAMS,
    accumulator,
    exact_parts,
    low_parts,
    low_type,
    parts_beside_low,
    rank_block,
    unit_rows,
)

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}


def aligned(columns: int) -> bool:
    """Whether rows can all lie on 16 bytes; where not, every element has an address of its own, and tiles are small."""
    return columns % 16 == 0


class _Call:
    """What the launches of one forward or backward share; x and dy are of `dtype`."""

    def __init__(self, dtype: torch.dtype, route: Tensor, M: int, entries: dict, seed: Tensor | None, **outputs):
        self.dtype, self.route, self.seed = dtype, route, seed
        a, b = ([t.contiguous() for t in entries[name]] for name in ("lora_A", "lora_B"))
        self.factors = a, b  # alive until all is launched
        self.table = entry_table(route.device, **(entries | {"lora_A": a, "lora_B": b} | outputs))
        self.M, self.L, self.ranks = M, len(a), [t.shape[0] for t in a]
        self.adapters = len(set(entries["adapter"]))
        self.dropout = any(threshold(p) < 65536 for p in entries["dropout_p"])
        self.factor = a[0].dtype
        self.tiles_at = HEADER + 2 * M
        self.capacity = (route.numel() - self.tiles_at) // 3
        self.types = {
            "ACCUMULATOR": _TYPES[accumulator(dtype)],
            "DTYPE": _TYPES[self.factor],
            "enable_fp_fusion": True,
            "maxnreg": 255,  # left to itself, ptxas spills a few bytes for a little more occupancy
        }
        self.layout = {
            "ALIGNMENT": 16 if all(t.data_ptr() % 16 == 0 for t in (*a, *b)) else 1,
            "EVEN_R": all(r % 8 == 0 for r in self.ranks),
        }

    def tiles(self, others: int) -> tuple[int, int]:
        """Tiles of the route that a program takes, and the number of such groups; `others`: programs for each."""
        several = 2 * TILE * self.adapters <= self.M and self.capacity * others >= 4 * PROGRAMS
        each = 2 if several else 1
        return each, triton.cdiv(self.capacity, each)

    def shrink(self, low: Tensor, wide: Tensor, member: int, members: int, *, of_a: bool) -> None:
        """low = s drop(wide) A^T, or s wide B, for `members` projections from `member` on."""
        R, K, size, dropout = rank_block(max(self.ranks)), wide.shape[1], self.dtype.itemsize, self.dropout and of_a
        columns = {16: 64 if dropout else 128, 32: 64, 64: 32}[R] if size == 2 and aligned(K) else 32
        R = R if size == 2 else min(R, 32)
        blocks = triton.cdiv(max(self.ranks), R)
        each, groups = self.tiles(blocks * members)
        _shrink_kernel[(groups, blocks, members)](
            low, wide, self.seed, self.route, self.table, member, self.M, K, self.L, self.tiles_at,
            wide.stride(0), low.stride(0),
            TILES=each, BLOCK_R=R, BLOCK_K=columns, OF_A=of_a, DROPOUT=dropout,
            FACTOR=exact_parts(self.dtype, self.factor), num_warps=8 if size == 8 else 4,
            num_stages={2: 4, 4: 3, 8: 2}[size], **self.types, **self.layout,
        )  # fmt: skip

    def expand(self, out: Tensor, low: Tensor, bias: Tensor | None, member: int, members: int, *, of_a: bool) -> None:
        """out [M, N] = bias + what the entries of `members` projections from `member` on add."""
        N, size = out.shape[1], self.dtype.itemsize
        block = {2: 128 if aligned(N) else 64, 4: 64, 8: 32}[size]
        blocks = triton.cdiv(N, block)
        each, groups = self.tiles(blocks)
        span = max(1, min(blocks, groups * blocks // (8 * PROGRAMS)))  # column blocks of a program
        parts = parts_beside_low(self.dtype, self.factor)
        few = parts == 1 and self.factor == self.dtype
        _expand_kernel[(groups, triton.cdiv(blocks, span))](
            out, low, bias, self.seed, self.route, self.table, member, members, self.M, N, self.L, self.tiles_at, span,
            low.stride(0),
            TILES=each, BLOCK_N=block, BLOCK_R=min(32 if few else 16, rank_block(max(self.ranks))),
            OF_A=of_a, PRODUCT=_TYPES[low_type(self.dtype)], HAS_BIAS=bias is not None, DROPOUT=self.dropout and of_a,
            PARTS=low_parts(self.dtype, self.dtype), FACTOR=parts,
            num_warps=4, num_stages=1, **self.types, **self.layout,
        )  # fmt: skip

    def gradients(self, wide: Tensor, low: Tensor | None, member: int, sums: int, *, of_a: bool) -> None:
        """dA of all entries, or dB and db of a projection's, to where the table says; `sums`: numbers in them all."""
        N, size = wide.shape[1], self.dtype.itemsize
        block_m, block_n = (64, 128 if aligned(N) else 64) if size == 2 else (32, 32)
        if self.dtype is torch.float16:
            block_m, block_n = 32, 64  # parts of wide: more spill
        block_r = min(32, rank_block(max(self.ranks)))
        rank_blocks, blocks = triton.cdiv(max(self.ranks), block_r), triton.cdiv(N, block_n)
        wanted = triton.cdiv(2 * PROGRAMS, self.L * rank_blocks * blocks)
        pieces = max(1, min(wanted, self.M // (4 * block_m * self.adapters)))
        partial = None if pieces == 1 else wide.new_empty((pieces, sums), dtype=accumulator(self.dtype))
        _gradient_kernel[(self.L * rank_blocks, blocks, pieces)](
            partial, wide, low, self.seed, self.route, self.table, member, rank_blocks, self.M, N, self.L,
            self.tiles_at, pieces, wide.stride(0), 0 if low is None else low.stride(0), sums,
            BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_M=block_m, OF_A=of_a, DROPOUT=self.dropout and of_a,
            HAS_LOW=low is not None, PRODUCT=_TYPES[low_type(self.dtype)], PARTS=low_parts(self.dtype, self.factor),
            WIDE_PARTS=parts_beside_low(self.dtype, self.dtype),
            DIRECT=pieces == 1, EVEN_R=self.layout["EVEN_R"], num_warps=8 if size == 8 else 4,
            num_stages=3 if size == 2 else 2, **self.types,
        )  # fmt: skip
        if pieces > 1:
            largest = (max(self.ranks) + 1) * N
            _sum_kernel[(self.L, triton.cdiv(largest, 512))](
                partial, self.table, member, N, self.L, pieces, sums,
                BLOCK=512, OF_A=of_a, DTYPE=self.types["DTYPE"], num_warps=4, maxnreg=255,
            )  # fmt: skip


def forward(
    x: Tensor,
    route: Tensor,
    weight: list[Tensor],
    bias: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    lora_bias: list[Tensor | None],
    member: list[int],
    adapter: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    check(x, route, weight, bias, lora_A, lora_B, lora_bias, member, adapter, scaling, dropout_p, seed)
    rows, G = x.reshape(-1, x.shape[-1]), len(weight)  # [M, K]
    M = rows.shape[0]
    y = [x.new_empty((M, w.shape[0])) for w in weight]
    h = x.new_zeros((M, h_columns(lora_A, member, G)[-1]), dtype=accumulator(x.dtype))
    if M > 0:
        with torch.cuda.device_of(x):
            added = [None if c is None else c.contiguous() for c in lora_bias]
            entries = _entries(lora_A, lora_B, member, adapter, scaling, dropout_p, G)
            call = _Call(x.dtype, route, M, entries, seed, bias=added)
            call.shrink(h, unit_rows(rows), 0, G, of_a=True)
            for g, (out, w) in enumerate(zip(y, weight, strict=True)):
                call.expand(out, h, None if bias[g] is None else bias[g].contiguous(), g, 1, of_a=False)
                out.addmm_(rows, w.t())
    return [out.reshape(*x.shape[:-1], out.shape[1]) for out in y], h


def _entries(lora_A, lora_B, member, adapter, scaling, dropout_p, G: int) -> dict:
    """What forward and backward give the table alike."""
    numbers = {"member": member, "adapter": adapter, "scaling": scaling, "dropout_p": dropout_p}
    return {"lora_A": lora_A, "lora_B": lora_B, "G": G, **numbers}


def backward(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    route: Tensor,
    weight: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    member: list[int],
    adapter: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    check_backward(dy, x, h, route, weight, lora_A, lora_B, member, adapter, scaling, dropout_p, seed, needs)
    G, L, K = len(weight), len(lora_A), weight[0].shape[1]
    like = [dy[0], *weight, *weight, *lora_A, *lora_B, *lora_B]
    shape = [(*dy[0].shape[:-1], K), *(t.shape for t in weight), *(t.shape[:1] for t in weight)]
    shape += [*(t.shape for t in lora_A), *(t.shape for t in lora_B), *(t.shape[:1] for t in lora_B)]
    if dy[0].numel() == 0:
        return [t.new_zeros(s if need else 0) for t, s, need in zip(like, shape, needs, strict=True)]
    grads = [t.new_empty(s if need else 0) for t, s, need in zip(like, shape, needs, strict=True)]
    dys = [d.reshape(-1, d.shape[-1]) for d in dy]
    rows = None if x is None else x.reshape(-1, K)
    for g in range(G):
        if needs[1 + g]:
            grads[1 + g] = (dys[g].mT @ rows).to(weight[g].dtype)
        if needs[1 + G + g]:
            grads[1 + G + g] = dys[g].sum(0, dtype=accumulator(dy[0].dtype)).to(weight[g].dtype)
    first = 1 + 2 * G
    wanted = [grad if need else None for grad, need in zip(grads[first:], needs[first:], strict=True)]
    with torch.cuda.device_of(dy[0]):
        entries = _entries(lora_A, lora_B, member, adapter, scaling, dropout_p, G)
        outputs = {"gradient_a": wanted[:L], "gradient_b": wanted[L : 2 * L], "bias": wanted[2 * L :]}
        call = _Call(dy[0].dtype, route, dys[0].shape[0], entries, seed, **outputs)
        _low_rank_gradients(call, dys, rows, h, weight, member, grads[0] if needs[0] else None, outputs)
    return grads


def _low_rank_gradients(call: _Call, dys, x, h, weight, member, dx: Tensor | None, outputs: dict) -> None:
    """Fills dx and the entries' gradients."""
    wide, G, ranks = [unit_rows(d) for d in dys], len(weight), call.ranks
    needs_a = any(t is not None for t in outputs["gradient_a"])
    if dx is not None or needs_a:
        width = h_columns(call.factors[0], member, G)[-1]
        ds = dys[0].new_empty((call.M, width), dtype=accumulator(call.dtype))
        for g, d in enumerate(wide):
            call.shrink(ds, d, g, 1, of_a=False)
    if dx is not None:
        out = dx.view(call.M, -1)
        call.expand(out, ds, None, 0, G, of_a=True)
        for d, w in zip(dys, weight, strict=True):
            out.addmm_(d, w)
    if needs_a:
        call.gradients(unit_rows(x), ds, 0, sum(ranks) * x.shape[1], of_a=True)
    for g, d in enumerate(wide):
        mine = [i for i, owner in enumerate(member) if owner == g]
        needs_b = any(outputs["gradient_b"][i] is not None for i in mine)
        if needs_b or any(outputs["bias"][i] is not None for i in mine):
            sums = sum(ranks[i] + 1 for i in mine) * d.shape[1]
            call.gradients(d, h if needs_b else None, g, sums, of_a=False)


FUNCTIONS = {"batched_lora": forward, "batched_lora_backward": backward}
