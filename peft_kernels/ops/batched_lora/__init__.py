"""batched_lora: many LoRA adapters in one batch, each row with its own."""

from peft_kernels.ops.batched_lora import pooled  # noqa: F401
from peft_kernels.ops.batched_lora.pool import AdapterPool, Site

__all__ = ["AdapterPool", "Site"]
