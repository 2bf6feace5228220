"""What AdapterPool.add takes for one site, the checks on it, and the rows in which the pool keeps it.

lora_A [R, K] as it is; lora_B [N, R] as rank rows of B^T, behind them a row of the bias and a row of the gain minus
one, each where there is one. Gains lie near 1, so that rounding their distance from 1 to 16 bits costs little. A bias
in front of an activation stays in the dtype that products are summed in.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.ops.common.activations import NAMES

MAX_POOL_RANK = 1024  # of an adapter, unless a pool is made for more
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class SiteAdapter(NamedTuple):
    """One site's part of an adapter: y + scaling (x lora_A^T lora_B^T + lora_bias) for the layer's output y, or with a
    gain: gain (y + scaling x lora_A^T lora_B^T) + scaling lora_bias. A bottleneck adapter (Houlsby et al. 2019,
    arXiv:1902.00751) has activation(x lora_A^T + down_bias) in the place of x lora_A^T; lora_A is its down projection,
    lora_B its up projection, lora_bias the bias of that.

    Args:
        lora_A, lora_B: `[r, K]` and `[N, r]`.
        scaling: of what is added, the bias included.
        lora_bias: `[N]`, or None.
        gain: `[N]`, or None: DoRA's magnitude / ||W + scaling lora_B lora_A|| of each output (Liu et al. 2024,
            arXiv:2402.09353). Where the layer has a bias b of its own, which DoRA does not multiply, lora_bias is
            (1 - gain) b / scaling.
        activation: identity, relu, gelu, gelu_tanh, silu, tanh, sigmoid or leaky_relu.
        down_bias: `[r]`, or None.

    Example:
        >>> pool = peft_kernels.AdapterPool({"q_proj": peft_kernels.Site(64, 32)})
        >>> factors = torch.randn(4, 64), torch.randn(32, 4)
        >>> slot = pool.add("alice", {"q_proj": peft_kernels.SiteAdapter(*factors, gain=torch.full((32,), 1.1))})
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    lora_bias: Tensor | None = None
    gain: Tensor | None = None
    activation: str = "identity"
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class Stored:
    """The same, checked and in the pool's dtype."""

    site: str
    a: Tensor  # [R, K]
    b: Tensor  # [R, N], then the row of the bias and the row of the gain minus one, where there are any
    scaling: float
    biased: bool
    gained: bool
    activation: int  # its place in ops.common.activations
    down_bias: Tensor | None  # [R], in the dtype that products are summed in

    @property
    def rank(self) -> int:
        return len(self.a)


def require(condition: bool, text: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"AdapterPool: {text}")


def check(site: str, K: int, N: int, entry: tuple, max_rank: int) -> SiteAdapter:
    """An entry for a site from K to N features; what is none is refused in words."""
    got = f"{type(entry).__name__} of {len(entry)}" if isinstance(entry, (tuple, list)) else type(entry).__name__
    require(
        isinstance(entry, SiteAdapter) or (isinstance(entry, tuple) and len(entry) in (4, 5)),
        f"site '{site}' must have a SiteAdapter or a tuple (lora_A, lora_B, scaling, lora_bias) or with a gain behind, "
        f"got {got}",
        TypeError,
    )
    entry = SiteAdapter(*entry)
    _check_tensor(site, "lora_A", entry.lora_A, (None, K), f"r, in_features={K}")
    r = len(entry.lora_A)
    remedy = f"; a pool that is made with max_rank={r} takes it" if r else ""
    require(1 <= r <= max_rank, f"lora_A of site '{site}' must have a rank r from 1 to {max_rank}, got {r}{remedy}")
    _check_tensor(site, "lora_B", entry.lora_B, (N, r), f"out_features={N}, r={r}")
    for name in ("lora_bias", "gain"):
        if getattr(entry, name) is not None:
            _check_tensor(site, name, getattr(entry, name), (N,), f"out_features={N}")
    if entry.down_bias is not None:
        _check_tensor(site, "down_bias", entry.down_bias, (r,), f"r={r}")
    known = isinstance(entry.activation, str) and entry.activation in NAMES
    require(known, f"activation of site '{site}' must be one of {', '.join(NAMES)}, got {entry.activation!r}")
    s = entry.scaling
    number = isinstance(s, (int, float)) and not isinstance(s, bool)
    require(number, f"scaling of site '{site}' must be a number, got {type(s).__name__}", TypeError)
    finite = math.isfinite(s) and abs(s) <= torch.finfo(torch.float32).max
    require(finite, f"scaling of site '{site}' must be finite in float32, got {s}")
    return entry


def store(site: str, entry: SiteAdapter, dtype: torch.dtype, device: torch.device, allow_nonfinite: bool) -> Stored:
    """A checked entry as the pool keeps it; infinities and NaN, given or made by the pool's dtype, are refused."""
    tensors = {name: t.detach().to(device) for name, t in entry._asdict().items() if isinstance(t, Tensor)}
    kept_in = dict.fromkeys(tensors, dtype) | {"down_bias": torch.promote_types(dtype, torch.float32)}
    if "gain" in tensors:
        wide = torch.promote_types(torch.promote_types(tensors["gain"].dtype, dtype), torch.float32)
        tensors["gain"] = tensors["gain"].to(wide) - 1
    tensors = {name: tensor.to(kept_in[name]) for name, tensor in tensors.items()}
    for name, tensor in () if allow_nonfinite else tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        text = f"{name} of site '{site}' has {bad} values of {tensor.numel()} that are not finite in"
        require(bad == 0, f"{text} {str(kept_in[name]).removeprefix('torch.')}; allow_nonfinite=True takes them")
    behind = [tensors[name][None] for name in ("lora_bias", "gain") if name in tensors]
    rows = torch.cat([tensors["lora_B"].mT, *behind])
    there = "lora_bias" in tensors, "gain" in tensors
    f = NAMES.index(entry.activation), tensors.get("down_bias")
    return Stored(site, tensors["lora_A"], rows, float(entry.scaling), *there, *f)


def _check_tensor(site: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], words: str) -> None:
    """One tensor of a site; None in its shape stands for any size."""
    what = f"{name} of site '{site}' must"
    require(isinstance(tensor, Tensor), f"{what} be a Tensor, got {type(tensor).__name__}", TypeError)
    plain = tensor.layout is torch.strided and tensor.dtype in FLOATS and not tensor.is_meta
    kind = "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
    require(plain, f"{what} be a dense tensor of floats, got {kind}", TypeError)
    fits = tensor.dim() == len(shape) and all(w in (None, n) for w, n in zip(shape, tensor.shape, strict=True))
    require(fits, f"{what} have shape [{words}], got {list(tensor.shape)}")
