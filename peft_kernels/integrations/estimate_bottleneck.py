"""What N bottleneck adapters, or N prefixes, of a method cost, before anything is loaded: parameters, bytes, and what a
step reads.

The model is built on the meta device from its config.json. One adapter has, at each of its blocks of width d, with E
the bottleneck there,

    2 d E + E + d    parameters, and what a trained scale, a gate and a norm have

so its size is in Theta(d E L) for L layers. A prefix of P positions has 2 P Hkv D at each attention, and its gate; what
an MLP has on top is gone once it is baked. A decode step reads the weights of the base once, and each adapter that
some row has once.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from peft_kernels.integrations.attachments import plan_blocks
from peft_kernels.integrations.estimate import Question, distinct_of, pattern, read_by_a_step
from peft_kernels.integrations.prefixes import plan_prefixes
from peft_kernels.methods import Config, blocks_of, prefix_of


@dataclass(frozen=True)
class BlockKind:
    """Blocks, or attentions, that differ only in the numbers in their names."""

    name: str  # with "*" in place of the numbers
    count: int
    width: int  # of an attention: Hkv D
    bottleneck: int  # of a prefix: P
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


def estimate_bottleneck(model: nn.Module, config: Config, question: Question) -> BottleneckEstimate:
    """What the adapters of a question cost on a model. Its rank and target_modules are not looked at.

    Raises:
        ValueError: a number is out of range, or the model has no block or attention for the config.
    """
    q, distinct = question, distinct_of(question)
    blocks = _kinds(model, config)
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


def _kinds(model: nn.Module, config: Config) -> tuple[BlockKind, ...]:
    prefix, blocks, counts = prefix_of(config), blocks_of(config), Counter()
    if prefix:
        for site in plan_prefixes(model, prefix).values():
            parameters = prefix.parameters(site.heads, site.head_dim, site.query_heads)
            counts[pattern(site.name), site.heads * site.head_dim, prefix.num_virtual_tokens, parameters] += 1
    if blocks:
        for site in plan_blocks(model, blocks).values():
            counts[pattern(site.name), site.width, blocks.bottleneck(site.width), blocks.parameters(site.width)] += 1
    return tuple(BlockKind(name, n, width, E, n * parameters) for (name, width, E, parameters), n in counts.items())
