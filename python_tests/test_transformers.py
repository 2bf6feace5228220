"""Patched models of every type against plain PEFT: forward, gradients, generate, save and load; always with a count."""

import copy

import pytest
import torch
from models import (
    GENERATING,
    LAYERS,
    MODELS,
    Mask,
    assert_as_close_as_peft,
    base_model,
    calls_per_forward,
    in_double,
    inputs,
    lora_config,
    peft_model,
    randomise,
    results,
)
from peft import PeftModel, get_peft_model
from peft.tuners import lora

import peft_kernels


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_every_gradient_equal_peft(name):
    model = peft_model(name)
    plain, exact = results(model), results(in_double(model))
    report = peft_kernels.patch(model, strict=True)
    assert any(row.group for row in report.rows) == MODELS[name][3]
    assert bool(report.notes) != MODELS[name][3]
    assert_as_close_as_peft(results(model), plain, exact)
    assert report.fused == calls_per_forward(report) and not report.fallbacks


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][3]])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_groups_in_both_attention_implementations(name, attention):
    attention = "eager" if name == "gemma2" else attention  # transformers has no softcap in sdpa
    changes = {"attn_implementation": attention, "attention_bias": True}
    model = peft_model(name, changes, target_modules=["q_proj", "v_proj"])
    batch = inputs() | {"attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    plain, exact = results(model, **batch), results(in_double(model), **batch)
    report = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(results(model, **batch), plain, exact)
    assert report.fused == LAYERS == calls_per_forward(report)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][3]])
def test_groups_keep_the_dropout_of_attention(name):
    changes = {"attention_dropout": 0.4, "attn_implementation": "eager"}
    model = in_double(peft_model(name, changes)).train()  # in fp64, where the masks of both are the same draws
    found = {}
    for arm in ("plain", "patched"):
        report = peft_kernels.patch(model, strict=True) if arm == "patched" else None
        torch.manual_seed(11)
        found[arm] = results(model)
    assert_as_close_as_peft(found["patched"], found["plain"], found["plain"])
    assert report.fused == calls_per_forward(report)


@pytest.mark.parametrize("name", GENERATING)
def test_generate_gives_the_same_tokens(name):
    model = peft_model(name).eval()
    prompt = inputs()["input_ids"]
    plain = model.generate(input_ids=prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    report = peft_kernels.patch(model, strict=True)
    patched = model.generate(input_ids=prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(patched, plain)
    assert report.fused > calls_per_forward(report) and not report.fallbacks


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, tmp_path):
    model = peft_model(name).eval()
    model.save_pretrained(tmp_path / "plain")
    keys = list(model.state_dict())
    report = peft_kernels.patch(model, strict=True)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "patched")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes()
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path / "patched").eval()
    peft_kernels.patch(loaded, strict=True)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)
    assert report.fused == calls_per_forward(report)


def test_a_transformers_model_with_adapters_of_its_own(tmp_path):
    peft_model("llama").save_pretrained(tmp_path)
    model = base_model("llama")
    model.load_adapter(str(tmp_path), adapter_name="loaded")
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    plain, exact = results(model), results(in_double(model))
    report = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(results(model), plain, exact)
    assert report.fused == calls_per_forward(report)


