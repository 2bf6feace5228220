"""The layer classes of transformers whose residual stream adapters may read: what is read is the sum that the layer
makes, bit for bit, in every class that is admitted; what has children of these names but another forward is refused."""

import functools

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.integrations.blocks import sites_of, stream_owner
from peft_kernels.integrations.targets import STREAM_CLASSES

# all names that configs have for these sizes; a config takes those that it knows
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "embedding_size": 32, "d_model": 32, "n_embd": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "d_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_dim": 48,
    "num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "n_layer": 2,
    "num_attention_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "max_position_embeddings": 64, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "residual_multiplier": 0.3,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
TYPES = (
    "arcee", "bart", "bert", "biogpt", "blenderbot", "camembert", "deberta", "deberta-v2", "electra", "ernie4_5",
    "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_oss", "granite", "granitemoe",
    "helium", "llama", "m2m_100", "marian", "mbart", "minicpm3", "mistral", "mixtral", "mt5", "nemotron", "olmo", "opt",
    "pegasus", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta", "seed_oss", "smollm3", "starcoder2", "t5",
    "umt5", "xglm", "xlm-roberta",
)  # fmt: skip
UNKNOWN = {  # model type -> what makes its stream another one than its children's names say
    "beam": {},
    "cohere": {},
    "doge": {},
    "hyperclovax": {},
    "minimax": {"mlp_alpha_factor": 1.3, "full_attn_alpha_factor": 1.5},
    "stablelm": {"use_parallel_residual": True, "num_key_value_heads": 4},
}


def a_model(name: str, **changes) -> nn.Module:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    kind = CONFIG_MAPPING[name]
    known = {key for base in kind.__mro__ for key in getattr(base, "__annotations__", {})} | {*kind.attribute_map}
    torch.manual_seed(0)
    model_class = MODEL_MAPPING[kind]
    model = model_class(kind(**{k: v for k, v in SIZES.items() if k in known or k == "pad_token_id"} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.1)
    return model.eval()


@functools.cache
def compared(name: str) -> frozenset[str]:
    """The classes in a type of model whose stream adapters read, after each sum was found to be the layer's own."""
    model, classes = a_model(name), set()
    for representation in ("ffn", "attention"):
        sites = [site for site in sites_of(model) if site.block.representation == representation]
        streams = [stream_owner(model, site.name) for site in sites]
        if sites and None not in streams:
            classes |= {type(model.get_submodule(stream)).__name__ for stream in streams}
            peft_kernels.attach(model, BottleneckConfig(r=2, reads="sum", representation=representation))
            for site in sites:
                _compare(model, site)
            peft_kernels.detach(model)
    return frozenset(classes)


def _compare(model: nn.Module, site) -> None:
    """The adapter's input is the output of the layer (FFN), or what some module of it is called with next."""
    layer, read, after = model.get_submodule(site.layer_name), [], []

    def note(module, args, output=None):
        if module is adapter:
            read.append(args[0].clone())
        elif read and not done:
            after.extend(args if output is None else output if isinstance(output, tuple) else [output])

    adapter, done = model.get_submodule(f"{site.name}.bottleneck.default"), []
    hooks = [adapter.register_forward_pre_hook(note)]
    if site.block.representation == "ffn":
        hooks.append(layer.register_forward_hook(note))
    else:
        inner = [module for key, module in layer.named_modules() if key and "bottleneck" not in key]
        hooks += [module.register_forward_pre_hook(note) for module in inner]
        hooks.append(layer.register_forward_hook(lambda *call: done.append(True)))
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids, **{"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    for hook in hooks:
        hook.remove()
    (read,) = read
    seen = [t.reshape(read.shape) for t in after if isinstance(t, torch.Tensor) and t.numel() == read.numel()]
    assert read.isfinite().all() and any(torch.equal(read, tensor) for tensor in seen), site.name


@pytest.mark.parametrize("name", TYPES)
def test_the_sum_that_is_read_is_the_layers_own(name):
    assert compared(name)


def test_every_class_that_is_admitted_has_been_compared():
    assert frozenset().union(*map(compared, TYPES)) == STREAM_CLASSES


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("representation", ["ffn", "attention"])
def test_another_forward_over_the_same_names_is_refused(name, representation):
    model = a_model(name, **UNKNOWN[name])
    for reads, insertion in (("sum", "serial"), ("stream", "parallel")):
        config = BottleneckConfig(r=2, reads=reads, insertion=insertion, representation=representation)
        with pytest.raises(ValueError, match=f"the residual stream around .* is not known, which reads='{reads}'"):
            peft_kernels.attach(model, config)
    assert not any("bottleneck" in key for key in model.state_dict())
    peft_kernels.attach(model, BottleneckConfig(r=2, representation=representation))


def test_a_class_of_ones_own_is_known_by_its_forward():
    model = a_model("llama")

    class Silent(type(model.layers[0])):
        pass

    class Scaled(type(model.layers[0])):
        def forward(self, hidden_states, **kwargs):
            return 0.5 * super().forward(hidden_states, **kwargs)

    for layer in model.layers:
        layer.__class__ = Silent
    peft_kernels.attach(model, BottleneckConfig(r=2, reads="sum"))
    peft_kernels.detach(model)
    model.layers[1].__class__ = Scaled
    with pytest.raises(ValueError, match=r"the residual stream around layers.1.mlp is not known"):
        peft_kernels.attach(model, BottleneckConfig(r=2, reads="sum"))
