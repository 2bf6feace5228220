"""A prefix as a module, and the prefixes that one attention has: P keys and values of each KV head, trained.

Li and Liang 2021 (arXiv:2101.00190). weight [P, 2, Hkv, D] holds the keys and the values, or an MLP gives them, the
reparameterisation of the paper:

    h = tanh(E A^T + a)  [P, hidden]        PrefixEncoder: once for all layers of a slot
    weight = h B^T + b   [P, 2 Hkv D]       in each layer

Nothing here has a batch: the MLP runs once per forward of the model and not once per row. `encoded` is where the model
keeps h during a forward; a layer that is called by itself makes its own.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from peft_kernels.ops.prefix_attention.op import COMPOSITIONS

DEVIATION = 0.02
STARTS = ("random", "zero")

_ENCODED: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("peft_kernels_encoded_prefixes", default=None)


class PrefixEncoder(nn.Module):
    """h = tanh(E A^T + a) [P, hidden]: the part of the reparameterisation that the layers of a slot share."""

    def __init__(self, P: int, width: int, hidden: int, *, device=None, dtype=None):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(P, width, device=device, dtype=dtype))
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        nn.init.normal_(self.embedding)

    def forward(self) -> Tensor:
        """h. Raises RuntimeError where FSDP has sharded it with the first layer, before which all layers need it."""
        if hasattr(self.embedding, "placements") or self.embedding.dim() != 2:  # FSDP's: sharded, or a flat piece
            raise RuntimeError(
                "PrefixEncoder: FSDP has sharded the MLP of prefix_projection with one layer, and all layers need it; "
                "use prefix_projection=False, or shard the model as one unit"
            )
        return torch.tanh(self.down(self.embedding))


@contextlib.contextmanager
def encoded(encoders: Iterable[PrefixEncoder]) -> Iterator[None]:
    """Inside, the h of each encoder is computed once, now."""
    token = _ENCODED.set({encoder: encoder() for encoder in encoders})
    try:
        yield
    finally:
        _ENCODED.reset(token)


def keeping_encoded(function: Callable, reentrant: bool = False) -> Callable:
    """The function, to be called now and in the backward, both times with what is encoded now. A reentrant checkpoint
    has a backward of its own, which would go through h once for each layer: there each layer makes its own h."""
    if (kept := _ENCODED.get()) is None:
        return function
    kept = {} if reentrant else kept

    def run(*args, **kwargs):
        token = _ENCODED.set(kept)
        try:
            return function(*args, **kwargs)
        finally:
            _ENCODED.reset(token)

    return run


class Prefix(nn.Module):
    """One prefix in one attention.

    Args:
        P, heads, head_dim: P positions, Hkv heads and D.
        query_heads: Hq, for the gate.
        composition: as in `peft_kernels.prefix_attention`.
        gate: whether each query head has a trained factor of the prefix's values.
        init: "random", normal with deviation 0.02 and a gate of 1; "zero", a start at which the prefix adds exactly 0:
            the gate is 0 if there is one (LLaMA-Adapter, arXiv:2303.16199), else the values are, and the rest random.
        dropout_p: probability of dropping an element of the prefix in training.
        encoder: gives h, and is owned elsewhere; None: `weight` is a parameter itself.
    """

    def __init__(
        self, P: int, heads: int, head_dim: int, query_heads: int, *, composition: str = "merge", gate: bool = False,
        init: str = "random", dropout_p: float = 0.0, encoder: PrefixEncoder | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if composition not in COMPOSITIONS:
            raise ValueError(f"Prefix: composition must be one of {', '.join(COMPOSITIONS)}, got {composition!r}")
        if init not in STARTS:
            raise ValueError(f"Prefix: init must be one of {', '.join(STARTS)}, got {init!r}")
        self.shape = (P, 2, heads, head_dim)
        self.composition, self.dropout_p = composition, dropout_p
        self.__dict__["encoder"] = encoder  # not a child: the layers of a slot share it

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        baked = encoder is None
        self.weight = parameter(*self.shape) if baked else None
        self.up_weight = None if baked else parameter(2 * heads * head_dim, encoder.down.out_features)
        self.up_bias = None if baked else parameter(2 * heads * head_dim)
        self.gate = parameter(1, query_heads) if gate else None
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """The start of a training; `init` as in the class."""
        if self.gate is not None:
            self.gate.fill_(0 if init == "zero" else 1)
        nn.init.normal_(self.up_weight if self.weight is None else self.weight, std=DEVIATION)
        if self.up_bias is not None:
            self.up_bias.zero_()
        if init == "zero" and self.gate is None:
            values = self.up_weight.unflatten(0, (2, -1))[1] if self.weight is None else self.weight[:, 1]
            values.zero_()

    def baked(self) -> Tensor:
        """The keys and values [P, 2, Hkv, D], before dropout."""
        if self.encoder is None:
            return self.weight
        kept = None if is_compiling() else _ENCODED.get()
        h = self.encoder() if kept is None or self.encoder not in kept else kept[self.encoder]
        return nn.functional.linear(h, self.up_weight, self.up_bias).view(self.shape)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, P, D]."""
        both = nn.functional.dropout(self.baked(), self.dropout_p, self.training)
        keys, values = both.permute(1, 2, 0, 3)
        return keys, values

    def extra_repr(self) -> str:
        P, _, heads, head_dim = self.shape
        return f"{P} positions, {heads} heads of {head_dim}, composition={self.composition}"


class Prefixes(nn.ModuleDict):
    """The prefixes of one attention by name; that of `active_name` is what every row has where nothing else is said.

    slot: "encoder", "decoder" or "cross". base_attention: the attention function that the model had before.
    of_model: names of all prefixes of the model, this attention's and others.
    """

    def __init__(self, slot: str, base_attention: str, of_model: set[str]):
        super().__init__()
        self.slot, self.base_attention, self.of_model = slot, base_attention, of_model
        self.active_name: str | None = None
