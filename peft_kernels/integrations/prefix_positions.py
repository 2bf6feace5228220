"""Where the tokens' positions start: at 0, or behind the prefix at P, as in HF PEFT.

With rotary embeddings only the distance of a query to a key counts, so the keys of the prefix are turned by the shift,
once, when they come in or go out. Learned positions are looked up further on instead: the embedding becomes a subclass
without state, with a child that knows the shift of each prefix.
"""

import functools
import inspect
import sys

import torch
from torch import Tensor, nn

from peft_kernels.integrations.named import subclass
from peft_kernels.integrations.packed import PackedRows, packed_rows
from peft_kernels.integrations.rows import OUTSIDE, Rows, current, outside_graph

CHILD = "prefix_shifts"
TABLES = ("wpe", "embed_positions")
UNTURNED = (
    "cohere2",
    "cohere2_moe",
    "exaone4",
    "exaone_moe",
)  # whose layers without a window have no positions, if others have one
VARYING = ("dynamic", "longrope")  # frequencies that depend on the length of the input


class Shifts(nn.Module):
    """By how much each prefix shifts the positions that an embedding is asked for; has no parameters."""

    def __init__(self, of_model: set[str]):
        super().__init__()
        self.of_model = of_model  # names of all prefixes, those that shift nothing too
        self.by_name: dict[str, int] = {}
        self.active_name: str | None = None


def tables_of(root: nn.Module) -> list[nn.Module]:
    """The learned positions of the decoders of a model."""
    modules = dict(root.named_modules())
    whole = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    return [
        module
        for name, module in modules.items()
        if isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] in TABLES
        and (not whole or "decoder" in name.split("."))
    ]


def add_shift(root: nn.Module, name: str, P: int, of_model: set[str]) -> list[tuple[nn.Module, type]]:
    """Notes that a prefix shifts learned positions; returns the modules that change class for it."""
    swaps = []
    for table in tables_of(root):
        if CHILD not in table._modules:
            table._modules[CHILD] = Shifts(of_model)
            swaps.append((table, shifting_class(type(table))))
        table._modules[CHILD].by_name[name] = P
    return swaps


def _shifted(root: nn.Module) -> list[nn.Module]:
    """The learned positions that prefixes shift, whatever PEFT has put around them since."""
    return [module for module in root.modules() if isinstance(module._modules.get(CHILD), Shifts)]


def activate_shift(root: nn.Module, names: tuple[str, ...]) -> None:
    for table in _shifted(root):
        shifts = table._modules[CHILD]
        shifts.active_name = next((name for name in names if name in shifts.by_name), None)


def remove_shift(root: nn.Module, name: str) -> list[tuple[nn.Module, type]]:
    """Takes that back; returns the modules that get their class again."""
    swaps = []
    for table in _shifted(root):
        shifts = table._modules[CHILD]
        if name in shifts.by_name:
            del shifts.by_name[name]
            shifts.active_name = None if shifts.active_name == name else shifts.active_name
            if not shifts.by_name:
                del table._modules[CHILD]
                swaps.append((table, type(table).family_class))
    return swaps


@functools.cache
def shifting_class(family_class: type) -> type:
    """Learned positions that are asked for by `position_ids`, or by the first argument, and give those of the shift."""
    named = "position_ids" in inspect.signature(family_class.forward).parameters

    @functools.wraps(family_class.forward)
    def forward(self, *args, **kwargs):
        shifts = self._modules[CHILD]
        rows = packed_rows() or current(shifts)
        if rows is OUTSIDE:
            return outside_graph(forward, self, *args, **kwargs)
        if rows is not None and shifts.of_model.isdisjoint(rows.adapters):
            rows = None
        if rows is None and shifts.active_name is None:
            return family_class.forward(self, *args, **kwargs)
        positions = kwargs["position_ids"] if named else args[0]
        shift = shifts.by_name[shifts.active_name] if rows is None else _shift_of_rows(shifts, rows, positions)
        if named:
            return family_class.forward(self, *args, **{**kwargs, "position_ids": positions + shift})
        return family_class.forward(self, positions + shift, *args[1:], **kwargs)

    return subclass(shifting_class, family_class, {"forward": forward, "for_prefixes": True})


def _shift_of_rows(shifts: Shifts, rows: Rows, positions: Tensor) -> int | Tensor:
    rows.look(shifts.by_name)
    if isinstance(rows, PackedRows):
        names = [*rows.adapters, shifts.active_name]  # the last is that of -1
        by_id = [shifts.by_name.get(name, 0) for name in names]
        return torch.tensor(by_id, device=positions.device)[rows.of_tokens().long()]  # [T]
    by_row = [0 if i < 0 else shifts.by_name.get(rows.adapters[i], 0) for i in rows.ids.tolist()]
    if len(set(by_row)) <= 1:
        return by_row[0] if by_row else 0
    if positions.dim() != 2:
        raise ValueError(
            "adapter_ids: the model gives all rows the same positions, and these prefixes shift them by "
            f"{', '.join(map(str, sorted(set(by_row))))}; give them one length, or shift_positions=False"
        )
    count = len(positions) if len(positions) > 1 else len(by_row)
    by_id = [shifts.by_name.get(name, 0) for name in rows.adapters]
    ids = rows.of_sequences(count).to(positions.device).long()
    return torch.tensor([*by_id, 0], device=positions.device)[ids][:, None]  # [B, 1]; the last is that of -1


def require_positions(root: nn.Module) -> None:
    """Raises ValueError where tokens have no positions that could start elsewhere."""
    if _rotary_of(root) is None and not tables_of(root):
        raise ValueError(
            f"attach: shift_positions: a {type(root).__name__} has no decoder with rotary or learned positions"
        )


def _rotary_of(root: nn.Module) -> nn.Module | None:
    return next((m for name, m in root.named_modules() if name.endswith("rotary_emb")), None)


def turned(root: nn.Module, attention: nn.Module, keys: Tensor, by: int) -> Tensor:
    """Keys [Hkv, P, D] as if each were `by` positions further on; as they are where the positions are learned, and in
    layers without any."""
    rotary = _rotary_of(root)
    if rotary is None:
        require_positions(root)
        return keys
    if not _turns(attention):
        return keys
    kind, scaling, more = rotary.rope_type, getattr(rotary, "attention_scaling", 1.0), ()
    if isinstance(kind, dict):  # one for each type of layer
        layer = attention.layer_type
        kind, scaling, more = kind[layer], getattr(rotary, f"{layer}_attention_scaling"), (layer,)
    if kind in VARYING:
        raise ValueError(f"the angles of rotary embeddings of type {kind!r} depend on the length of the input")
    apply = sys.modules[_family(type(attention)).__module__].apply_rotary_pos_emb
    with torch.no_grad():
        cos, sin = rotary(keys, torch.tensor([[by]], device=keys.device), *more)
        of_positions, others = keys.split([cos.shape[-1], keys.shape[-1] - cos.shape[-1]], -1)
        return torch.cat([apply(of_positions[None], of_positions[None], cos, sin)[1][0] / scaling, others], -1)


def _turns(attention: nn.Module) -> bool:
    """Whether an attention of a model with rotary embeddings applies them."""
    config = attention.config
    if config.model_type in UNTURNED and config.sliding_window is not None:
        return config.layer_types[attention.layer_idx] == "sliding_attention" or getattr(attention, "force_rope", False)
    return bool(getattr(attention, "use_rope", True))


def _family(kind: type) -> type:
    return next(base for base in kind.__mro__ if "family_class" not in base.__dict__)
