"""Adapters that read the residual stream, in every type of model: against hooks that compute them in plain torch."""

import copy
import functools

import pytest
import torch
import transformers as hf
from models import _DECODER, MODELS, assert_as_close_as_peft, base_model, in_double, peft_model, results
from torch import nn
from torch.nn.functional import linear, silu

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.integrations.attachments import NOTE

# representation -> within a layer: among whose inputs the stream is, its place there, whose output the block's is, the
# norm of their sum where one follows, and what the output goes through before it is added: a norm or a factor
_LLAMA = {"ffn": ("post_attention_layernorm", 0, "mlp", ""), "attention": ("input_layernorm", 0, "self_attn", "")}
_GEMMA2 = {
    "ffn": ("pre_feedforward_layernorm", 0, "mlp", "", "post_feedforward_layernorm"),
    "attention": ("input_layernorm", 0, "self_attn", "", "post_attention_layernorm"),
}
_GLM4 = {
    "ffn": ("post_attention_layernorm", 0, "mlp", "", "post_mlp_layernorm"),
    "attention": ("input_layernorm", 0, "self_attn", "", "post_self_attn_layernorm"),
}
_BERT = {
    "ffn": ("intermediate", 0, "output.dense", "output.LayerNorm"),
    "attention": ("attention.output", 1, "attention.output.dense", "attention.output.LayerNorm"),
}
PLACES = {
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "glm4": _GLM4,
    "gpt2": {"ffn": ("ln_2", 0, "mlp", ""), "attention": ("ln_1", 0, "attn", "")},
    "opt": {"ffn": ("final_layer_norm", 0, "fc2", ""), "attention": ("self_attn_layer_norm", 0, "self_attn", "")},
    "bart": {
        "ffn": ("fc1", 0, "fc2", "final_layer_norm"),
        "attention": ("self_attn", 0, "self_attn", "self_attn_layer_norm"),
    },
    "bert": _BERT,
    "roberta": _BERT,
    "t5": {"ffn": ("layer_norm", 0, "DenseReluDense", ""), "attention": ("layer_norm", 0, "SelfAttention", "")},
}  # fmt: skip
KEYS = ("down_weight", "down_bias", "up_weight", "up_bias")
SUM = BottleneckConfig.houlsby(r=4, activation="silu", reads="sum")
STREAM = BottleneckConfig.scaled_parallel(r=3, activation="tanh", representation="both", reads="stream")
OUTPUT = BottleneckConfig.houlsby(r=2, activation="relu")
FORMS = {"sum": (SUM,), "stream": (STREAM,), "together": (OUTPUT, SUM, STREAM)}
ACTIVATIONS = {"silu": silu, "tanh": torch.tanh, "relu": torch.relu}


def plain_model(name: str) -> nn.Module:
    """One whose norms and factors before the sum are not 1."""
    if name not in ("glm4", "granite"):
        return base_model(name).eval()
    torch.manual_seed(0)
    if name == "glm4":
        model = hf.Glm4ForCausalLM(hf.Glm4Config(**_DECODER, head_dim=8))
    else:
        model = hf.GraniteForCausalLM(hf.GraniteConfig(**_DECODER, residual_multiplier=0.3))
    return model.eval()


def adapted(name: str, configs, **attach) -> nn.Module:
    """A model with these adapters, all active, of weights whose part of the output is as large as the base's."""
    model = plain_model(name)
    for i, config in enumerate(configs):
        peft_kernels.attach(model, config, f"number{i}", **attach)
    peft_kernels.set_active(model, [f"number{i}" for i in range(len(configs))])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".bottleneck." in key:
                width = parameter.shape[-1] if parameter.dim() == 2 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5 / 2)
    return model


def hooked(layer: nn.Module, place: tuple, adapters: list) -> None:
    """Puts adapters, each a config and its four weights, around a block of a layer that has none."""
    at, argument, block, norm, *added = place
    norm = layer.get_submodule(norm) if norm else nn.Identity()
    added = getattr(layer, *added) if added else getattr(layer, "residual_multiplier", 1)
    added = added.forward if isinstance(added, nn.Module) else functools.partial(torch.mul, other=added)
    cell = {}

    def note(module, args, kwargs):
        cell["stream"] = [*args, *kwargs.values()][argument]

    def adapt(module, args, output):
        y = output[0] if isinstance(output, tuple) else output
        stream = cell["stream"]
        for reads in ("stream", "output", "sum"):
            for config, (a, c, b, d) in adapters:
                if config.reads == reads:
                    x = stream if reads == "stream" else y if reads == "output" else norm.forward(added(y) + stream)
                    y = y + config.scaling * linear(ACTIVATIONS[config.activation](linear(x, a, c)), b, d)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    layer.get_submodule(at).register_forward_pre_hook(note, with_kwargs=True)
    layer.get_submodule(block).register_forward_hook(adapt)


