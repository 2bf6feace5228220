"""nn.Modules: parameters and one op call each. No kernels, no knowledge of models."""

from peft_kernels.modules.bottleneck import INITS, OF_STREAM, READS, BottleneckAdapter, BottleneckAdapters

__all__ = ["INITS", "OF_STREAM", "READS", "BottleneckAdapter", "BottleneckAdapters"]
