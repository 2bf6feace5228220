"""dora_scale and its backward on CUDA tensors in Triton: the same signatures and results as dora_reference.py.

y = r + b + g z, g = m / norm [L, N]; one pass over z [M, N]. Grid (row tiles, column tiles).
dz = g dy and, in the same pass over dy and z, the sums of dy z / norm and dy over a chunk of rows; grid (chunks x
owners, column tiles). The owner of a program is an adapter, or none: it takes the rows that are its own, so that dy and
z are read once. The chunks are added by a second kernel in a fixed order. fp32 arithmetic, fp64 for fp64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_products import OPTIONS, unit_rows
from peft_kernels.ops.lora_linear.dora import check_scale, check_scale_backward
from peft_kernels.ops.lora_linear.triton_tiles import sum_partials

ROWS, COLUMNS = 16, 128  # of a tile


@triton.jit
def _load_gains(magnitude_ptr, norm_ptr, where, mask):
    """m / norm."""
    norm = tl.load(norm_ptr + where, mask=mask, other=1.0)
    return tl.load(magnitude_ptr + where, mask=mask, other=1.0).to(norm.dtype) / norm


@triton.jit(do_not_specialize=["M", "L"])
def _scale_kernel(
    y_ptr, z_ptr, magnitude_ptr, norm_ptr, bias_ptr, residual_ptr, ids_ptr, M, N, L, stride_zm, stride_rm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = norm_ptr.dtype.element_ty
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n, rows = offs_m < M, offs_n < N, offs_m.to(tl.int64)
    mask = mask_m[:, None] & mask_n[None, :]
    y = tl.load(z_ptr + rows[:, None] * stride_zm + offs_n[None, :], mask=mask, other=0.0).to(DTYPE)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
        mine = mask & ((ids >= 0) & (ids < L))[:, None]  # the others' gain is 1 / 1
        y *= _load_gains(magnitude_ptr, norm_ptr, ids[:, None] * N + offs_n[None, :], mine)
    else:
        y *= _load_gains(magnitude_ptr, norm_ptr, offs_n, mask_n)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(DTYPE)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0).to(DTYPE)
    tl.store(y_ptr + rows[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "L", "owners", "M_chunk"])
def _backward_kernel(
    dz_ptr, dm_ptr, db_ptr, dy_ptr, z_ptr, magnitude_ptr, norm_ptr, ids_ptr, M, N, L, owners, M_chunk,
    stride_dm, stride_zm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz, dm [chunks, L, N] and db [chunks, owners, N], what is asked for."""
    DTYPE: tl.constexpr = norm_ptr.dtype.element_ty
    part = tl.program_id(0)
    begin = part // owners * M_chunk
    end = min(begin + M_chunk, M)
    owner = tl.cast(part % owners, tl.int64)  # L: of the rows without an adapter
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dm, db = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_N,), DTYPE)
    if dz_ptr is not None:
        gain = _load_gains(magnitude_ptr, norm_ptr, tl.minimum(owner, L - 1) * N + offs_n, mask_n)
        gain = tl.where(owner < L, gain, 1.0)
    for m in range(begin, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mine, rows = offs_m < end, offs_m.to(tl.int64)
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + offs_m, mask=mine, other=-1).to(tl.int64)
            mine = mine & (tl.where((ids >= 0) & (ids < L), ids, L) == owner)
        mask = mine[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_dm + offs_n[None, :], mask=mask, other=0.0).to(DTYPE)
        if dz_ptr is not None:
            dz = (dy * gain[None, :]).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + rows[:, None] * N + offs_n[None, :], dz, mask=mask)
        if dm_ptr is not None:
            z = tl.load(z_ptr + rows[:, None] * stride_zm + offs_n[None, :], mask=mask, other=0.0).to(DTYPE)
            dm += tl.sum(dy * z, 0)
        if db_ptr is not None:
            db += tl.sum(dy, 0)
    if dm_ptr is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if owner < L:
            norm = tl.load(norm_ptr + owner * N + offs_n, mask=mask_n, other=1.0)
            tl.store(dm_ptr + ((part // owners).to(tl.int64) * L + owner) * N + offs_n, dm / norm, mask=mask_n)
    if db_ptr is not None:
        tl.store(db_ptr + part.to(tl.int64) * N + offs_n, db, mask=mask_n)


def scale(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, residual: Tensor | None, ids: Tensor | None
) -> Tensor:
    check_scale(z, magnitude, norm, bias, residual, ids)
    rows, y = _rows(z), z.new_empty(z.shape)
    M, N = rows.shape
    if M == 0:
        return y
    onto = None if residual is None else _rows(residual)
    with torch.cuda.device_of(z):
        _scale_kernel[(triton.cdiv(M, ROWS), triton.cdiv(N, COLUMNS))](
            y, rows, magnitude.contiguous(), norm.contiguous(), _dense(bias), onto, _dense(ids), M, N,
            norm.numel() // N, rows.stride(0), 0 if onto is None else onto.stride(0), BLOCK_M=ROWS, BLOCK_N=COLUMNS,
            num_warps=4, **OPTIONS,
        )  # fmt: skip
    return y


def scale_backward(
    dy: Tensor, z: Tensor | None, magnitude: Tensor | None, norm: Tensor, ids: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    check_scale_backward(dy, z, magnitude, norm, ids, needs)
    N = dy.shape[-1]
    M, L = dy.numel() // N, norm.numel() // N
    like = norm if magnitude is None else magnitude
    shapes = (dy, dy.shape), (like, norm.shape), (dy, N)
    grads = [t.new_empty(shape if need else 0) for (t, shape), need in zip(shapes, needs, strict=True)]
    if M == 0:
        return [grad.zero_() for grad in grads]
    M_chunk = max(256, 16 * L)  # enough rows that the chunks' sums are small beside dy
    chunks, owners = triton.cdiv(M, M_chunk), 1 if ids is None else L + 1
    dm = norm.new_empty((chunks, L, N)) if needs[1] else None
    db = norm.new_empty((chunks * owners, 1, N)) if needs[2] else None
    rows, z_rows = _rows(dy), _rows(z) if needs[1] else None
    with torch.cuda.device_of(dy):
        _backward_kernel[(chunks * owners, triton.cdiv(N, COLUMNS))](
            grads[0] if needs[0] else None, dm, db, rows, z_rows, _dense(magnitude), norm.contiguous(), _dense(ids),
            M, N, L, owners, M_chunk, rows.stride(0), 0 if z_rows is None else z_rows.stride(0),
            BLOCK_M=ROWS, BLOCK_N=COLUMNS, num_warps=4, **OPTIONS,
        )  # fmt: skip
        if dm is not None:
            sum_partials(grads[1].view(L, N), dm)
        if db is not None:
            sum_partials(grads[2][None], db)
    return grads


def _rows(tensor: Tensor) -> Tensor:
    """[M, N] with contiguous rows."""
    return unit_rows(tensor.reshape(-1, tensor.shape[-1]))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


FUNCTIONS = {"dora_scale": scale, "dora_scale_backward": scale_backward}
