"""Counter-based dropout: the mask is a function of (seed, row, column, stream), so it is replayed, never stored.

Philox4x32-7 (Salmon et al. 2011, SC'11), key = the seed's low and high word, counter = (row, k >> 5, (k & 7) >> 1,
stream). A call gives four words, each two 16-bit lanes; element k of a row takes word (k >> 3) & 3, low lane if k is
even, and is kept where lane < threshold(p). The layout lets one call serve the eight elements that one thread owns in
a tensor-core fragment, and four calls serve 32 neighbours. Every backend gives the same bits.
"""

import torch
from torch import Tensor

from peft_kernels.registry import Function

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """How many of the 65536 values of a lane keep an element; 65536 means no dropout."""
    return max(1, int((1.0 - p) * 65536 + 0.5))


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (the probability, in 65536ths, with which they are kept)."""
    return 65536 / threshold(p)


def new_seed(device: torch.device | str | None = None) -> Tensor:
    """A fresh seed for the dropout of one call: 0-d int64, drawn from torch's own generator.

    Drawn outside the ops, so `torch.manual_seed`, gradient checkpointing and torch.compile treat it as any draw.

        >>> torch.manual_seed(0)
        >>> seed = peft_kernels.new_seed(x.device)
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def lora_dropout_mask(seed: Tensor, rows: int, cols: int, p: float, stream: int = 0) -> Tensor:
    """The mask that the ops replay: bool `[rows, cols]`, True where an element is kept.

    Args:
        seed: 0-d int64, as given to the op.
        rows, cols: M and K of the activation, flattened to two dimensions.
        p: probability of dropping an element, in [0, 1).
        stream: index of the adapter in the call (0 for a single adapter).

    Kept elements are scaled by 65536 / round((1 - p) 65536), which is 1 / (1 - p) to 16 bits.

        >>> mask = peft_kernels.lora_dropout_mask(seed, x.shape[0], x.shape[1], p=0.1)
    """
    if not 0 <= p < 1:
        raise ValueError(f"lora_dropout_mask: p must lie in [0, 1), got {p}")
    if seed.dtype is not torch.int64 or seed.dim() != 0:
        raise ValueError(
            f"lora_dropout_mask: seed must be a 0-d int64 tensor, got {seed.dtype} of shape {list(seed.shape)}; "
            "peft_kernels.new_seed() makes one"
        )
    return torch.ops.peft_kernels.lora_dropout_mask.default(seed, rows, cols, p, stream)


def _multiply(a: Tensor | int, b: int) -> tuple[Tensor | int, Tensor | int]:
    """High and low word of a 32 x 32 bit product, held in int64 (whose wrap-around leaves both words right)."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def mask_reference(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> Tensor:
    """The definition of the mask, in int64 arithmetic."""
    row = torch.arange(rows, device=seed.device)[:, None]
    k = torch.arange(cols, device=seed.device)[None, :]
    counter = [row.expand(rows, cols), (k >> 5).expand(rows, cols), ((k & 7) >> 1).expand(rows, cols)]
    counter.append(torch.full_like(counter[0], stream))
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + _WEYL[0]) & _WORD, (key[1] + _WEYL[1]) & _WORD]
    words = torch.stack(counter, dim=-1)  # [rows, cols, 4]
    word = words.gather(-1, ((k >> 3) & 3).expand(rows, cols)[..., None])[..., 0]
    lane = torch.where((k & 1).bool(), word >> 16, word & 0xFFFF)
    return lane < threshold(p)


def scaled_mask(seed: Tensor | None, rows: int, cols: int, p: float, stream: int, dtype: torch.dtype) -> Tensor | None:
    """drop(x) = scaled_mask * x; None where nothing is dropped."""
    if threshold(p) == 65536:
        return None
    return mask_reference(seed, rows, cols, p, stream).to(dtype) * keep_scale(p)


def drop(x: Tensor, mask: Tensor | None) -> Tensor:
    """x under a scaled mask. where, not *: a NaN in a dropped element must not reach the result."""
    return x if mask is None else torch.where(mask > 0, x * mask, 0)


DROPOUT_MASK = Function(
    name="lora_dropout_mask",
    schema="(Tensor seed, int rows, int cols, float p, int stream) -> Tensor",
    fake=lambda seed, rows, cols, p, stream: seed.new_empty((rows, cols), dtype=torch.bool),
    reference=mask_reference,
)
