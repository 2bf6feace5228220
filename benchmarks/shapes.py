"""What is timed: cells of the grids, as data.

A cell is one frozen projection [N, K] met by M tokens, with the variants of the adapter on it. All variants of a cell
share its two frozen arms and are timed in the same rounds.
"""

from dataclasses import dataclass

import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """The adapter's own side of a cell: the dtype of A and B, and the dropout probability."""

    factor_dtype: torch.dtype
    p: float


@dataclass(frozen=True)
class Cell:
    """`arms` names the kinds of arm that are timed beside the frozen linear, in every variant."""

    op: str
    dtype: torch.dtype
    M: int
    K: int
    N: int
    r: int
    variants: tuple[Variant, ...]
    arms: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} M={self.M} K={self.K} N={self.N} r={self.r}"


@dataclass(frozen=True)
class Model:
    """The sizes that a model's configuration gives its projections."""

    name: str
    hidden: int
    intermediate: int
    query: int  # query heads x head dim
    key_value: int  # key/value heads x head dim

    def projections(self) -> dict[str, tuple[int, int]]:
        """(K, N) by name; k and v share a row, gate and up too."""
        return {
            "q": (self.hidden, self.query),
            "k,v": (self.hidden, self.key_value),
            "o": (self.query, self.hidden),
            "gate,up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


MODELS = (
    Model("llama-3-8b", 4096, 14336, 4096, 1024),
    Model("llama-3-70b", 8192, 28672, 8192, 1024),
    Model("mistral-7b", 4096, 14336, 4096, 1024),
    Model("qwen2-7b", 3584, 18944, 3584, 512),
    Model("qwen3-0.6b", 1024, 3072, 2048, 1024),
    Model("qwen3-8b", 4096, 12288, 4096, 1024),
    Model("gemma-7b", 3072, 24576, 4096, 4096),
    Model("gemma-2-9b", 3584, 14336, 4096, 2048),
)

GRIDS = ("cpu", "gpu", "full", "quick")
# Kinds of arm, in the order in which they are listed: `python benchmarks/run.py --help` explains them.
ARMS = ("peft", "compiled", "patched", "op", "reference", "peers")


def variants(dtype: torch.dtype) -> tuple[Variant, ...]:
    """Adapters in the base's dtype and, on a 16-bit base, in fp32 (what PEFT makes by default); dropout 0 and 0.1."""
    factor_dtypes = dict.fromkeys((dtype, F32))
    return tuple(Variant(factor_dtype, p) for factor_dtype in factor_dtypes for p in (0.0, 0.1))


def _cpu_arms(M: int, K: int) -> tuple[str, ...]:
    """PEFT and the patched layer everywhere; the rest where it fits into twenty minutes on two cores.

    torch.compile makes two graphs of C++ per variant; the reference draws its mask in int64, and widens the weight.
    """
    arms = ("peft", "patched")
    if K <= 1024:
        arms += ("compiled", "peers")
    if M * K * K <= 256 * 1024 * 1024:
        arms += ("op",)
    if (M, K) == (16, 1024):
        arms += ("reference",)
    return arms


def seam() -> list[Cell]:
    """The op where its kernels cost nothing: what is left is the price of the call, with the gradient's bookkeeping."""
    return [Cell("seam", F32, 1, 64, 64, 16, (Variant(F32, 0.0), Variant(F32, 0.1)), ("peft", "patched", "op"))]


def kinds(device_type: str) -> tuple[str, ...]:
    """The kinds of arm that are timed unless others are asked for: on a GPU, the reference is not."""
    return tuple(kind for kind in ARMS if device_type == "cpu" or kind != "reference")


def _gpu() -> list[Cell]:
    """Most important first, for a run may be cut. Peers that tune themselves do it anew for every shape, and
    torch.compile compiles anew for every variant: they are timed where they matter most.
    """
    ours = ("peft", "patched", "op", "reference")
    rows = [
        (8192, 4096, 16, ARMS),
        (1, 4096, 16, (*ours, "compiled")),
        (16, 4096, 16, (*ours, "peers")),
        (512, 4096, 16, ours),
        (8192, 4096, 64, ours),
        (8192, 14336, 16, ours),
        (1, 14336, 16, ours),
        (16, 14336, 16, ours),
        (512, 14336, 16, ours),
    ]
    return [Cell("lora_linear", BF16, M, 4096, N, r, variants(BF16), arms) for M, N, r, arms in rows]


def cells(op: str, grid: str, model: str = "") -> list[Cell]:
    """The cells of a grid; `model` restricts `full` to the projections of one model."""
    if op == "seam":
        return seam()
    if grid == "quick":
        return [
            Cell(op, dtype, M, 256, 256, 16, variants(dtype), ("peft", "patched", "op", "reference", "peers"))
            for dtype in (F32, BF16)
            for M in (1, 64)
        ]
    if grid == "cpu":
        return seam() + [
            Cell(op, dtype, M, d, d, 16, variants(dtype), _cpu_arms(M, d))
            for dtype in (F32, BF16)
            for d in (1024, 4096)
            for M in (1, 16, 256, 2048)
        ]
    if grid == "gpu":
        return _gpu()
    shapes = dict.fromkeys(shape for m in MODELS if model in ("", m.name) for shape in m.projections().values())
    return seam() + [
        Cell(op, BF16, M, K, N, r, variants(BF16), ARMS)
        for K, N in shapes
        for r in (8, 16, 64, 128)
        for M in (1, 16, 512, 2048, 4096, 8192)
    ]
