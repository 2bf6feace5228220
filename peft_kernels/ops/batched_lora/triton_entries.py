"""What the Triton kernels of batched_lora's training form read of the route and of the entries, on the device.

A kernel that took each entry's tensors as arguments would be compiled anew for every number of entries, and one launch
could take few. So a small kernel writes their numbers and addresses into a table, int64 [FIELDS, L], once per call: one
launch of a phase then serves any number of entries, and a captured graph holds the table's making too. The numbers are
arguments of that kernel, not a copy from the host, which a graph could not replay.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.batched_lora.reference import h_columns
from peft_kernels.ops.batched_lora.route import HEADER, TILE
from peft_kernels.ops.common.dropout import threshold

FIELDS = 14
ADAPTER = tl.constexpr(0)
MEMBER = tl.constexpr(1)
RANK = tl.constexpr(2)
COLUMN = tl.constexpr(3)  # of h, where its member's block begins
KEEP_BELOW = tl.constexpr(4)
SCALING = tl.constexpr(5)  # the low half of a double's bits, and in the next field the high one
A = tl.constexpr(7)  # addresses of what is contiguous; 0 where there is none
B = tl.constexpr(8)
BIAS = tl.constexpr(9)  # forward: lora_bias; backward: its gradient
GRADIENT_A = tl.constexpr(10)
GRADIENT_B = tl.constexpr(11)
SUMS_A = tl.constexpr(12)  # where its partial sums begin, in elements
SUMS_B = tl.constexpr(13)

ROWS = tl.constexpr(TILE)
ORDER_AT = tl.constexpr(HEADER)
_NUMBERS = (32, 128, 256)  # of one launch of the table's kernel, which is compiled once for each of these
_ODD = tl.constexpr(2**40 + 1)


@triton.jit(do_not_specialize=["first"])
def _table_kernel(table_ptr, numbers, first):
    """Numbers come as 2 v + 2^40 + 1: odd and of 64 bits, so that Triton compiles none of them in."""
    for i in tl.static_range(len(numbers)):
        tl.store(table_ptr + first + i, (numbers[i] - _ODD) >> 1)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _begins(sizes: list[int], group: list[int], groups: int) -> list[int]:
    """Where each piece begins, of those of its group laid end to end."""
    total, begins = [0] * groups, []
    for size, g in zip(sizes, group, strict=True):
        begins.append(total[g])
        total[g] += size
    return begins


def entry_table(
    device: torch.device, lora_A: list[Tensor], lora_B: list[Tensor], bias: list[Tensor | None], member: list[int],
    adapter: list[int], scaling: list[float], dropout_p: list[float], G: int,
    gradient_a: list[Tensor | None] | None = None, gradient_b: list[Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """The table of a call. All tensors are contiguous and outlive the launches that read it."""
    L, K, column = len(lora_A), lora_A[0].shape[1], h_columns(lora_A, member, G)
    bits = [struct.unpack("<II", struct.pack("<d", s)) for s in scaling]
    fields = [adapter, member, [a.shape[0] for a in lora_A], [column[g] for g in member]]
    fields += [[threshold(p) for p in dropout_p], [low for low, _ in bits], [high for _, high in bits]]
    fields += [[address(t) for t in group or [None] * L] for group in (lora_A, lora_B, bias, gradient_a, gradient_b)]
    fields += [_begins([a.shape[0] * K for a in lora_A], [0] * L, 1)]
    fields += [_begins([b.shape[0] * (b.shape[1] + 1) for b in lora_B], member, G)]  # and a column for the bias
    numbers = [2 * number + _ODD.value for field in fields for number in field]
    padded = len(numbers) + -len(numbers) % _NUMBERS[0]
    numbers += [_ODD.value] * (padded + _NUMBERS[-1] - len(numbers))
    table = torch.empty(len(numbers), dtype=torch.int64, device=device)
    first = 0
    while first < padded:
        count = next((n for n in _NUMBERS if n >= padded - first), _NUMBERS[-1])
        _table_kernel[(1,)](table, tuple(numbers[first : first + count]), first, num_warps=1)
        first += count
    return table


@triton.jit
def field(table_ptr, L, entry, which: tl.constexpr):
    return tl.load(table_ptr + which * L + entry)


@triton.jit
def scaling_of(table_ptr, L, entry):
    """s, fp64."""
    bits = (field(table_ptr, L, entry, SCALING + 1) << 32) | field(table_ptr, L, entry, SCALING)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def factor(table_ptr, L, entry, which: tl.constexpr, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointer to what a field has the address of."""
    return tl.multiple_of(field(table_ptr, L, entry, which).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def entry_of(table_ptr, L, adapter, member):
    """The entry of an adapter for a projection, or -1."""
    found = tl.full((), -1, tl.int32)
    for start in range(0, L, 64):
        entries = start + tl.arange(0, 64)
        adapters = tl.load(table_ptr + ADAPTER * L + entries, mask=entries < L, other=-1)
        members = tl.load(table_ptr + MEMBER * L + entries, mask=entries < L, other=-1)
        own = (adapters == adapter) & (members == member)
        found = tl.maximum(found, tl.max(tl.where(own, entries, -1), 0))
    return found


@triton.jit
def run_of_tiles(route_ptr, tiles_at, begin, which, TILES: tl.constexpr):
    """Of the TILES tiles from `begin` on, those that go on where tile `which` begins, as far as they have its adapter:
    adapter, first position and rows. No rows, where that tile is not used or continues the one before."""
    tiles = begin + tl.arange(0, TILES)
    used = tiles < tl.load(route_ptr)
    at = route_ptr + tiles_at + 3 * tiles
    adapters = tl.load(at, mask=used, other=-1)
    adapter = tl.max(tl.where(tiles == begin + which, adapters, -1), 0)
    own = used & (adapters == adapter)
    first = tl.max(tl.load(at + 1, mask=own & (tiles == begin + which), other=0), 0)
    rows = tl.sum(tl.load(at + 2, mask=own, other=0), 0)
    before = tl.max((own & (tiles < begin + which)).to(tl.int32), 0)
    return adapter, first, tl.where(before > 0, 0, rows)


@triton.jit
def rows_of_adapter(route_ptr, tiles_at, adapter):
    """First position and number of an adapter's rows in the order."""
    used = tl.load(route_ptr)
    first = tl.full((), 2147483647, tl.int32)
    count = tl.full((), 0, tl.int32)
    for start in range(0, used, 128):
        tiles = start + tl.arange(0, 128)
        at = route_ptr + tiles_at + 3 * tiles
        own = (tiles < used) & (tl.load(at, mask=tiles < used, other=-1) == adapter)
        first = tl.minimum(first, tl.min(tl.where(own, tl.load(at + 1, mask=own, other=0), 2147483647), 0))
        count += tl.sum(tl.load(at + 2, mask=own, other=0), 0)
    return first, count
