"""The backward of bottleneck_adapter in Triton (reference.py derives it).

    v = (drop(dy) . s) B                           pieces of N, grid (row tiles, E blocks, pieces)
    dh = f'(h) drop(g v), low = g drop(f(h)), dg   grid (row tiles, E blocks; one group of all E for dg)
    dx = n'(x)(dh A) [+ dy]                        grid (row tiles, K tiles)
    the rest                                       sums over the rows: triton_gradients.py
dh and low [M, E] stay in fp32 (fp64). A norm's dx needs two means of each row of dh A: a launch of the same kernel
leaves their sums for each K tile, and dh A is made again, which costs less than an [M, K] matrix kept in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.bottleneck_adapter.op import check_backward
from peft_kernels.ops.bottleneck_adapter.triton_gradients import down_gradients, up_gradients
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
from peft_kernels.ops.common.triton_activations import activated, slope
from peft_kernels.ops.common.triton_dropout import keep_tile
from peft_kernels.ops.common.triton_products import accumulator, product_of_splits, split, unit_rows


@triton.jit(do_not_specialize=["M", "N_blocks", "scaling", "keep_below"])
def _value_kernel(
    v_ptr, added_ptr, dy_ptr, up, up_bias_ptr, scale_ptr, seed_ptr, M, N, E, N_blocks, scaling, keep_below, stride_dym,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, ACCUMULATOR: tl.constexpr,
    DROP_OUT: tl.constexpr, CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """v [pieces, M, E] = (d . s) B and, for the gate, added [pieces, M] = d (s b), each over a piece of N."""
    b_ptr, stride_bn, stride_be = up
    start_m, start_e, piece = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_E, tl.program_id(2)
    offs_m, offs_e = start_m + tl.arange(0, BLOCK_M), start_e + tl.arange(0, BLOCK_E)
    mask_m, mask_e, rows = offs_m < M, offs_e < E, offs_m.to(tl.int64)
    v = tl.zeros((BLOCK_M, BLOCK_E), ACCUMULATOR)
    added = tl.zeros((BLOCK_M,), ACCUMULATOR)
    begin = piece * N_blocks * BLOCK_N  # a multiple that the compiler knows: loads are 16 bytes wide
    for n in range(begin, min(begin + N_blocks * BLOCK_N, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        d_ptrs = dy_ptr + rows[:, None] * stride_dym + offs_n[None, :]
        d = tl.load(d_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if DROP_OUT:
            d = tl.where(keep_tile(seed_ptr, start_m, n, 0, keep_below, BLOCK_M, BLOCK_N), d, 0.0)
        b_ptrs = b_ptr + offs_n.to(tl.int64)[:, None] * stride_bn + offs_e.to(tl.int64)[None, :] * stride_be
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_e[None, :], other=0.0)
        if CHANNELS:
            s = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(ACCUMULATOR)
            b = b.to(ACCUMULATOR) * s[:, None]
        v = product_of_splits(d, b, v, PRODUCT, LEFT, RIGHT, LIMIT)
        if added_ptr is not None:
            bias = tl.load(up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACCUMULATOR)
            if CHANNELS:
                bias *= s
            added += tl.sum(d.to(ACCUMULATOR) * bias[None, :], 1)
    s = as_number(scaling, ACCUMULATOR) * tl.full((1,), 1.0, ACCUMULATOR)
    if DROP_OUT:
        s *= 65536.0 / tl.cast(keep_below, ACCUMULATOR)
    if scale_ptr is not None and not CHANNELS:
        s *= tl.load(scale_ptr).to(ACCUMULATOR)
    v_ptrs = v_ptr + (piece.to(tl.int64) * M + rows[:, None]) * E + offs_e[None, :]
    tl.store(v_ptrs, v * s[:, None], mask=mask_m[:, None] & mask_e[None, :])
    if added_ptr is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if start_e == 0:
            tl.store(added_ptr + piece.to(tl.int64) * M + rows, added * s, mask=mask_m)


@triton.jit(do_not_specialize=["M", "pieces", "E_group", "keep_below"])
def _slope_kernel(
    dh_ptr, low_ptr, gate_gradient_ptr, v_ptr, added_ptr, h_ptr, gate_ptr, seed_ptr, M, E, pieces, E_group, keep_below,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, ACCUMULATOR: tl.constexpr, F: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """dh = f'(h) drop(g v), low = g drop(f(h)), and the gate's gradient rowsum(v . u) + d (s b), what is asked for."""
    start_m, begin = tl.program_id(0) * BLOCK_M, tl.program_id(1) * E_group
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m, rows = offs_m < M, offs_m.to(tl.int64)
    if gate_ptr is not None:
        g = tl.load(gate_ptr + offs_m, mask=mask_m, other=0.0).to(ACCUMULATOR)
    total = tl.zeros((BLOCK_M,), ACCUMULATOR)
    for e in range(begin, min(begin + E_group, E), BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E)
        mask = mask_m[:, None] & (offs_e < E)[None, :]
        where = rows[:, None] * E + offs_e[None, :]
        h = tl.load(h_ptr + where, mask=mask, other=0.0)
        u = activated(h, F)
        if DROP:
            u = kept(u, seed_ptr, start_m, e, keep_below, BLOCK_M, BLOCK_E)
        if v_ptr is not None:
            v = tl.load(v_ptr + where, mask=mask, other=0.0)
            for piece in range(1, pieces):
                v += tl.load(v_ptr + tl.cast(piece, tl.int64) * M * E + where, mask=mask, other=0.0)
            if gate_gradient_ptr is not None:
                total += tl.sum(v * u, 1)
            if gate_ptr is not None:
                v *= g[:, None]
            if DROP:
                v = kept(v, seed_ptr, start_m, e, keep_below, BLOCK_M, BLOCK_E)
            tl.store(dh_ptr + where, slope(h, F) * v, mask=mask)
        if low_ptr is not None:
            if gate_ptr is not None:
                u *= g[:, None]
            tl.store(low_ptr + where, u, mask=mask)
    if gate_gradient_ptr is not None:
        if added_ptr is not None:
            for piece in range(pieces):
                total += tl.load(added_ptr + tl.cast(piece, tl.int64) * M + rows, mask=mask_m, other=0.0)
        tl.store(gate_gradient_ptr + rows, total.to(gate_gradient_ptr.dtype.element_ty), mask=mask_m)


@triton.jit(do_not_specialize=["M"])
def _input_kernel(
    out_ptr, sums_ptr, dh_ptr, a_ptr, x_ptr, stats_ptr, norm_weight_ptr, dy_ptr, M, K, E,
    stride_ae, stride_ak, stride_xm, stride_dym,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr,
    NORMED: tl.constexpr, CENTRED: tl.constexpr,
    PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """dx from t = (dh A) . w and sums [2, M] of t and t . n over K; without out, those sums for each K tile."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m, mask_k, rows = offs_m < M, offs_k < K, offs_m.to(tl.int64)
    inside = mask_m[:, None] & mask_k[None, :]
    t = tl.zeros((BLOCK_M, BLOCK_K), ACCUMULATOR)
    for e in range(0, E, BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E)
        mask_e = offs_e < E
        dh_ptrs = dh_ptr + rows[:, None] * E + offs_e[None, :]
        dh = tl.load(dh_ptrs, mask=mask_m[:, None] & mask_e[None, :], other=0.0)
        a_ptrs = a_ptr + offs_e.to(tl.int64)[:, None] * stride_ae + offs_k.to(tl.int64)[None, :] * stride_ak
        a = tl.load(a_ptrs, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
        t = product_of_splits(dh, a, t, PRODUCT, LEFT, RIGHT, LIMIT)
    if NORMED:
        if norm_weight_ptr is not None:
            t *= tl.load(norm_weight_ptr + offs_k, mask=mask_k, other=0.0).to(ACCUMULATOR)[None, :]
        mean = tl.load(stats_ptr + rows, mask=mask_m, other=0.0)
        reciprocal = tl.load(stats_ptr + M + rows, mask=mask_m, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=inside, other=0.0)
        n = tl.where(mask_k[None, :], normed(x, mean, reciprocal, ACCUMULATOR), 0.0)
    if out_ptr is None:
        sums_ptrs = sums_ptr + tl.program_id(1).to(tl.int64) * 2 * M + rows
        tl.store(sums_ptrs, tl.sum(t, 1), mask=mask_m)
        tl.store(sums_ptrs + M, tl.sum(t * n, 1), mask=mask_m)
    else:
        if NORMED:
            size = tl.cast(K, ACCUMULATOR)
            t -= n * (tl.load(sums_ptr + M + rows, mask=mask_m, other=0.0) / size)[:, None]
            if CENTRED:
                t -= (tl.load(sums_ptr + rows, mask=mask_m, other=0.0) / size)[:, None]
            t *= reciprocal[:, None]
        if dy_ptr is not None:
            dy = tl.load(dy_ptr + rows[:, None] * stride_dym + offs_k[None, :], mask=inside, other=0.0)
            t += dy.to(ACCUMULATOR)
        out_ptrs = out_ptr + rows[:, None] * K + offs_k[None, :]
        tl.store(out_ptrs, t.to(out_ptr.dtype.element_ty), mask=inside)


def _values(dys, up_weight, up_bias, scale, scaling, dropped, seed, *, gated: bool):
    """v [pieces, M, E] and, for the gate's gradient, d (s b) [pieces, M]."""
    (M, N), E, dtype, factor = dys.shape, up_weight.shape[1], accumulator(dys.dtype), up_weight.dtype
    low, channels = tile(dys.dtype, M, E, N), scale is not None and scale.shape[0] == N
    grid = triton.cdiv(M, low.M), triton.cdiv(E, low.E)
    pieces, N_piece = split(N, low.W, grid[0] * grid[1])
    v = dys.new_empty((pieces, M, E), dtype=dtype)
    added = dys.new_empty((pieces, M), dtype=dtype) if gated and up_bias is not None else None
    _value_kernel[(*grid, pieces)](
        v, added, dys, (up_weight, *up_weight.stride()), up_bias, scale, seed, M, N, E, N_piece // low.W,
        number(scaling, dtype), dropped, dys.stride(0),
        BLOCK_M=low.M, BLOCK_E=low.E, BLOCK_N=low.W, ACCUMULATOR=TYPES[dtype], DROP_OUT=dropped < 65536,
        CHANNELS=channels, **cut(dys.dtype, dys.dtype, dtype if channels else factor, 3 if factor.itemsize > 2 else 2),
        num_warps=low.num_warps, num_stages=low.num_stages, **OPTIONS,
    )  # fmt: skip
    return v, added


def _slopes(h, v, added, gate, gate_gradient, activation, dropped, seed, *, needs_low: bool):
    """dh and low, [M, E]; fills the gate's gradient."""
    (M, E), block = h.shape, 32
    dh = None if v is None else torch.empty_like(h)
    low = torch.empty_like(h) if needs_low else None
    group = block if gate_gradient is None else E
    _slope_kernel[(triton.cdiv(M, 16), triton.cdiv(E, group))](
        dh, low, gate_gradient, v, added, h, gate, seed, M, E, 1 if v is None else v.shape[0], group, dropped,
        BLOCK_M=16, BLOCK_E=block, ACCUMULATOR=TYPES[h.dtype], F=NAMES.index(activation), DROP=dropped < 65536,
        num_warps=4, **OPTIONS,
    )  # fmt: skip
    return dh, low


def _input_gradient(out, dh, down_weight, x, stats, norm, norm_weight, dys) -> None:
    """Fills out [M, K]; dys: what is added to it, or None."""
    (M, K), E, dtype = out.shape, dh.shape[1], dh.dtype
    wide = up_tile(x.dtype, down_weight.dtype, M, E, K)
    grid = triton.cdiv(M, wide.M), triton.cdiv(K, wide.W)

    def launch(to, sums, added):
        _input_kernel[grid](
            to, sums, dh, down_weight, x, stats, norm_weight, added, M, K, E,
            *down_weight.stride(), x.stride(0), 0 if added is None else added.stride(0),
            BLOCK_M=wide.M, BLOCK_E=wide.E, BLOCK_K=wide.W, ACCUMULATOR=TYPES[dtype], NORMED=stats is not None,
            CENTRED=norm == "layer_norm", **cut(x.dtype, dtype, down_weight.dtype, 2),
            num_warps=wide.num_warps, num_stages=wide.num_stages, **OPTIONS,
        )  # fmt: skip

    sums = None
    if stats is not None:
        of_tiles = dh.new_empty((grid[1], 2, M))
        launch(None, of_tiles, None)
        sums = of_tiles.sum(0)
    launch(out, sums, dys)


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    down_weight: Tensor,
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
    serial: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias)."""
    check_backward(
        dy, x, h, down_weight, up_weight, up_bias, scale, gate, norm_weight, norm_bias,
        activation, scaling, norm, eps, dropout_p, dropout_on, seed, serial, needs,
    )  # fmt: skip
    (E, K), N = down_weight.shape, up_weight.shape[0]
    shapes = [x.shape, (E, K), (E,), (N, E), (N,), (1,) if scale is None else scale.shape, x.shape[:-1], (K,), (K,)]
    like, make = [x] + [down_weight] * 8, torch.Tensor.new_empty if h.numel() else torch.Tensor.new_zeros
    grads = [make(t, s if need else (0,)) for t, s, need in zip(like, shapes, needs, strict=True)]
    if h.numel() == 0:
        return grads
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    dys, rows = unit_rows(dy.reshape(-1, N)), unit_rows(x.reshape(-1, K))
    needs_down, needs_up = any(needs[i] for i in (1, 2, 7, 8)), any(needs[3:6])
    dropped = threshold(dropout_p)
    on_bottleneck, on_output = (dropped if dropout_on == on else 65536 for on in ("bottleneck", "output"))
    up_bias, scale, gate, norm_weight, norm_bias = map(vector, (up_bias, scale, gate, norm_weight, norm_bias))
    with torch.cuda.device_of(x):
        v = added = dh = low = None
        if needs[0] or needs_down or needs[6]:
            v, added = _values(dys, up_weight, up_bias, scale, scaling, on_output, seed, gated=needs[6])
        if v is not None or needs_up:
            dh, low = _slopes(h, v, added, gate, wanted[6], activation, on_bottleneck, seed, needs_low=needs_up)
        stats = statistics(rows, norm, eps) if needs[0] or needs_down else None
        if needs[0]:
            _input_gradient(
                wanted[0].view(-1, K), dh, down_weight, rows, stats, norm, norm_weight, dys if serial else None
            )
        if needs_down:
            down_gradients(wanted[1], wanted[2], wanted[7], wanted[8], dh, rows, stats, down_weight, norm_weight,
                           norm_bias)  # fmt: skip
        if needs_up:
            up_gradients(*wanted[3:6], low, dys, gate, up_weight, up_bias, scale, scaling, on_output, seed)
    return grads
