"""PEFT methods: what their configs say, and how those are written down. `peft_kernels.attach` puts one on a model."""

from peft_kernels.methods.bottleneck import ALIASES, BottleneckConfig

__all__ = ["ALIASES", "BottleneckConfig"]
