"""Widened blocks compute what the op and plain PyTorch compute, with no launch more, compiled and generating too."""

import copy

import pytest
import torch
from models import GENERATING, assert_as_close_as_peft, inputs
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from widened_models import MODELS, adapted, assert_same, blocks, logits, plain, trained

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.ops.common.activations import ACTIVATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("activation", ["own", "tanh"])
@pytest.mark.parametrize("name", MODELS)
def test_widened_equals_the_op_and_plain_pytorch(name, activation, dtype, monkeypatch):
    model = adapted(name, **{} if activation == "own" else {"activation": activation}).to(dtype)
    widened = copy.deepcopy(model)
    report = peft_kernels.widen(widened)
    assert report.widened and not report.left and len(blocks(widened)) == len(report.rows)
    assert_same(widened, model, monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_folded_serial_adapters_equal_the_op_and_plain_pytorch(name, monkeypatch):
    model = adapted(name, BottleneckConfig.houlsby(r=5, scaling="learned"))
    widened = copy.deepcopy(model)
    report = peft_kernels.widen(widened, serial=True)
    assert {row.form for row in report.rows} == {"serial, folded"}
    assert_same(widened, model, monkeypatch)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("config", [BottleneckConfig.parallel, BottleneckConfig.pfeiffer], ids=["parallel", "serial"])
def test_every_activation(config, activation, monkeypatch):
    model = adapted(config=config(r=3, activation=activation))
    widened = copy.deepcopy(model)
    peft_kernels.widen(widened, serial=True)
    assert_same(widened, model, monkeypatch)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_all_active_adapters_widen_together(name, monkeypatch):
    model = adapted(name, r=8, scaling="channel")
    peft_kernels.attach(model, BottleneckConfig.parallel(r=5, activation="sigmoid", layers=[1]), "second")
    peft_kernels.attach(model, BottleneckConfig.parallel(r=2), "idle")
    peft_kernels.set_active(trained(model), ["default", "second"])
    widened = copy.deepcopy(model)
    report = peft_kernels.widen(widened)
    assert [(row.adapters, row.units) for row in report.rows] == [(("default",), 8), (("default", "second"), 16)]
    assert_same(widened, model, monkeypatch)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_of_what_is_before_a_widened_block(name, monkeypatch):
    model = adapted(name, activation="tanh")
    widened = copy.deepcopy(model)
    peft_kernels.widen(widened)
    found = []
    for one in (widened, model, copy.deepcopy(model).double()):
        embeds = one.get_input_embeddings()(inputs()["input_ids"]).detach().requires_grad_()
        one(inputs_embeds=embeds).logits.square().sum().backward()
        found.append({"dx": embeds.grad})
    assert_as_close_as_peft(*found)


class Kernels(TorchDispatchMode):
    """Counts the calls that compute something."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function._opname not in ("_unsafe_view", "detach"):
            self.calls.append(function._opname)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "gated t5"])
def test_no_launch_more_than_without_adapters(name):
    counts, widened = [], adapted(name)
    peft_kernels.widen(widened)
    for model in (plain(name), widened):
        logits(model)
        with Kernels() as kernels:
            logits(model)
        counts.append(len(kernels.calls))
    assert counts[1] <= counts[0]


COMPILED = {  # a module around a widened block
    "llama": "model.layers.0.mlp",
    "gpt2": "transformer.h.0.mlp",
    "t5": "encoder.block.0.layer.1",
    "gated t5": "encoder.block.0.layer.1",
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("activation", ["own", "tanh"])
@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_a_compiled_block_is_one_graph_and_follows_what_is_loaded(name, activation, backend):
    model = adapted(name, **{} if activation == "own" else {"activation": activation})
    peft_kernels.widen(model)
    block, x = model.get_submodule(COMPILED[name]), torch.randn(2, 3, 32)
    torch._dynamo.reset()
    compiled, before = torch.compile(block, backend=backend, fullgraph=True), block(x)
    torch.testing.assert_close(compiled(x), before)
    model.load_state_dict(trained(copy.deepcopy(model), seed=5).state_dict())
    torch.testing.assert_close(compiled(x), block(x))
    assert not torch.equal(compiled(x), before)


@torch.no_grad()
def test_a_compiled_model_is_one_graph():
    model = adapted()
    peft_kernels.widen(model)
    ids = inputs()["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@torch.no_grad()
def test_export():
    model = adapted()
    peft_kernels.widen(model)
    block, x = model.model.layers[0].mlp, torch.randn(2, 3, 32)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))


@torch.no_grad()
def test_a_compiled_folded_projection():
    model = adapted(config=BottleneckConfig.houlsby(r=4))
    peft_kernels.widen(model, serial=True)
    block, x = model.model.layers[0].mlp, torch.randn(2, 3, 32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


@pytest.mark.parametrize("name", GENERATING)
def test_generate(name):
    model = adapted(name).double()
    ids = inputs()["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    peft_kernels.widen(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    if name in ("llama", "gemma", "opt"):
        static = model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation="static")
        assert torch.equal(static, expected)


@pytest.mark.parametrize("patch_first", [True, False], ids=["patched_before", "patched_after"])
def test_lora_on_the_attention_stays(patch_first, monkeypatch):
    model = get_peft_model(plain(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    peft_kernels.attach(model, BottleneckConfig.scaled_parallel(r=8))
    trained(model)
    widened = copy.deepcopy(model)
    if patch_first:
        peft_kernels.patch(widened)
    peft_kernels.widen(widened)
    if not patch_first:
        peft_kernels.patch(widened).verify(**inputs())
    assert_same(widened, model, monkeypatch)
    peft_kernels.unpatch(widened)
    assert_same(widened, model, monkeypatch)
    peft_kernels.unwiden(widened)
    assert [type(m) for m in widened.modules()] == [type(m) for m in model.modules()]
