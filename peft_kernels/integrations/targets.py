"""Which modules of which model own several projections of one input: rows of data, one per family.

`attention` and `mlp` are class names in `module`. `norms` are applied to q and k, per head. `reads` are the arguments
that the family's attention hands to the attention function besides scaling and dropout, and where it finds them.
A class is taken only where its forward has the arguments that were known when the row was written.
"""

import inspect
from dataclasses import dataclass

ATTENTION_ARGUMENTS = ["self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"]
MLP_ARGUMENTS = ["self", "x"]


@dataclass(frozen=True)
class Family:
    name: str
    module: str
    attention: str
    mlp: str
    norms: tuple[str, ...] = ()
    reads: tuple[tuple[str, str], ...] = ()  # (argument, attribute of the attention or, after "config.", of its config)


@dataclass(frozen=True)
class Group:
    """Projections of one x that one module owns."""

    family: Family
    kind: str  # "qkv" or "gate_up"
    projections: tuple[str, ...]
    owner: str  # class name


def _modeling(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


_WINDOW = (("sliding_window", "sliding_window"),)
_SOFTCAP = (("softcap", "attn_logit_softcapping"),)

FAMILIES = (
    Family("llama", _modeling("llama"), "LlamaAttention", "LlamaMLP"),
    Family("qwen2", _modeling("qwen2"), "Qwen2Attention", "Qwen2MLP", reads=_WINDOW),
    Family("qwen3", _modeling("qwen3"), "Qwen3Attention", "Qwen3MLP", ("q_norm", "k_norm"), _WINDOW),
    Family(
        "mistral", _modeling("mistral"), "MistralAttention", "MistralMLP",
        reads=(("sliding_window", "config.sliding_window"),),
    ),
    Family("gemma", _modeling("gemma"), "GemmaAttention", "GemmaMLP"),
    Family("gemma2", _modeling("gemma2"), "Gemma2Attention", "Gemma2MLP", reads=_WINDOW + _SOFTCAP),
    Family("gemma3", _modeling("gemma3"), "Gemma3Attention", "Gemma3MLP", ("q_norm", "k_norm"), _WINDOW),
)  # fmt: skip

GROUPS = {
    (family.module, group.owner): group
    for family in FAMILIES
    for group in (
        Group(family, "qkv", ("q_proj", "k_proj", "v_proj"), family.attention),
        Group(family, "gate_up", ("gate_proj", "up_proj"), family.mlp),
    )
}


def group_of(owner: type) -> Group | None:
    """The group that instances of a class own, or None."""
    return GROUPS.get((owner.__module__, owner.__name__))


def forward_is_known(group: Group, owner: type) -> bool:
    """Whether the class's forward still takes the arguments that this file was written for."""
    expected = ATTENTION_ARGUMENTS if group.kind == "qkv" else MLP_ARGUMENTS
    return list(inspect.signature(owner.forward).parameters) == expected
