"""What N bottleneck adapters of a method cost, before anything is loaded: parameters, bytes, and what a step reads.

The model is built on the meta device from its config.json. One adapter has, at each of its blocks of width d, with E
the bottleneck there,

    2 d E + E + d    parameters, and what a trained scale, a gate and a norm have

so its size is in Theta(d E L) for L layers. A decode step reads the weights of the base once, and each adapter that
some row has once.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from peft_kernels.integrations.attached import plan
from peft_kernels.integrations.estimate import Question, distinct_of, pattern, read_by_a_step
from peft_kernels.methods import BottleneckConfig


@dataclass(frozen=True)
class BlockKind:
    """Blocks that differ only in the numbers in their names."""

    name: str  # with "*" in place of the numbers
    count: int
    width: int
    bottleneck: int
    parameters: int  # of one adapter at all of them


@dataclass(frozen=True)
class BottleneckEstimate:
    """The answer. Bytes unless the name says otherwise."""

    blocks: tuple[BlockKind, ...]
    base_parameters: int
    base: int
    adapter_parameters: int  # of one adapter
    share: float  # of the base's parameters
    adapter: int
    adapters: int  # all of them
    step_base: int  # read by one decode step
    step_adapters: int  # read beside it for the distinct adapters
    distinct: int
    price: float  # with adapters over without, where bytes are the limit


def estimate_bottleneck(model: nn.Module, config: BottleneckConfig, question: Question) -> BottleneckEstimate:
    """What the adapters of a question cost on a model. Its rank and target_modules are not looked at.

    Raises:
        ValueError: a number is out of range, or the model has no block for the config.
    """
    q, distinct = question, distinct_of(question)
    counts = Counter((pattern(site.name), site.width) for site in plan(model, config, "estimate"))
    blocks = tuple(
        BlockKind(name, count, width, config.bottleneck(width), count * config.parameters(width))
        for (name, width), count in counts.items()
    )
    total, parameters = (sum(p.numel() for p in model.parameters()), sum(block.parameters for block in blocks))
    adapter = parameters * (q.adapter_dtype or q.dtype).itemsize
    read = q.dtype.itemsize * read_by_a_step(model, q.rows)
    return BottleneckEstimate(
        blocks=blocks,
        base_parameters=total,
        base=q.dtype.itemsize * total,
        adapter_parameters=parameters,
        share=parameters / total,
        adapter=adapter,
        adapters=q.adapters * adapter,
        step_base=read,
        step_adapters=distinct * adapter,
        distinct=distinct,
        price=(read + distinct * adapter) / read,
    )