def test_switches_are_read_at_every_call():
    model = peft_model("llama").eval()
    model.add_adapter("second", lora_config(r=2, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    base = base_model("llama").eval()
    report = peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        for choose in (
            lambda: model.set_adapter("second"),
            lambda: model.set_adapter("default"),
            lambda: model.base_model.set_adapter(["default", "second"]),
        ):
            choose()
            before = report.fused
            patched = {"logits": model(**inputs()).logits}
            assert report.fused > before
            with peft_kernels.unpatch(model):
                plain = {"logits": model(**inputs()).logits}
            exact = {"logits": in_double(model)(**inputs()).logits}
            assert_as_close_as_peft(patched, plain, exact)
        before = report.fused
        with model.disable_adapter():
            assert torch.equal(model(**inputs()).logits, base(**inputs()).logits)
        assert report.fused == before and sum(report.fallbacks.values())


def test_merge_and_unmerge():
    model = peft_model("llama").eval()
    twin = copy.deepcopy(model)
    report = peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        model.merge_adapter()
        twin.merge_adapter()
        assert torch.equal(model(**inputs()).logits, twin(**inputs()).logits)
        assert report.fused == 0
        peft_kernels.unpatch(model)
        report = peft_kernels.patch(model)
        merged = "merged: the base layer alone"
        assert {row.reason for row in report.rows} == {merged, f"q_proj: {merged}", f"gate_proj: {merged}"}
        with pytest.raises(RuntimeError, match=merged):
            report.verify(**inputs())
        model.unmerge_adapter()
        report.verify(**inputs())
        assert report.fused == calls_per_forward(report)
        assert not any(isinstance(m, lora.Linear) for m in model.merge_and_unload().modules())


def test_adapter_names_are_left_to_peft():
    model = peft_model("llama").eval()
    names = ["default", "__base__"]
    with torch.no_grad():
        plain = model(input_ids=inputs()["input_ids"], adapter_names=names).logits
        report = peft_kernels.patch(model, strict=True)
        assert torch.equal(model(input_ids=inputs()["input_ids"], adapter_names=names).logits, plain)
        assert report.fused == 0 and any("adapter_names" in reason for reason in report.fallbacks)
        report.verify(**inputs())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_with_dropout(use_reentrant):
    model = peft_model("llama", lora_dropout=0.3)
    model.enable_input_require_grads()
    model.train()
    report = peft_kernels.patch(model, strict=True)
    torch.manual_seed(5)
    expected = results(model)
    once = report.fused
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    found = results(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert once == calls_per_forward(report) and report.fused == 3 * once


def test_dropout_is_the_mask_replayed():
    model = peft_model("llama", {"num_hidden_layers": 1}, lora_dropout=0.25).train()
    twin = copy.deepcopy(model)
    torch.manual_seed(9)
    layer = twin.base_model.model.model.layers[0]
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        seed = peft_kernels.new_seed()
        for stream, name in enumerate(group):
            owner = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            getattr(owner, name).lora_dropout["default"] = Mask(seed, 0.25, stream)
    plain, exact = results(twin), results(in_double(twin))
    report = peft_kernels.patch(model, strict=True)
    torch.manual_seed(9)
    assert_as_close_as_peft(results(model), plain, exact)
    assert report.fused == calls_per_forward(report) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast(name):
    model = peft_model(name)
    exact = results(in_double(model))
    report = peft_kernels.patch(model, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        patched = results(model)
    assert report.fused == calls_per_forward(report)
    peft_kernels.unpatch(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(model)
    both = [{n: t.bfloat16() for n, t in found.items()} for found in (patched, plain)]  # bf16 is what rounded them
    assert_as_close_as_peft(*both, exact)


def test_fp32_adapters_on_a_bf16_base():
    model = randomise(get_peft_model(base_model("llama").bfloat16(), lora_config()))
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}
    exact, plain = results(in_double(model)), results(model)
    report = peft_kernels.patch(model, strict=True)
    patched = results(model)
    both = [{n: t.bfloat16() for n, t in found.items()} for found in (patched, plain)]
    assert_as_close_as_peft(*both, exact)
    assert report.fused == calls_per_forward(report)
    assert all(patched[n].dtype == plain[n].dtype for n in plain)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compile_of_a_patched_model_is_one_graph(dropout):
    model = peft_model("llama", {"num_hidden_layers": 1}, lora_dropout=dropout).train()
    expected = results(model, **inputs()) if dropout == 0 else None
    exact = results(in_double(model)) if dropout == 0 else None
    report = peft_kernels.patch(model, strict=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = results(compiled)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and called.count("peft_kernels.lora_linear.default") == calls_per_forward(report) == 4
    assert report.fused == 0  # compiled calls are not counted
    if dropout == 0:
        assert_as_close_as_peft({n.removeprefix("_orig_mod."): t for n, t in found.items()}, expected, exact)
    report.verify(**inputs())
