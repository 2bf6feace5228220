"""The route of a batch: which rows each adapter has, as tiles of one adapter's rows."""

import torch
from torch import Tensor

TILE = 16
HEADER = 8


def capacity(M: int, adapters: int) -> int:
    """The most tiles that M rows of some of the adapters can fill."""
    return min(M, adapters) + M // TILE


def length(M: int, adapters: int) -> int:
    """Entries of a route."""
    return HEADER + 2 * M + 3 * capacity(M, adapters)


def reference(adapter_ids: Tensor, adapters: int) -> Tensor:
    M = adapter_ids.shape[0]
    valid = (adapter_ids >= 0) & (adapter_ids < adapters)
    order = torch.where(valid, adapter_ids, adapters).argsort(stable=True)
    tiles, first = [], 0
    present, counts = adapter_ids[order][: int(valid.sum())].unique_consecutive(return_counts=True)
    for adapter, count in zip(present.tolist(), counts.tolist(), strict=True):
        tiles += [(adapter, first + row, min(TILE, count - row)) for row in range(0, count, TILE)]
        first += count
    used = len(tiles)
    tiles += [(0, 0, 0)] * (capacity(M, adapters) - used)
    header = torch.tensor([used, first, int((~valid & (adapter_ids != -1)).sum()), M, adapters, 0, 0, 0])
    pieces = [header, torch.where(valid, adapter_ids, -1), order, torch.tensor(tiles).flatten()]
    return torch.cat([piece.to(torch.int32) for piece in pieces])
