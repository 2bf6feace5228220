"""Rows of data on the models of transformers: which modules own several projections of one input, one row per family;
and which modules are the blocks that bottleneck adapters go to, one row per form that a block has.

`attention` and `mlp` are class names in `module`. `norms` are applied to q and k, per head. `reads` are the arguments
that the family's attention hands to the attention function besides scaling and dropout, and where it finds them.
`forward` is the fingerprint of the attention's forward that `groups.py` repeats: a class is taken only where it still
has it. To renew one: read the new forward, make `groups.py` do the same, write what `fingerprint` returns for it.
"""

import ast
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from torch import nn

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


@dataclass(frozen=True)
class Block:
    """A form of FFN or self-attention block, known by the names of its children.

    `output` is the child whose output is the block's; "" where that is no child's (experts). `x` says what the block's
    input is: an argument of the owner's forward by its place, or the input of a child by its name. `inside`: something
    follows `output` in the owner's forward (dropout, residual, norm), which is to see what the adapter gives.
    `path` is a pattern that the end of the owner's name has to fit. `norm` is the child that norms the residual stream,
    before the block or after it has been added, where the owner has that too.
    """

    representation: str  # "ffn" or "attention"
    children: tuple[str, ...]
    output: str
    x: int | str = 0
    inside: bool = False
    path: str = ""
    norm: str = ""


BLOCKS = (  # the first that fits counts
    Block("ffn", ("experts", "gate"), ""),  # a mixture of experts, with its shared ones
    Block("ffn", ("experts", "router"), ""),
    Block("ffn", ("gate_proj", "up_proj", "down_proj"), "down_proj"),  # Llama, Qwen, Mistral, Gemma, OLMo, ...
    Block("ffn", ("gate_up_proj", "down_proj"), "down_proj"),  # Phi-3, GLM
    Block("ffn", ("up_proj", "down_proj"), "down_proj"),  # Nemotron
    Block("ffn", ("wi", "wo"), "wo"),  # T5's DenseReluDense
    Block("ffn", ("wi_0", "wi_1", "wo"), "wo"),
    Block("ffn", ("c_fc", "c_proj"), "c_proj", inside=True),  # GPT-2, GPT-Neo
    Block("ffn", ("fc_in", "fc_out"), "fc_out", inside=True),  # GPT-J, CodeGen
    Block("ffn", ("dense_h_to_4h", "dense_4h_to_h"), "dense_4h_to_h", inside=True),  # GPT-NeoX, Falcon, BLOOM
    # in the layer (BART, OPT) or in an MLP (Phi, CLIP)
    Block("ffn", ("fc1", "fc2"), "fc2", x="fc1", inside=True, norm="final_layer_norm"),
    # BERT, RoBERTa, ELECTRA
    Block("ffn", ("dense", "LayerNorm"), "dense", x=1, inside=True, path=r"\.\d+\.output", norm="LayerNorm"),
    Block("attention", ("q_proj", "k_proj", "v_proj", "o_proj"), "o_proj"),
    Block("attention", ("qkv_proj", "o_proj"), "o_proj"),
    Block("attention", ("q_proj", "k_proj", "v_proj", "dense"), "dense"),  # Phi
    Block("attention", ("q_proj", "k_proj", "v_proj", "out_proj", "resid_dropout"), "out_proj", inside=True),  # GPT-J
    Block("attention", ("q_proj", "k_proj", "v_proj", "out_proj"), "out_proj"),  # BART, OPT
    Block("attention", ("query_key_value", "dense"), "dense", inside=True),  # GPT-NeoX, Falcon, BLOOM
    Block("attention", ("q", "k", "v", "o"), "o"),  # T5
    Block("attention", ("c_attn", "c_proj"), "c_proj", inside=True),  # GPT-2
    Block(
        "attention", ("dense", "LayerNorm"), "dense", x=1, inside=True, path=r"\.attention\.output", norm="LayerNorm"
    ),
)


@dataclass(frozen=True)
class Stream:
    """A layer's residual stream around a block, which is its `child`: `norm` norms it before the block, or after the
    block's output has been added to it; which of the two, the order of the calls shows. `adds` is the child that norms
    the output before it is added. The layer has a child `has`, where one is named, and none `lacks`."""

    child: str
    norm: str
    adds: str = ""
    has: str = ""
    lacks: str = ""

    def fits(self, child: str, children: Container[str]) -> bool:
        needed = {self.norm, self.adds, self.has} - {""}
        return self.child == child and all(name in children for name in needed) and self.lacks not in children


