"""Bottleneck adapters beside PEFT's LoRA and under `peft_kernels.patch`; their files; a Trainer."""

import json
import shutil

import pytest
import torch
from bottlenecks import PARALLEL, SERIAL, llama, logits, with_values
from models import (
    LAYERS,
    ROWS,
    assert_as_close_as_peft,
    base_model,
    calls_per_forward,
    each_alone,
    in_double,
    in_rows,
    inputs,
    lora_config,
    randomise,
    results,
    served,
)
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import peft_kernels
from peft_kernels import BottleneckConfig

# -- LoRA beside it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patched", ["not", "before", "after"])
@pytest.mark.parametrize("first", ["lora", "bottleneck"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_lora_and_bottleneck_adapters_work_together(name, first, patched):
    def build(patched):
        model = base_model(name).eval()
        if first == "bottleneck":
            peft_kernels.attach(model, SERIAL)
        model = randomise(get_peft_model(model, lora_config()))
        if patched == "before":
            peft_kernels.patch(model, strict=True)
        if first == "lora":
            peft_kernels.attach(model, SERIAL)
        peft_kernels.set_active(model, "default")  # PEFT has frozen what it does not know
        return with_values(model.eval(), "default")

    model, plain = build(patched), build("not")
    kinds = [type(m) for m in plain.modules()]
    expected, exact = results(plain), results(in_double(plain))
    assert {"lora_A", "lora_B", "bottleneck"} <= {part for key in expected for part in key.split(".")}
    if patched == "after":
        report = peft_kernels.patch(model, strict=True).verify(**inputs())
        found = results(model)
        assert report.fused == 2 * calls_per_forward(report) and not report.fallbacks
    else:
        found = results(model)
    assert_as_close_as_peft(found, expected, exact)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    peft_kernels.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    with peft_kernels.patch(model):
        peft_kernels.detach(model)
    lora = randomise(get_peft_model(base_model(name).eval(), lora_config()))
    assert torch.equal(logits(model), logits(lora))
    assert [type(m) for m in model.modules()] == [type(m) for m in lora.modules()]
    assert list(model.state_dict()) == list(lora.state_dict())
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        k for k, p in lora.named_parameters() if p.requires_grad
    }


def test_a_model_that_was_adapted_inside_of_patch_is_plain_afterwards():
    model = randomise(get_peft_model(llama(), lora_config()))
    with peft_kernels.patch(model):
        peft_kernels.attach(model, PARALLEL)
    kinds = {type(m).__name__ for m in model.modules()}
    assert not [kind for kind in kinds if kind.startswith("Fused")]
    assert len([key for key in results(model) if "bottleneck" in key]) == LAYERS * 4


def test_rows_with_their_own_lora_under_checkpointing():
    model = randomise(get_peft_model(base_model("bart"), lora_config())).train()
    peft_kernels.attach(model, PARALLEL)
    peft_kernels.patch(model)

    def a_step():
        with peft_kernels.adapter_ids([0, -1], ["default"]):
            return results(with_values(model, "default"))

    expected = a_step()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = a_step()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_a_model_with_a_pool(name, pool_first):
    """Rows with LoRA of a pool, over a base that has a bottleneck adapter for all of them."""
    plain, model, alone = served(name)
    plain_kinds = [type(m) for m in plain.modules()]
    peft_kernels.attach(plain, SERIAL)
    with_values(plain, "default")
    if not pool_first:
        peft_kernels.unpatch(model)
        peft_kernels.attach(model, SERIAL)
        pool = peft_kernels.attach_pool(model, adapters=8)
        assert not [site for site in pool.sites if "bottleneck" in site]
        for adapter, peft in alone.items():
            pool.load(adapter, peft)
    else:
        peft_kernels.attach(model, SERIAL)
    with_values(model, "default")
    for peft in alone.values():
        peft_kernels.attach(peft, SERIAL)
        with_values(peft, "default")
    batch = {"input_ids": inputs(rows=len(ROWS))["input_ids"]}
    with in_rows(ROWS), torch.no_grad():
        found = {"logits": model(**batch).logits}
    expected = each_alone(plain, alone, ROWS, batch)
    exact = each_alone(in_double(plain), {n: in_double(peft) for n, peft in alone.items()}, ROWS, batch)
    assert_as_close_as_peft(found, expected, exact)
    peft_kernels.unpatch(model)
    peft_kernels.detach(model)
    assert [type(m) for m in model.modules()] == plain_kinds


def test_a_class_that_is_made_over_an_adapted_one():
    """As FSDP2 makes it: the class keeps its adapters, and what would change it is refused."""
    model = base_model("bart").eval()
    peft_kernels.attach(model, PARALLEL)
    expected, layer = logits(with_values(model, "default")), model.model.decoder.layers[0]
    layer.__class__ = type("FSDPBartDecoderLayer", (type(layer),), {})
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"model.decoder.layers.0 has a class that was made after attach"):
        peft_kernels.detach(model)
    assert torch.equal(logits(model), expected)