def by_hooks(name: str, model: nn.Module, configs) -> dict:
    """The results of the plain model in double with the adapters of `model` in hooks."""
    plain = plain_model(name).double()
    weights = {key: p.detach().double() for key, p in model.named_parameters() if ".bottleneck." in key}
    weights = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
    for layer_name, layer in list(plain.named_modules()):
        for representation, place in PLACES.get(name, _LLAMA).items():
            owners = {key.partition(".bottleneck.")[0] for key in weights}
            try:
                layer.get_submodule(place[0]), layer.get_submodule(place[2])
            except AttributeError:
                continue
            end = f"{layer_name}.{place[2]}"
            owner = next(o for o in sorted(owners, key=len, reverse=True) if f"{end}.".startswith(f"{o}."))
            starts = [f"{owner}.bottleneck.number{i}." for i in range(len(configs))]
            adapters = [(c, [weights[s + key] for key in KEYS]) for c, s in zip(configs, starts, strict=True)]
            assert representation in ("ffn", "attention") and adapters
            hooked(layer, place, adapters)
    return results(plain) | {key: weight.grad for key, weight in weights.items()}


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in (*MODELS, "glm4", "granite") for form in ("sum", "stream")]
    + [(n, "together") for n in ("llama", "bart", "bert")],
)
def test_outputs_and_gradients_are_those_of_plain_torch(name, form):
    configs = FORMS[form]
    model = adapted(name, configs, freeze=False)
    assert sum(".bottleneck." in key for key, _ in model.named_parameters()) == 4 * 4 * len(configs)
    expected, found = by_hooks(name, model, configs), results(model.double())
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "bert"])
def test_checkpointing_files_copies_and_what_is_left(name, tmp_path):
    configs = FORMS["together"]
    plain, model = base_model(name), adapted(name, configs)
    model.train()
    expected = results(model)
    for i in range(len(configs)):
        peft_kernels.save_pretrained(model, tmp_path / str(i), f"number{i}")
    other = base_model(name)
    for i, config in enumerate(configs):
        peft_kernels.load(other, tmp_path / str(i), f"number{i}")
        assert other.__dict__[NOTE].configs[f"number{i}"] == config
    peft_kernels.set_active(other, [f"number{i}" for i in range(len(configs))])
    for twin in (other, copy.deepcopy(model)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        twin.train()
        for use_reentrant in (True, False):
            twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            twin.enable_input_require_grads()
            found = results(twin)
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    for i in range(len(configs)):
        peft_kernels.detach(model, f"number{i}")
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(results(model.eval())["logits"], results(plain.eval())["logits"])


def test_the_layer_is_what_it_was_once_no_adapter_needs_it():
    model = base_model("bart").eval()
    layer, kind = model.model.encoder.layers[0], type(base_model("bart").model.encoder.layers[0])
    peft_kernels.attach(model, BottleneckConfig(r=2, reads="sum", representation="attention"), "heads")
    with_stream = type(layer)
    assert with_stream is not kind
    peft_kernels.attach(model, BottleneckConfig(r=2), "ffn")
    assert type(layer) not in (kind, with_stream)
    peft_kernels.detach(model, "heads")
    ffn_only = base_model("bart")
    peft_kernels.attach(ffn_only, BottleneckConfig(r=2), "ffn")
    assert [type(m) for m in model.modules()] == [type(m) for m in ffn_only.modules()]
    peft_kernels.detach(model, "ffn")
    assert type(layer) is kind


@pytest.mark.parametrize("name", ["llama", "bart", "bert", "gemma2", "granite"])
def test_compile_is_one_graph(name):
    model, graphs = adapted(name, (SUM, STREAM)), []
    peft_kernels.set_active(model, ["number0", "number1"])

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    found = results(torch.compile(model, backend=backend, fullgraph=True))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and called.count("peft_kernels.bottleneck_adapter.default") == 8
    expected, exact = results(model), results(in_double(model))
    assert_as_close_as_peft({key.removeprefix("_orig_mod."): t for key, t in found.items()}, expected, exact)


def test_beside_patched_lora():
    peft = peft_model("llama")
    peft_kernels.attach(peft, SUM)
    expected, exact = results(peft), results(in_double(peft))
    peft_kernels.patch(peft)
    peft.gradient_checkpointing_enable({"use_reentrant": False})
    assert_as_close_as_peft(results(peft), expected, exact)
    peft_kernels.unpatch(peft)
    peft.gradient_checkpointing_disable()
    assert_as_close_as_peft(results(peft), expected, exact)
    peft_kernels.detach(peft)
    assert [type(m) for m in peft.modules()] == [type(m) for m in peft_model("llama").modules()]


def test_a_half_precision_base_and_stacked_norms():
    half = adapted("bert", (SUM,)).bfloat16()
    assert all(tensor.isfinite().all() for tensor in results(half).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert results(adapted("llama", (SUM, STREAM)))["logits"].isfinite().all()


def test_what_cannot_be_is_refused():
    for insertion, reads in (("serial", "stream"), ("serial", "input"), ("parallel", "sum"), ("parallel", "output")):
        with pytest.raises(ValueError, match=rf"reads of a {insertion} adapter must be one of .*, got '{reads}'"):
            BottleneckConfig(insertion=insertion, reads=reads)
    assert BottleneckConfig().reads == "output" and BottleneckConfig.parallel().reads == "input"
    torch.manual_seed(0)
    unknown = hf.PhiForCausalLM(hf.PhiConfig(**_DECODER))
    with pytest.raises(ValueError, match=r"the residual stream around model.layers.0.mlp is not known.*reads='output'"):
        peft_kernels.attach(unknown, BottleneckConfig.pfeiffer(r=2, reads="sum"))
    assert not any("bottleneck" in key for key in unknown.state_dict()) and NOTE not in unknown.__dict__
    peft_kernels.attach(unknown, BottleneckConfig.pfeiffer(r=2))
    model = base_model("llama")
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(ValueError, match=r"model.layers.1 has to hand on its residual stream and cannot change class"):
        peft_kernels.attach(model, STREAM)
    assert type(model.model.layers[0]) is type(base_model("llama").model.layers[0])
    del layer.forward
    peft_kernels.attach(model, STREAM)
    with pytest.raises(RuntimeError, match="which the layer has not handed on"):
        layer.mlp(torch.randn(1, 2, 32))
