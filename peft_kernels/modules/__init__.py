"""nn.Modules: parameters and one op call each. No kernels, no knowledge of models."""

from peft_kernels.modules.bottleneck import INITS, OF_STREAM, READS, BottleneckAdapter, BottleneckAdapters
from peft_kernels.modules.prefix import Prefix, PrefixEncoder, Prefixes

__all__ = [
    "INITS",
    "OF_STREAM",
    "READS",
    "BottleneckAdapter",
    "BottleneckAdapters",
    "Prefix",
    "PrefixEncoder",
    "Prefixes",
]
