"""The route of a batch: which rows each adapter has, as tiles of one adapter's rows. Made once per step, for all sites.

adapter_ids [M], -1 = none; route, int32 [HEADER + 2 M + 3 capacity], capacity = min(M, adapters) + M // TILE:
    [0] tiles used   [1] rows routed   [2] ids out of range, which count as -1   [3] M   [4] adapters   [5..7] zero
    ids    [M]            the ids, those out of range already -1
    order  [M]            row numbers, sorted stably by adapter, rows without one last
    tiles  [capacity, 3]  adapter, first position in order, rows (1 ... TILE): pieces of one adapter's rows in turn;
                          unused tiles are zero
Its size depends on M and adapters alone, so a captured graph can be replayed with other ids. The same layout is in
csrc/batched_lora/batched_lora.h.
"""

import torch
from torch import Tensor

from peft_kernels.ops.common.projections import require
from peft_kernels.registry import Function

NAME = "batched_lora_route"
TILE = 16
HEADER = 8
OUT_OF_RANGE = 2  # where the header counts ids out of range


def capacity(M: int, adapters: int) -> int:
    """The most tiles that M rows of some of the adapters can fill."""
    return min(M, adapters) + M // TILE


def length(M: int, adapters: int) -> int:
    """Entries of a route."""
    return HEADER + 2 * M + 3 * capacity(M, adapters)


def row_ids(route: Tensor, M: int) -> Tensor:
    """The adapter of each row, or -1."""
    return route[HEADER : HEADER + M]


def check(adapter_ids: Tensor, adapters: int) -> None:
    integer = isinstance(adapter_ids, Tensor) and adapter_ids.dtype in (torch.int32, torch.int64)
    got = adapter_ids.dtype if isinstance(adapter_ids, Tensor) else type(adapter_ids).__name__
    require(NAME, integer, f"adapter_ids must be an int32 or int64 tensor, got {got}", TypeError)
    require(NAME, adapter_ids.dim() == 1, f"adapter_ids must have shape [rows], got {list(adapter_ids.shape)}")
    require(NAME, 1 <= adapters < 2**31, f"adapters must be from 1 to 2^31 - 1, got {adapters}")


def fake(adapter_ids: Tensor, adapters: int) -> Tensor:
    check(adapter_ids, adapters)
    return adapter_ids.new_empty(length(adapter_ids.shape[0], adapters), dtype=torch.int32)


def reference(adapter_ids: Tensor, adapters: int) -> Tensor:
    """Nothing is read back from the device and no size depends on the ids, so that a graph can hold it."""
    check(adapter_ids, adapters)
    ids, M = adapter_ids.long(), adapter_ids.shape[0]
    numbers = torch.arange(max(adapters + 1, capacity(M, adapters)), device=ids.device)
    valid = (ids >= 0) & (ids < adapters)
    key = torch.where(valid, ids, adapters)  # rows without an adapter come last
    order = key.argsort(stable=True)
    first = torch.searchsorted(key[order], numbers[: adapters + 1])  # of each adapter's rows; then the number routed
    count = (first.diff() + TILE - 1) // TILE  # tiles of each adapter
    last = count.cumsum(0)

    tile = numbers[: capacity(M, adapters)]
    used = tile < last[-1]
    owner = torch.searchsorted(last, tile, right=True).clamp(max=adapters - 1)
    place = first[owner] + TILE * (tile - last[owner] + count[owner])
    rows = (first[owner + 1] - place).clamp(max=TILE)
    tiles = torch.stack([owner, place, rows], 1) * used[:, None]

    header = ids.new_zeros(HEADER)
    header[0], header[1], header[2] = last[-1], first[-1], (~valid & (ids != -1)).sum()
    header[3], header[4] = M, adapters
    return torch.cat([header, torch.where(valid, ids, -1), order, tiles.flatten()]).to(torch.int32)


ROUTE = Function(NAME, "(Tensor adapter_ids, int adapters) -> Tensor", fake, reference)