STREAMS = (  # the first that fits counts
    Stream("mlp", "pre_feedforward_layernorm", adds="post_feedforward_layernorm"),  # Gemma 2 and 3
    Stream("mlp", "pre_feedforward_layernorm"),
    Stream("mlp", "post_attention_layernorm", adds="post_mlp_layernorm"),  # GLM-4
    Stream("mlp", "post_attention_layernorm", lacks="post_feedforward_layernorm"),  # Llama, Qwen, Mistral, Gemma
    Stream("mlp", "ln_2"),  # GPT-2
    Stream("DenseReluDense", "layer_norm"),  # T5
    Stream("self_attn", "input_layernorm", adds="post_self_attn_layernorm"),
    Stream("self_attn", "input_layernorm", adds="post_attention_layernorm", has="pre_feedforward_layernorm"),
    Stream("self_attn", "input_layernorm"),
    Stream("self_attn", "self_attn_layer_norm"),  # BART, OPT
    Stream("attn", "ln_1"),
    Stream("SelfAttention", "layer_norm"),
)
# whose forward has the stream where STREAMS, or the norm of a block, says; test_stream_classes compares every one
STREAM_CLASSES = frozenset((
    "ArceeDecoderLayer", "BartDecoderLayer", "BartEncoderLayer", "BertOutput", "BertSelfOutput", "BioGptDecoderLayer",
    "BlenderbotDecoderLayer", "BlenderbotEncoderLayer", "CamembertOutput", "CamembertSelfOutput", "DebertaOutput",
    "DebertaSelfOutput", "DebertaV2Output", "DebertaV2SelfOutput", "ElectraOutput", "ElectraSelfOutput",
    "Ernie4_5DecoderLayer", "GPT2Block", "GPTBigCodeBlock", "Gemma2DecoderLayer", "Gemma3DecoderLayer",
    "GemmaDecoderLayer", "Glm4DecoderLayer", "GlmDecoderLayer", "GptOssDecoderLayer", "GraniteDecoderLayer",
    "GraniteMoeDecoderLayer", "HeliumDecoderLayer", "LlamaDecoderLayer", "M2M100DecoderLayer", "M2M100EncoderLayer",
    "MBartDecoderLayer", "MBartEncoderLayer", "MT5LayerFF", "MT5LayerSelfAttention", "MarianDecoderLayer",
    "MarianEncoderLayer", "MiniCPM3DecoderLayer", "MistralDecoderLayer", "MixtralDecoderLayer", "NemotronDecoderLayer",
    "OPTDecoderLayer", "OlmoDecoderLayer", "PegasusDecoderLayer", "PegasusEncoderLayer", "Phi3DecoderLayer",
    "Qwen2DecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer", "RobertaOutput",
    "RobertaSelfOutput", "SeedOssDecoderLayer", "SmolLM3DecoderLayer", "Starcoder2DecoderLayer", "T5LayerFF",
    "T5LayerSelfAttention", "UMT5LayerFF", "UMT5LayerSelfAttention", "XGLMDecoderLayer", "XLMRobertaOutput",
    "XLMRobertaSelfOutput",
))  # fmt: skip
MULTIPLIERS = ("residual_multiplier", "residual_scale")  # attributes by which a layer multiplies before it adds
CROSS_ATTENTION = ("encoder_attn", "EncDecAttention", "crossattention")


def block_of(name: str, children: Container[str]) -> Block | None:
    """The form that a module's name and children fit, or None."""
    if name.rpartition(".")[2] in CROSS_ATTENTION:
        return None
    fits = (b for b in BLOCKS if all(c in children for c in b.children) and re.search(f"{b.path}$", name))
    return next(fits, None)


def stream_of(child: str, layer: nn.Module) -> Stream | None:
    """The residual stream around a layer's child, or None."""
    if not stream_is_known(type(layer)):
        return None
    return next((stream for stream in STREAMS if stream.fits(child, layer._modules)), None)


def stream_is_known(owner: type) -> bool:
    """Whether the forward that instances of a class run is one that this file was written for. Names of children do not
    say it: some layers scale the stream, mix it, or add attention and FFN at once."""
    forwards = (base.__dict__["forward"] for base in owner.__mro__ if "forward" in base.__dict__)
    # what is made over a class, by us or by FSDP, runs the forward beneath; transformers wraps it under the same name
    forward = next(f for f in forwards if not f.__module__.startswith("peft_kernels."))
    known = forward.__module__.startswith("transformers.models.")
    return known and forward.__qualname__.removesuffix(".forward") in STREAM_CLASSES


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
