"""Bottleneck adapters in every type of model, against adapters that are built in by hand of plain torch operations."""

import copy

import pytest
import torch
import transformers as hf
from models import _DECODER, GENERATING, MODELS, assert_as_close_as_peft, base_model, in_double, inputs, results
from torch import nn

import peft_kernels
from peft_kernels import BottleneckConfig

MIXTURES = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
}  # fmt: skip
OTHERS = {
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, {}),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {}),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, {"n_layer": 2, "n_head": 4}),
}
ALL = [*MODELS, *MIXTURES]

_LLAMA = {"ffn": ("mlp.gate_proj", "mlp.down_proj"), "attention": ("self_attn.q_proj", "self_attn.o_proj")}
_BERT = {
    "ffn": ("intermediate.dense", "output.dense"),
    "attention": ("attention.self.query", "attention.output.dense"),
}
_BART = {"ffn": ("fc1", "fc2"), "attention": ("self_attn.q_proj", "self_attn.out_proj")}
_H_TO_4H = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
# a block's first and last projection, as they are called within a layer: x goes into the one, r comes out of the other
ENDS = {
    "gpt2": {"ffn": ("mlp.c_fc", "mlp.c_proj"), "attention": ("attn.c_attn", "attn.c_proj")},
    "opt": _BART,
    "bart": _BART,
    "bert": _BERT,
    "roberta": _BERT,
    "t5": {"ffn": ("DenseReluDense.wi", "DenseReluDense.wo"), "attention": ("SelfAttention.q", "SelfAttention.o")},
    "phi": {"ffn": ("mlp.fc1", "mlp.fc2"), "attention": ("self_attn.q_proj", "self_attn.dense")},
    "gpt_neox": {"ffn": _H_TO_4H, "attention": ("attention.query_key_value", "attention.dense")},
    "gptj": {"ffn": ("mlp.fc_in", "mlp.fc_out"), "attention": ("attn.q_proj", "attn.out_proj")},
    "bloom": {"ffn": _H_TO_4H, "attention": ("self_attention.query_key_value", "self_attention.dense")},
    "mixtral": _LLAMA | {"ffn": ("mlp", "mlp")},
    "qwen3_moe": _LLAMA | {"ffn": ("mlp", "mlp")},
}
ACTIVATIONS = {"relu": nn.functional.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


def a_model(name: str) -> nn.Module:
    if name in MODELS:
        return base_model(name).eval()
    model_class, config_class, changes = (MIXTURES | OTHERS)[name]
    torch.manual_seed(1)
    model = model_class(config_class(**_DECODER | changes)).eval()
    if name in MIXTURES:
        model.set_experts_implementation("eager")  # the others take no float64
    return model


def trained(model: nn.Module, names=("default",)) -> nn.Module:
    """Gives the adapters weights whose part of the output is as large as the base's; always the same ones."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(f".bottleneck.{name}." in key for name in names):
                width = parameter.shape[-1] if parameter.dim() == 2 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5 / 2)
    return model


class First(nn.Module):
    """A projection that notes its input."""

    def __init__(self, inner, cell):
        super().__init__()
        self.inner, self.cell = inner, cell

    def forward(self, x, *args):
        self.cell["x"] = x
        return self.inner(x, *args)


class Last(nn.Module):
    """A projection after which there is an adapter, of the weights that `attach` has made."""

    def __init__(self, inner, cell, config, weights):
        super().__init__()
        self.inner, self.cell, self.config = inner, cell, config
        self.bottleneck = nn.ParameterDict({"default": nn.ParameterDict(weights)})
        self.weight = None  # T5 looks for one

    def forward(self, *args):
        y, w = self.inner(*args), self.bottleneck["default"]
        x = y if self.config.insertion == "serial" else self.cell["x"]
        if self.config.norm == "layer_norm":
            x = nn.functional.layer_norm(x, x.shape[-1:], w["norm_weight"], w["norm_bias"])
        h = nn.functional.linear(x, w["down_weight"], w["down_bias"])
        t = nn.functional.linear(ACTIVATIONS[self.config.activation](h), w["up_weight"], w["up_bias"])
        return y + t * (w["scale"] if self.config.scaling == "channel" else self.config.scaling)


def by_hand(name: str, adapted: nn.Module, config: BottleneckConfig) -> tuple[nn.Module, dict[str, str]]:
    """The model with its adapters in it as plain modules; and what their parameters are called in `adapted`."""
    model, tensors, owners = a_model(name), dict(adapted.named_parameters()), {}
    for key in tensors:
        owner, found, _ = key.partition(".bottleneck.")
        if found:
            owners.setdefault(owner, None)
    ends, renamed = ENDS.get(name, _LLAMA), {}
    for layer_name, layer in list(model.named_modules()):
        for representation in config.representations:
            first, last = ends[representation]
            try:
                paths = {end: layer.get_submodule(end) for end in (first, last)}
            except AttributeError:
                continue
            owner = next(o for o in owners if f"{layer_name}.{last}.".startswith(f"{o}."))
            start = f"{owner}.bottleneck.default."
            weights = {k.removeprefix(start): v.detach().clone() for k, v in tensors.items() if k.startswith(start)}
            cell = {}
            _put(layer, first, First(paths[first], cell))
            _put(layer, last, Last(layer.get_submodule(last), cell, config, weights))
            renamed[f"{layer_name}.{last}.bottleneck."] = f"{owner}.bottleneck."
    return model, renamed


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(layer.get_submodule(parent), child, module)


def hand_results(model: nn.Module, renamed: dict[str, str], wanted) -> dict:
    def rename(key):
        for there, here in renamed.items():
            key = key.replace(there, here)
        return key.replace(".inner", "")

    found = {rename(key): tensor for key, tensor in results(model).items()}
    return {key: found[key] for key in wanted}


CONFIGS = {
    "serial": BottleneckConfig.houlsby(r=4, activation="silu", norm="layer_norm"),
    "parallel": BottleneckConfig.scaled_parallel(r=5, representation="both", activation="gelu"),
    "channel": BottleneckConfig(r=3, insertion="parallel", scaling="channel", activation="tanh"),
}


@pytest.mark.parametrize(
    ("name", "form"), [(n, form) for n in ALL for form in ("serial", "parallel")] + [(n, "parallel") for n in OTHERS]
)
def test_outputs_and_gradients_are_those_of_adapters_built_in_by_hand(name, form):
    config = CONFIGS[form]
    model = a_model(name)
    keys = model.state_dict().keys()
    sites = peft_kernels.attach(model, config)
    model.get_input_embeddings().requires_grad_()  # so that x has a gradient in every layer
    assert len(sites) == 4 and keys <= trained(model).state_dict().keys()
    twin, renamed = by_hand(name, model, config)
    assert len(renamed) == len(sites)
    found = results(model)
    exact = hand_results(in_double(twin), renamed, found)
    plain = hand_results(twin, renamed, found)
    assert len([key for key in found if ".bottleneck." in key]) == 4 * (6 if form == "serial" else 4)
    assert_as_close_as_peft(found, plain, exact)
    with torch.no_grad():
        assert not torch.equal(a_model(name)(**inputs()).logits, found["logits"])


@pytest.mark.parametrize("name", ALL)
def test_start_train_save_load_generate_detach(name, tmp_path):
    model, config = a_model(name), CONFIGS["channel"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kinds = {key: type(module) for key, module in model.named_modules()}
    frozen = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with torch.no_grad():
        base = model(**inputs()).logits
        peft_kernels.attach(model, config)
        assert torch.equal(model(**inputs()).logits, base)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trainable) == 2 * config.parameters(32)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(2):  # in the first step, B = 0 lets no gradient through to A
        optimizer.zero_grad()
        model(**inputs()).loss.backward()
        optimizer.step()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    peft_kernels.save_pretrained(model, tmp_path)
    loaded = a_model(name)
    assert peft_kernels.load(loaded, tmp_path, "again") == peft_kernels.load(a_model(name), tmp_path)
    with torch.no_grad():
        logits = model(**inputs()).logits
        assert torch.equal(loaded(**inputs()).logits, logits) and not torch.equal(logits, base)
        if name in GENERATING or name in MIXTURES:
            tokens = [m.generate(inputs()["input_ids"], max_new_tokens=4, do_sample=False) for m in (model, loaded)]
            slow = model.generate(inputs()["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False)
            assert torch.equal(*tokens) and torch.equal(tokens[0], slow)
        peft_kernels.detach(model)
        assert torch.equal(model(**inputs()).logits, base)
    assert list(model.state_dict()) == list(before)
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == frozen


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "opt"])
def test_checkpointing_copies_and_pickles_change_nothing(name, tmp_path):
    config = BottleneckConfig.houlsby(r=4, insertion="parallel", dropout_p=0.3, drop_path=0.2, gate=True)
    model = a_model(name)
    peft_kernels.attach(model, config)
    model.train()

    def a_step(model):
        torch.manual_seed(5)
        return results(model)

    expected = a_step(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        for use_reentrant in (True, False):
            found = a_step(other)
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
            other.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            other.enable_input_require_grads()
    model.eval()
    assert not torch.equal(results(model)["logits"], expected["logits"])


@pytest.mark.parametrize(("name", "form"), [("llama", "serial"), ("bart", "parallel")])
def test_compile_is_one_graph(name, form):
    model = a_model(name)
    peft_kernels.attach(model, CONFIGS[form])
    trained(model)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    found = results(torch.compile(model, backend=backend, fullgraph=True))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and called.count("peft_kernels.bottleneck_adapter.default") == 4
    expected, exact = results(model), results(in_double(model))
    assert_as_close_as_peft({key.removeprefix("_orig_mod."): t for key, t in found.items()}, expected, exact)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
def test_sixteen_bit_bases_and_autocast(name):
    model = a_model(name)
    peft_kernels.attach(model, CONFIGS["parallel"])
    single = results(trained(model))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = results(model)
    assert all(mixed[key].isfinite().all() for key in single)
    assert all(mixed[key].dtype is single[key].dtype for key in single if key != "logits")
    half = a_model(name).bfloat16()
    peft_kernels.attach(half, CONFIGS["parallel"])
    ours = [p for key, p in trained(half).named_parameters() if ".bottleneck." in key]
    assert {p.dtype for p in ours} == {torch.float32} and half(**inputs()).logits.dtype is torch.bfloat16
    found = results(half)
    assert all(found[key].isfinite().all() for key in single)
