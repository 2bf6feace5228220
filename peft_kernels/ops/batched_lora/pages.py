"""Where a pool's numbers lie: pages of 8 rank rows, shared by all sites of one width, and one table per site.

pages [P, 8, width]: a factor of rank R takes ceil(R / 8) pages anywhere, so ranks are never padded to a largest one. A
bias and a gain (minus one) take the rows after the last rank row of B^T. table int32 [slots, 4 + 2 T]: rank, row of the
bias and row of the gain among the rows of the pages (or -1), activation, T pages of A, T pages of B^T; T is doubled
when a larger rank comes. down_bias [slots, 8 T], empty until a slot has one. Growth makes a new tensor and copies:
whoever holds the old one goes on with it, and a captured graph must be captured again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.ops.batched_lora.entries import Stored
from peft_kernels.ops.batched_lora.pooled_reference import FIRST_PAGE, PAGE


def _refuse_growth_in_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("AdapterPool: pages or tables would have to grow while a CUDA graph is captured; add first")


def _keep_for_graphs(replaced: list[Tensor], tensor: Tensor) -> None:
    """Captured graphs and steps in flight on a GPU read it by its address. All that is kept is less than one more copy,
    and nothing where room was reserved first."""
    if tensor.is_cuda:
        replaced.append(tensor)


class PageStore:
    """All rank rows of one width. `pages` is replaced when it grows."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        self.pages = torch.zeros(0, PAGE, width, dtype=dtype, device=device)
        self.growths = 0
        self._free: list[int] = []
        self._replaced: list[Tensor] = []

    def take(self, rows: int) -> list[int]:
        """Numbers of pages with room for some rows; the caller gives them back or loses them."""
        count = -(-rows // PAGE)
        if count > len(self._free):
            self._grow(len(self.pages) + count - len(self._free))
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def reserve(self, pages: int) -> None:
        """Room for so many pages in all."""
        if pages > len(self.pages):
            self._grow(pages)

    def give_back(self, numbers: list[int]) -> None:
        self._free = numbers + self._free

    def write(self, numbers: list[int], rows: Tensor) -> None:
        """rows [R, width] into the first R rows of some pages."""
        for number, piece in zip(numbers, rows.split(PAGE), strict=True):
            self.pages[number, : len(piece)] = piece

    def _grow(self, needed: int) -> None:
        _refuse_growth_in_capture(self.pages.device)
        before = len(self.pages)
        pages = self.pages.new_zeros(max(needed, 2 * before), *self.pages.shape[1:])
        pages[:before] = self.pages
        self._free += range(before, len(pages))
        _keep_for_graphs(self._replaced, self.pages)
        self.pages, self.growths = pages, self.growths + 1


class OfSlots(NamedTuple):
    """What the slots have at one site."""

    table: Tensor  # int32 [slots, 4 + 2 T]
    scaling: Tensor  # [slots], float32 (float64 for float64)
    down_bias: Tensor  # [slots, 8 T], as scaling; [0] where no slot has one


class SiteTable:
    """What one site knows of every slot. `tensors` is replaced, all at once, when a rank needs more columns."""

    def __init__(self, slots: int, wide: torch.dtype, device: torch.device):
        table = torch.zeros(slots, FIRST_PAGE + 2, dtype=torch.int32, device=device)
        table[:, 1:3] = -1  # no bias row, no gain row
        scaling = torch.zeros(slots, dtype=wide, device=device)
        self.tensors = OfSlots(table, scaling, scaling.new_zeros(0))
        self.growths = 0
        self._replaced: list[Tensor] = []
        self.touched = False  # until an adapter touches the site, nobody has to look at it

    def reserve(self, rank: int, down_biased: bool = False) -> None:
        """Room for a rank, and for biases in front of activations."""
        if not self.touched:
            self.touched, self.growths = True, self.growths + 1
        old, scaling, old_biases = self.tensors
        before, needed = (old.shape[1] - FIRST_PAGE) // 2, -(-rank // PAGE)
        biased = down_biased or old_biases.numel() > 0
        if needed <= before and biased == (old_biases.numel() > 0):
            return
        _refuse_growth_in_capture(old.device)
        most = max(needed, 2 * before) if needed > before else before
        table = old.new_zeros(len(old), FIRST_PAGE + 2 * most)
        table[:, : FIRST_PAGE + before] = old[:, : FIRST_PAGE + before]
        table[:, FIRST_PAGE + most : FIRST_PAGE + most + before] = old[:, FIRST_PAGE + before :]
        biases = scaling.new_zeros((len(old), PAGE * most) if biased else 0)
        if old_biases.numel():
            biases[:, : PAGE * before] = old_biases
        for tensor in (old, old_biases):
            _keep_for_graphs(self._replaced, tensor)
        self.tensors, self.growths = OfSlots(table, scaling, biases), self.growths + 1

    def publish(self, slot: int, entry: Stored, a: list[int], b: list[int]) -> None:
        """The row of a slot that nobody reads yet: its rank, which makes the rest count, is written last."""
        rank, (table, scaling, down_bias) = entry.rank, self.tensors
        most = (table.shape[1] - FIRST_PAGE) // 2
        row = [0] * (FIRST_PAGE + 2 * most)
        place = iter(b[r // PAGE] * PAGE + r % PAGE for r in range(rank, len(entry.b)))
        row[1], row[2] = (next(place) if there else -1 for there in (entry.biased, entry.gained))
        row[3] = entry.activation
        pages = -(-rank // PAGE)
        row[FIRST_PAGE : FIRST_PAGE + pages] = a
        row[FIRST_PAGE + most : FIRST_PAGE + most + pages] = b[:pages]
        scaling[slot] = entry.scaling
        if down_bias.numel():
            down_bias[slot, :rank] = 0 if entry.down_bias is None else entry.down_bias
        table[slot, 1:] = torch.tensor(row[1:], dtype=torch.int32, device=table.device)
        table[slot, 0] = rank

    def withdraw(self, slot: int) -> None:
        """The slot no longer touches this site; its pages may be taken after this."""
        self.tensors.table[slot, 0] = 0
