"""aLoRA (arXiv:2504.12397): an adapter that a sequence has from its last invocation on, as adapters of rows.

PEFT says for each sequence how many of its last tokens have the adapter, or None. That is an id for each token, which
depends on how many tokens a call has: all in a forward, one at a time in a generation.
"""

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_kernels.integrations.rows import BASE, RowAdapters, from_names

EVERY_TOKEN = 2**31 - 1  # of a sequence whose adapter is no aLoRA


class InvokedRows(RowAdapters):
    """Sequence i has its adapter in its last offsets[i] tokens [B]. `named`: whether PEFT was told names too."""

    by_token = True

    def __init__(self, rows: RowAdapters, offsets: Sequence[int | None], invoked: Sequence[bool], named: bool):
        super().__init__("alora_offsets", rows.ids, rows.adapters, rows.expand, {})
        self.offsets, self.named = list(offsets), named
        last = [(o or 0) if is_invoked else EVERY_TOKEN for o, is_invoked in zip(offsets, invoked, strict=True)]
        self.last = torch.tensor(last, dtype=torch.int32)

    def _flat(self, leading: torch.Size) -> Tensor:
        B, tokens = self.ids.shape[0], leading[1] if len(leading) > 1 else 1
        if not leading or leading[0] not in (B, B * self.expand):
            raise ValueError(
                f"alora_offsets: there are offsets for {B} sequences, which a layer's input of leading sizes "
                f"{list(leading)} does not match; its first size must be the sequences'"
            )
        expand = leading[0] // max(B, 1)
        before = torch.arange(tokens, 0, -1) > self.last.unsqueeze(-1)  # [B, S]
        ids = self.ids.unsqueeze(-1).masked_fill(before, -1).repeat_interleave(expand, 0)
        return ids.flatten().repeat_interleave(leading[2:].numel())

    def for_peft(self, leading: torch.Size, module: nn.Module) -> dict:
        expand = leading[0] // len(self.offsets)
        said = {}
        if isinstance(module, LoraLayer):  # a module that is trained whole is so for all tokens
            said["alora_offsets"] = [offset for offset in self.offsets for _ in range(expand)]
        if self.named:
            ids = self.ids.repeat_interleave(expand).tolist()
            said["adapter_names"] = [BASE if i < 0 else self.adapters[i] for i in ids]
        return said


def from_offsets(
    names: Sequence[str] | None, offsets: Sequence[int | None], active: list[str], configs: dict, known: set[str],
    expand: int,
) -> InvokedRows | None:  # fmt: skip
    """What PEFT's `alora_offsets` says, with `adapter_names` or for the active adapters; None where a row would have
    several adapters, or the two lists differ in length."""
    each = list(names) if names is not None else active * len(offsets)
    if len(each) != len(offsets):
        return None
    invoked = [getattr(configs.get(name), "alora_invocation_tokens", None) is not None for name in each]
    return InvokedRows(from_names(each, known, expand), offsets, invoked, names is not None)
