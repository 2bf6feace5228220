"""PEFT methods: what their configs say, and how those are written down. `peft_kernels.attach` puts one on a model."""

from peft_kernels.methods.bitfit import BitFitConfig
from peft_kernels.methods.bottleneck import ALIASES, BottleneckConfig
from peft_kernels.methods.mam import MAMConfig
from peft_kernels.methods.prefix import PrefixTuningConfig, PTuningV2Config

Config = BottleneckConfig | BitFitConfig | PrefixTuningConfig | MAMConfig
CONFIGS = {
    config.peft_type: config
    for config in (BottleneckConfig, BitFitConfig, PrefixTuningConfig, PTuningV2Config, MAMConfig)
}


def prefix_of(config: Config) -> PrefixTuningConfig | None:
    """The prefix that a method has, alone or as a half of it."""
    config = config.prefix if isinstance(config, MAMConfig) else config
    return config if isinstance(config, PrefixTuningConfig) else None


def blocks_of(config: Config) -> BottleneckConfig | None:
    """The bottleneck adapters that a method has, likewise."""
    config = config.ffn if isinstance(config, MAMConfig) else config
    return config if isinstance(config, BottleneckConfig) else None


__all__ = [
    "ALIASES",
    "CONFIGS",
    "BitFitConfig",
    "BottleneckConfig",
    "Config",
    "MAMConfig",
    "PTuningV2Config",
    "PrefixTuningConfig",
    "blocks_of",
    "prefix_of",
]
