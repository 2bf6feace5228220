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
    check(adapter_ids, adapters)
    M = adapter_ids.shape[0]
    valid = (adapter_ids >= 0) & (adapter_ids < adapters)
    outside = int((~valid & (adapter_ids != -1)).sum())
    order = torch.where(valid, adapter_ids, adapters).argsort(stable=True)
    tiles, first = [], 0
    present, counts = adapter_ids[order][: int(valid.sum())].unique_consecutive(return_counts=True)
    for adapter, count in zip(present.tolist(), counts.tolist(), strict=True):
        tiles += [(adapter, first + row, min(TILE, count - row)) for row in range(0, count, TILE)]
        first += count
    tiles += [(0, 0, 0)] * (capacity(M, adapters) - len(tiles))
    used = sum(rows > 0 for _, _, rows in tiles)
    header = torch.tensor([used, first, outside, M, adapters, 0, 0, 0])
    pieces = [header, torch.where(valid, adapter_ids, -1), order, torch.tensor(tiles).flatten()]
    return torch.cat([piece.to(adapter_ids.device, torch.int32) for piece in pieces])


ROUTE = Function(NAME, "(Tensor adapter_ids, int adapters) -> Tensor", fake, reference)
