"""PEFT methods: what their configs say, and how those are written down. `peft_kernels.attach` puts one on a model."""

from peft_kernels.methods.bitfit import BitFitConfig
from peft_kernels.methods.bottleneck import ALIASES, BottleneckConfig
from peft_kernels.methods.prefix import PrefixTuningConfig

CONFIGS = {config.peft_type: config for config in (BottleneckConfig, BitFitConfig, PrefixTuningConfig)}

__all__ = ["ALIASES", "CONFIGS", "BitFitConfig", "BottleneckConfig", "PrefixTuningConfig"]
