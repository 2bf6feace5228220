"""Which modules of which model own several projections of one input: rows of data, one per family.

`attention` and `mlp` are class names in `module`. `norms` are applied to q and k, per head. `reads` are the arguments
that the family's attention hands to the attention function besides scaling and dropout, and where it finds them.
`forward` is the fingerprint of the attention's forward that `groups.py` repeats: a class is taken only where it still
has it. To renew one: read the new forward, make `groups.py` do the same, write what `fingerprint` returns for it.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MLP_FORWARD = "82070aec"  # down_proj(act_fn(gate_proj(x)) * up_proj(x)), the same in all families


@dataclass(frozen=True)
class Family:
    name: str
    module: str
    attention: str
    mlp: str
    forward: str
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


_NORMS = ("q_norm", "k_norm")
_WINDOW = (("sliding_window", "sliding_window"),)
_SOFTCAP = (("softcap", "attn_logit_softcapping"),)

FAMILIES = (
    Family("llama", _modeling("llama"), "LlamaAttention", "LlamaMLP", "5239fb7b"),
    Family("qwen2", _modeling("qwen2"), "Qwen2Attention", "Qwen2MLP", "7a258b22", reads=_WINDOW),
    Family("qwen3", _modeling("qwen3"), "Qwen3Attention", "Qwen3MLP", "c8965965", _NORMS, _WINDOW),
    Family(
        "mistral", _modeling("mistral"), "MistralAttention", "MistralMLP", "02b4252d",
        reads=(("sliding_window", "config.sliding_window"),),
    ),
    Family("gemma", _modeling("gemma"), "GemmaAttention", "GemmaMLP", "5239fb7b"),
    Family("gemma2", _modeling("gemma2"), "Gemma2Attention", "Gemma2MLP", "81313f77", reads=_WINDOW + _SOFTCAP),
    Family("gemma3", _modeling("gemma3"), "Gemma3Attention", "Gemma3MLP", "eef4b7ba", _NORMS, _WINDOW),
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
    """Whether the class's forward still computes what this file was written for."""
    return fingerprint(owner.forward) == (group.family.forward if group.kind == "qkv" else MLP_FORWARD)


@functools.cache
def fingerprint(forward: Callable) -> str:
    """Eight digits that stand for a function's code, whatever its name, comments, formatting and annotations."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # shipped without source
        return ""
    return hashlib.sha256(" ".join(_words(tree)).encode()).hexdigest()[:8]


def _words(node) -> Iterator[str]:
    """A syntax tree as words. Not ast.dump or ast.unparse, which differ between versions of Python."""
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for field, value in ast.iter_fields(node):
            if field not in ("name", "annotation", "returns"):
                yield from _words(value)
    elif isinstance(node, list):
        if node:
            yield from ("[", *(word for entry in node for word in _words(entry)), "]")
    elif node is not None:
        yield repr(node)
