"""bottleneck_adapter on CUDA tensors in Triton: the same signatures and results as reference.py.

Forward: h = n(x) A^T + a [M, E], then y = r + g s drop(drop(f(h)) B^T + b) [M, N], in fp32 (fp64 for fp64). Many rows
and E <= 64: one kernel, a program takes BLOCK_M rows through both products and f(h) never leaves its registers; grid
(row tiles). Otherwise two: shrink, grid (row tiles, E blocks, pieces of K), and expand, grid (row tiles, spans of N
tiles), which adds the pieces of h in their order and draws f(h) again for each N tile where E is more than a block. A
norm costs one kernel more, for its statistics. Backward: triton_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.bottleneck_adapter.op import check
from peft_kernels.ops.bottleneck_adapter.triton_backward import backward
from peft_kernels.ops.bottleneck_adapter.triton_tiles import (
    OPTIONS,
    TYPES,
    as_number,
    cut,
    kept,
    normed,
    number,
    statistics,
    tile,
    up_tile,
    vector,
)
from peft_kernels.ops.common.activations import NAMES
from peft_kernels.ops.common.dropout import threshold
from peft_kernels.ops.common.triton_activations import activated
from peft_kernels.ops.common.triton_products import PROGRAMS, accumulator, product_of_splits, split, unit_rows


@triton.jit
def _down(
    down, start_m, start_e, begin, end, M, K, E,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr,
    NORMED: tl.constexpr, PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_E] of n(x) A^T, over the features from begin to end."""
    x_ptr, stats_ptr, norm_weight_ptr, norm_bias_ptr, a_ptr, stride_xm, stride_ae, stride_ak = down
    rows = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    offs_e = start_e + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    if NORMED:
        mean, reciprocal = tl.load(stats_ptr + rows), tl.load(stats_ptr + M + rows)
    acc = tl.zeros((BLOCK_M, BLOCK_E), ACCUMULATOR)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask_k[None, :], other=0.0)
        if NORMED:
            x = tl.where(mask_k[None, :], normed(x, mean, reciprocal, ACCUMULATOR), 0.0)
            if norm_weight_ptr is not None:
                x *= tl.load(norm_weight_ptr + offs_k, mask=mask_k, other=0.0).to(ACCUMULATOR)[None, :]
            if norm_bias_ptr is not None:
                x += tl.load(norm_bias_ptr + offs_k, mask=mask_k, other=0.0).to(ACCUMULATOR)[None, :]
        a_ptrs = a_ptr + offs_k.to(tl.int64)[:, None] * stride_ak + offs_e.to(tl.int64)[None, :] * stride_ae
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_e[None, :], other=0.0)
        acc = product_of_splits(x, a, acc, PRODUCT, LEFT, RIGHT, 3)
    return acc


@triton.jit
def _biased(h, bias_ptr, offs_e, E):
    """h + a."""
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs_e, mask=offs_e < E, other=0.0).to(h.dtype)[None, :]
    return h


