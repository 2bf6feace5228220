"""PEFT methods: what their configs say, and how those are written down. `peft_kernels.attach` puts one on a model."""

from peft_kernels.methods.bitfit import BitFitConfig
from peft_kernels.methods.bottleneck import BottleneckConfig

CONFIGS = {config.peft_type: config for config in (BottleneckConfig, BitFitConfig)}

__all__ = ["CONFIGS", "BitFitConfig", "BottleneckConfig"]