# -- files, Trainer ---------------------------------------------------------------------------------------------------


def saved(folder, config=PARALLEL):
    model = llama()
    peft_kernels.attach(model, config)
    peft_kernels.save_pretrained(with_values(model, "default"), folder)
    return model


def test_files_are_those_of_peft(tmp_path):
    model = saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["peft_type"] == "BOTTLENECK" and about["scaling"] == 4.0 and about["r"] == 3
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.bottleneck.down_weight" in keys and len(keys) == 4 * LAYERS
    other = llama()
    state = torch.random.get_rng_state()
    peft_kernels.load(other, tmp_path, "other")
    assert torch.equal(torch.random.get_rng_state(), state) and not any(p.requires_grad for p in other.parameters())
    assert torch.equal(logits(other), logits(model))
    peft_kernels.load(other, tmp_path, "trained", trainable=True)
    assert sum(p.requires_grad for p in other.parameters()) == 4 * LAYERS
    under_lora = get_peft_model(llama(), lora_config())
    peft_kernels.load(under_lora, tmp_path)
    assert torch.equal(logits(under_lora), logits(model))


def _config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


_KEY = "base_model.model.model.layers.1.mlp.bottleneck.up_bias"
BROKEN = {
    "no-folder": (shutil.rmtree, "there is no folder"),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json that can be read"),
    "not-json": (lambda f: (f / "adapter_config.json").write_text("{"), "has no adapter_config.json that can be read"),
    "not-a-dict": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        "must be BOTTLENECK or BITFIT or PREFIX or P_TUNING_V2 or MAM, got None",
    ),
    "lora": (
        lambda f: _config(f, peft_type="LORA"),
        "must be BOTTLENECK or BITFIT or PREFIX or P_TUNING_V2 or MAM, got LORA; what PEFT has saved is loaded by",
    ),
    "stranger": (lambda f: _config(f, rank=3), "there is no field 'rank'"),
    "field": (lambda f: _config(f, norm="batch"), "norm must be one of"),
    "layer": (lambda f: _config(f, layers=[7]), r"layers must lie in \[0, 2\)"),
    "no-weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "pytorch_adapter.bin"),
        "has no adapter_model.safetensors; a .bin file is a pickle and is not read",
    ),
    "cut-weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    "missing": (lambda f: _weights(f, lambda t: t.pop(_KEY)), f"has no {_KEY}, which its config needs"),
    "too-many": (lambda f: _weights(f, lambda t: t.update(x=t[_KEY].clone())), "the model has no place for x"),
    "shape": (
        lambda f: _weights(f, lambda t: t.update({_KEY: torch.zeros(9)})),
        rf"{_KEY} must have shape \[32\] in this model, got \[9\]",
    ),
}


@pytest.mark.parametrize(("spoil", "text"), BROKEN.values(), ids=BROKEN)
def test_a_load_that_fails_changes_nothing(spoil, text, tmp_path):
    model = saved(tmp_path)
    before = dict(model.named_modules()), logits(model), {k: p.requires_grad for k, p in model.named_parameters()}
    spoil(tmp_path)
    with pytest.raises(ValueError, match=text):
        peft_kernels.load(model, tmp_path, "other")
    assert dict(model.named_modules()) == before[0] and torch.equal(logits(model), before[1])
    assert {k: p.requires_grad for k, p in model.named_parameters()} == before[2]
    assert peft_kernels.active_adapters(model) == ("default",)


def test_trainer_trains_it_and_its_parameters_are_counted(tmp_path, capsys):
    model = base_model("llama")
    peft_kernels.attach(model, BottleneckConfig.adapter_plus(r=4))
    peft_kernels.print_trainable_parameters(model)
    trainable, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (0, 1))
    words = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
    assert capsys.readouterr().out.strip() == words
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = [{key: tensor[0] for key, tensor in inputs().items()}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2,
        gradient_checkpointing=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and changed <= {key for key in before if ".bottleneck.default." in key}