@triton.jit
def _add_up(
    acc, u, b_ptr, stride_bn, stride_be, offs_e, offs_n, E, N,
    PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """acc + u B^T for a block of bottlenecks and a tile of columns."""
    b_ptrs = b_ptr + offs_e.to(tl.int64)[:, None] * stride_be + offs_n.to(tl.int64)[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=(offs_e < E)[:, None] & (offs_n < N)[None, :], other=0.0)
    return product_of_splits(u, b, acc, PRODUCT, LEFT, RIGHT, 2)


@triton.jit
def _store_tile(
    acc, out, seed_ptr, scaling, keep_below, start_m, start_n, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROP_OUT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = r + g s drop(acc + b) for a tile."""
    y_ptr, r_ptr, bias_ptr, scale_ptr, gate_ptr, stride_rm = out
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n, rows = offs_m < M, offs_n < N, offs_m.to(tl.int64)
    mask = mask_m[:, None] & mask_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(acc.dtype)[None, :]
    if DROP_OUT:
        acc = kept(acc, seed_ptr, start_m, start_n, keep_below, BLOCK_M, BLOCK_N)
    acc *= as_number(scaling, acc.dtype)
    if scale_ptr is not None:
        if CHANNELS:
            acc *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(acc.dtype)[None, :]
        else:
            acc *= tl.load(scale_ptr).to(acc.dtype)
    if gate_ptr is not None:
        acc *= tl.load(gate_ptr + offs_m, mask=mask_m, other=0.0).to(acc.dtype)[:, None]
    r = tl.load(r_ptr + rows[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0).to(acc.dtype)
    tl.store(y_ptr + rows[:, None] * N + offs_n[None, :], (r + acc).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "K_blocks"])
def _shrink_kernel(
    h_ptr, bias_ptr, down, M, K, E, K_blocks,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr,
    NORMED: tl.constexpr, PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """h [pieces, M, E]: n(x) A^T + a, or of each piece of K, without a."""
    start_m, start_e, piece = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_E, tl.program_id(2)
    begin = piece * K_blocks * BLOCK_K  # a multiple that the compiler knows: loads are 16 bytes wide
    end = min(begin + K_blocks * BLOCK_K, K)
    h = _down(
        down, start_m, start_e, begin, end, M, K, E,
        BLOCK_M, BLOCK_E, BLOCK_K, ACCUMULATOR, NORMED, PRODUCT, LEFT, RIGHT,
    )  # fmt: skip
    offs_m, offs_e = start_m + tl.arange(0, BLOCK_M), start_e + tl.arange(0, BLOCK_E)
    h = _biased(h, bias_ptr, offs_e, E)
    h_ptrs = h_ptr + (piece.to(tl.int64) * M + offs_m[:, None]) * E + offs_e[None, :]
    tl.store(h_ptrs, h, mask=(offs_m < M)[:, None] & (offs_e < E)[None, :])


@triton.jit
def _bottleneck(
    h_ptr, pieces_ptr, bias_ptr, seed_ptr, keep_below, start_m, start_e, M, E, pieces, first,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, F: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """u = drop(f(h)) for a tile; h is read, or summed from its pieces and, by the `first` to do so, stored."""
    offs_m, offs_e = start_m + tl.arange(0, BLOCK_M), start_e + tl.arange(0, BLOCK_E)
    mask = (offs_m < M)[:, None] & (offs_e < E)[None, :]
    where = offs_m.to(tl.int64)[:, None] * E + offs_e[None, :]
    if pieces_ptr is None:
        h = tl.load(h_ptr + where, mask=mask, other=0.0)
    else:
        h = tl.load(pieces_ptr + where, mask=mask, other=0.0)
        for piece in range(1, pieces):
            h += tl.load(pieces_ptr + tl.cast(piece, tl.int64) * M * E + where, mask=mask, other=0.0)
        h = _biased(h, bias_ptr, offs_e, E)
        if first:
            tl.store(h_ptr + where, h, mask=mask)
    u = activated(h, F)
    if DROP:
        u = kept(u, seed_ptr, start_m, start_e, keep_below, BLOCK_M, BLOCK_E)
    return u


@triton.jit(do_not_specialize=["M", "pieces", "span", "scaling", "keep_below"])
def _expand_kernel(
    h_ptr, pieces_ptr, down_bias_ptr, up, out, seed_ptr, M, N, E, pieces, span, scaling, keep_below,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, ACCUMULATOR: tl.constexpr, F: tl.constexpr,
    DROP: tl.constexpr, DROP_OUT: tl.constexpr, CHANNELS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_M rows and `span` tiles of columns; ONE_BLOCK: u is one tile, made once."""
    b_ptr, stride_bn, stride_be = up
    start_m, begin, first = tl.program_id(0) * BLOCK_M, tl.program_id(1) * span * BLOCK_N, tl.program_id(1) == 0
    if ONE_BLOCK:
        u = _bottleneck(
            h_ptr, pieces_ptr, down_bias_ptr, seed_ptr, keep_below, start_m, 0, M, E, pieces, first,
            BLOCK_M, BLOCK_E, F, DROP,
        )  # fmt: skip
    for n in range(begin, min(begin + span * BLOCK_N, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        if ONE_BLOCK:
            acc = _add_up(acc, u, b_ptr, stride_bn, stride_be, tl.arange(0, BLOCK_E), offs_n, E, N,
                          PRODUCT, LEFT, RIGHT)  # fmt: skip
        else:
            for e in range(0, E, BLOCK_E):
                part = _bottleneck(
                    h_ptr, pieces_ptr, down_bias_ptr, seed_ptr, keep_below, start_m, e, M, E, pieces, first & (n == 0),
                    BLOCK_M, BLOCK_E, F, DROP,
                )  # fmt: skip
                acc = _add_up(acc, part, b_ptr, stride_bn, stride_be, e + tl.arange(0, BLOCK_E), offs_n, E, N,
                              PRODUCT, LEFT, RIGHT)  # fmt: skip
        _store_tile(acc, out, seed_ptr, scaling, keep_below, start_m, n, M, N, BLOCK_M, BLOCK_N, DROP_OUT, CHANNELS)


@triton.jit(do_not_specialize=["M", "scaling", "keep_below"])
def _fused_kernel(
    h_ptr, down_bias_ptr, down, up, out, seed_ptr, M, K, N, E, scaling, keep_below,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    ACCUMULATOR: tl.constexpr, F: tl.constexpr, DROP: tl.constexpr, DROP_OUT: tl.constexpr, CHANNELS: tl.constexpr,
    NORMED: tl.constexpr, DOWN_PRODUCT: tl.constexpr, DOWN_LEFT: tl.constexpr, DOWN_RIGHT: tl.constexpr,
    PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """h and y of BLOCK_M rows; E fits one block."""
    b_ptr, stride_bn, stride_be = up
    start_m = tl.program_id(0) * BLOCK_M
    h = _down(
        down, start_m, 0, 0, K, M, K, E,
        BLOCK_M, BLOCK_E, BLOCK_K, ACCUMULATOR, NORMED, DOWN_PRODUCT, DOWN_LEFT, DOWN_RIGHT,
    )  # fmt: skip
    offs_m, offs_e = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    h = _biased(h, down_bias_ptr, offs_e, E)
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * E + offs_e[None, :]
    tl.store(h_ptrs, h, mask=(offs_m < M)[:, None] & (offs_e < E)[None, :])
    u = activated(h, F)
    if DROP:
        u = kept(u, seed_ptr, start_m, 0, keep_below, BLOCK_M, BLOCK_E)
    for n in range(0, N, BLOCK_N):
        acc = _add_up(
            tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR), u, b_ptr, stride_bn, stride_be, offs_e,
            n + tl.arange(0, BLOCK_N), E, N, PRODUCT, LEFT, RIGHT,
        )  # fmt: skip
        _store_tile(acc, out, seed_ptr, scaling, keep_below, start_m, n, M, N, BLOCK_M, BLOCK_N, DROP_OUT, CHANNELS)


def forward(
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    scaling: float,
    norm: str,
    eps: float,
    dropout_p: float,
    dropout_on: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and h."""
    check(
        x, residual, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias,
        activation, scaling, norm, eps, dropout_p, dropout_on, seed,
    )  # fmt: skip
    rows, N, dtype = unit_rows(x.reshape(-1, x.shape[-1])), up_weight.shape[0], accumulator(x.dtype)
    M = rows.shape[0]
    y, h = x.new_empty((M, N)), x.new_empty((M, down_weight.shape[0]), dtype=dtype)
    if M > 0:
        r = rows if residual is None else unit_rows(residual.reshape(-1, N))
        with torch.cuda.device_of(x):
            stats = statistics(rows, norm, eps)
            down = (rows, stats, vector(norm_weight), vector(norm_bias), down_weight, rows.stride(0),
                    *down_weight.stride())  # fmt: skip
            out = y, r, vector(up_bias), vector(scale), vector(gate), r.stride(0)
            dropped = threshold(dropout_p) < 65536
            constants = {
                "F": NAMES.index(activation),
                "DROP": dropped and dropout_on == "bottleneck",
                "DROP_OUT": dropped and dropout_on == "output",
                "CHANNELS": scale is not None and scale.shape[0] == N,
                "ACCUMULATOR": TYPES[dtype],
                "BLOCK_M": tile(x.dtype, M, h.shape[1], N).M,
            }
            numbers = number(scaling, dtype), threshold(dropout_p)
            _launch(h, vector(down_bias), down, (up_weight, *up_weight.stride()), out, seed, numbers, constants)
    return y.reshape(*x.shape[:-1], N), h


def _launch(h, down_bias, down, up, out, seed, numbers, constants: dict) -> None:
    """Fills h and y with one kernel or two; which, depends on shapes only."""
    (M, E), K, N, x, factor = h.shape, down[0].shape[1], out[0].shape[1], down[0].dtype, up[0].dtype
    low, wide = tile(x, M, E, K), up_tile(x, factor, M, E, N)
    is_normed, one_block = down[1] is not None, E <= wide.E
    into = cut(x, h.dtype if is_normed else x, factor, 3)
    back = cut(x, h.dtype, factor, 2)
    del into["LIMIT"], back["LIMIT"]
    row_tiles = triton.cdiv(M, low.M)
    options = {"num_stages": low.num_stages, **OPTIONS}
    if one_block and 2 * row_tiles >= PROGRAMS:
        _fused_kernel[(row_tiles,)](
            h, down_bias, down, up, out, seed, M, K, N, E, *numbers,
            BLOCK_E=low.E, BLOCK_K=low.W, BLOCK_N=wide.W, NORMED=is_normed,
            **{f"DOWN_{name}": value for name, value in into.items()}, **back, **constants,
            num_warps=max(low.num_warps, wide.num_warps), **options,
        )  # fmt: skip
        return
    blocks = triton.cdiv(E, low.E)
    pieces, K_piece = split(K, low.W, row_tiles * blocks)
    partial = h if pieces == 1 else h.new_empty((pieces, M, E))
    _shrink_kernel[(row_tiles, blocks, pieces)](
        partial, down_bias if pieces == 1 else None, down, M, K, E, K_piece // low.W,
        BLOCK_M=low.M, BLOCK_E=low.E, BLOCK_K=low.W, ACCUMULATOR=constants["ACCUMULATOR"], NORMED=is_normed,
        **into, num_warps=low.num_warps, **options,
    )  # fmt: skip
    tiles = triton.cdiv(N, wide.W)
    spans = min(tiles, max(1, triton.cdiv(2 * PROGRAMS, row_tiles))) if one_block else tiles
    span = triton.cdiv(tiles, spans)
    _expand_kernel[(row_tiles, triton.cdiv(tiles, span))](
        h, None if pieces == 1 else partial, down_bias, up, out, seed, M, N, E, pieces, span, *numbers,
        BLOCK_E=wide.E, BLOCK_N=wide.W, ONE_BLOCK=one_block, **back, **constants,
        num_warps=wide.num_warps, **options,
    )  # fmt: skip


FUNCTIONS = {"bottleneck_adapter": forward, "bottleneck_adapter_backward": backward}
