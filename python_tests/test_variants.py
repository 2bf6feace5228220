"""PEFT's variants of LoRA in patched models, against PEFT; which of them are left to it and why; frozen factors."""

from types import SimpleNamespace

import pytest
import torch
from models import (
    HIDDEN,
    LAYERS,
    adapted,
    assert_as_close_as_peft,
    assert_fused_like_peft,
    assert_saves_like_peft,
    base_model,
    calls_per_forward,
    in_double,
    inputs,
    lora_config,
    nothing_is_left,
    peft_model,
    randomise,
    results,
)
from peft import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer

import peft_kernels
from peft_kernels.integrations.invocations import from_offsets

INVOKED = [7, 9]


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("changes", [{"init_lora_weights": "mica"}, {"kasa_config": KasaConfig()}], ids=str)
def test_a_step_is_pefts(changes, name):
    model = peft_model(
        name, target_modules=["q_proj", "k_proj", "down_proj", "query", "value", "output.dense"], **changes
    )
    report = assert_fused_like_peft(model)
    assert report.fused == 2 * LAYERS if name == "llama" else report.fused > 2 * LAYERS


@pytest.mark.parametrize("changes", [{"init_lora_weights": "mica"}, {"kasa_config": KasaConfig()}], ids=str)
def test_merging_and_saving(changes, tmp_path):
    model = peft_model("llama", target_modules=["q_proj", "down_proj"], **changes).eval()
    peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        before = model(**inputs()).logits
        model.merge_adapter()
        merged = model(**inputs()).logits
        model.unmerge_adapter()
        exact = in_double(model)(**inputs()).logits
    assert_as_close_as_peft({"merged": merged}, {"merged": before}, {"merged": exact})
    trained = get_peft_model(base_model("llama"), lora_config(target_modules=["q_proj", "down_proj"], **changes))
    for parameter in trained.parameters():  # not MiCA's B, which stays as it begins
        if parameter.requires_grad:
            parameter.data.normal_()
    assert_saves_like_peft(trained, base_model("llama"), tmp_path)


def test_kasa_truncates_before_it_is_fused(tmp_path):
    """Loaded on meta, the base is truncated by PEFT's first forward."""
    model = peft_model("llama", target_modules=["down_proj"], kasa_config=KasaConfig()).eval()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    report = peft_kernels.patch(model, strict=True)
    layer._lora_kasa_truncation_deferred.add("default")
    for _ in range(2):
        model(**inputs())
    assert report.fallbacks == {"Kasa has yet to truncate the base layer": 1} and report.fused == 2 * LAYERS - 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"velora_config": VeloraConfig(num_groups=4)}, "Velora changes the maths"),
        ({"monteclora_config": MontecloraConfig()}, "Monteclora changes the maths"),
    ],
    ids=["velora", "monteclora"],
)
def test_what_only_training_changes_is_fused_in_inference(changes, reason):
    model = peft_model("llama", target_modules=["q_proj", "down_proj"], **changes)
    report = peft_kernels.patch(model.eval(), strict=True)
    with torch.no_grad():
        found, exact = model(**inputs()).logits, in_double(model)(**inputs()).logits
        with peft_kernels.unpatch(model):
            plain = model(**inputs()).logits
    assert_as_close_as_peft({"y": found}, {"y": plain}, {"y": exact})
    assert report.fused == 2 * LAYERS and not report.fallbacks
    model.train()
    results(model)
    assert report.fused == 2 * LAYERS and report.fallbacks == {reason: 2 * LAYERS}


def test_a_variant_of_another_shape_is_left_to_peft():
    model = adapted(
        "llama",
        lora_config(target_modules=["q_proj"], use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
    )
    report = peft_kernels.patch(model)
    assert {row.reason for row in report.rows} == {"BdLora changes the maths"}
    with pytest.raises(RuntimeError, match="BdLora changes the maths"):
        peft_kernels.patch(model, strict=True)
    assert report.fused == 0


# -- aLoRA ------------------------------------------------------------------------------------------------------------


def alora(name="llama", **changes):
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc"]}[name]
    return peft_model(
        name, **{"target_modules": targets} | changes, alora_invocation_tokens=INVOKED, task_type="CAUSAL_LM"
    )


def prompts(rows=4, tokens=7):
    """Sequences that invoke the adapter at the start, in the middle, at the end, and never."""
    batch = inputs(rows, tokens)
    batch["input_ids"] = batch["input_ids"].clone().clamp(10)
    for row, place in enumerate([0, 3, tokens - 2]):
        batch["input_ids"][row, place : place + 2] = torch.tensor(INVOKED)
    return batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_alora_is_the_adapter_of_the_tokens_after_the_invocation(name):
    model = alora(name)
    plain, exact = results(model, **prompts()), results(in_double(model), **prompts())
    report = peft_kernels.patch(model, strict=True)
    assert not any(row.reason for row in report.rows)
    assert_as_close_as_peft(results(model, **prompts()), plain, exact)
    assert report.fused == calls_per_forward(report) and not report.fallbacks and nothing_is_left(model)
    report.verify(**prompts())


def test_alora_in_checkpointed_layers():
    model = alora()
    model.enable_input_require_grads()
    peft_kernels.patch(model.train())
    expected = results(model, **prompts())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = results(model, **prompts())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cached", [True, False])
def test_alora_generates_the_same_tokens(cached):
    model = alora().eval()
    search = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cached)
    prompt = prompts()["input_ids"]
    plain = model.generate(input_ids=prompt, **search)
    report = peft_kernels.patch(model)
    assert torch.equal(model.generate(input_ids=prompt, **search), plain)
    assert report.fused == 5 * calls_per_forward(report) and not report.fallbacks


def test_alora_with_beams_is_each_sequence_by_itself():
    """PEFT has no beams with aLoRA."""
    model = alora().eval()
    search = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=3)
    prompt = prompts()["input_ids"]
    report = peft_kernels.patch(model)
    together = model.generate(input_ids=prompt, **search)
    alone = [model.generate(input_ids=prompt[i : i + 1], **search) for i in range(4)]
    assert torch.equal(together, torch.cat(alone)) and not report.fallbacks
    assert report.fused == 5 * 4 * calls_per_forward(report)


def test_alora_of_flattened_rows_says_what_it_needs():
    rows = from_offsets(["a", "a"], [3, None], [], {"a": SimpleNamespace(alora_invocation_tokens=[1])}, {"a"}, 1)
    assert rows.route(torch.Size((2, 4)), torch.device("cpu")).numel()
    assert rows._flat(torch.Size((2, 4))).tolist() == [-1, 0, 0, 0, -1, -1, -1, -1]
    with pytest.raises(ValueError, match=r"offsets for 2 sequences, which a layer's input of leading sizes \[8\]"):
        rows.route(torch.Size((8,)), torch.device("cpu"))


def test_alora_beside_lora_in_one_batch():
    model = alora().eval()
    model.add_adapter("plain", lora_config(r=3))
    randomise(model)
    batch = prompts() | {"adapter_names": ["default", "plain", "__base__", "default"]}
    with torch.no_grad():
        plain, exact = model(**batch).logits, in_double(model)(**batch).logits
        report = peft_kernels.patch(model)
        found = model(**batch).logits
    assert_as_close_as_peft({"y": found}, {"y": plain}, {"y": exact})
    assert report.fused == calls_per_forward(report) and not report.fallbacks


def test_a_layer_that_is_left_is_told_the_offsets_as_peft_tells_them():
    model = alora().eval()
    batch = prompts() | {"adapter_names": ["default", "__base__", "default", "default"]}
    for more in (batch, prompts()):
        with torch.no_grad():
            plain = model(**more).logits
            with peft_kernels.patch(model) as report:
                layer = model.base_model.model.model.layers[1].mlp.down_proj
                hook = layer.lora_A["default"].register_forward_hook(lambda *a: None)
                torch.testing.assert_close(model(**more).logits, plain)
                hook.remove()
        assert report.fallbacks == {"hook on lora_A, lora_B or lora_dropout": 1}


def test_a_module_that_is_trained_beside_alora():
    model = alora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]).eval()
    for more in ({}, {"adapter_names": ["default", "__base__", "default", "default"]}):
        with torch.no_grad():
            plain, exact = model(**prompts(), **more).logits, in_double(model)(**prompts(), **more).logits
            with peft_kernels.patch(model) as report:
                found = model(**prompts(), **more).logits
        assert_as_close_as_peft({"y": found}, {"y": plain}, {"y": exact})
        assert report.fused == LAYERS and not report.fallbacks


def test_alora_where_no_place_is_known_is_left_to_peft():
    model = alora().eval()
    embedded = torch.randn(2, 5, HIDDEN)
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets"):
        plain = model(inputs_embeds=embedded).logits
        report = peft_kernels.patch(model)
        assert torch.equal(model(inputs_embeds=embedded).logits, plain)
    assert report.fused == 0 and all("ALora without a place of invocation" in r for r in report.fallbacks)


def test_several_active_alora_are_not_fused():
    model = alora(target_modules=["down_proj"]).eval()
    model.add_adapter("other", lora_config(target_modules=["down_proj"], alora_invocation_tokens=INVOKED))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(RuntimeError, match="ALora without a place of invocation"):
        peft_kernels.patch(model, strict=True)


def test_the_block_wins_over_an_alora_that_is_active():
    model = alora().eval()
    model.add_adapter("plain", lora_config(r=3))
    randomise(model)
    batch = prompts()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(**batch).logits
        model.set_adapter("plain")
        plain = model(**batch).logits
        model.set_adapter("default")
        report = peft_kernels.patch(model, strict=True)
        with peft_kernels.adapter_ids([0, -1, 0, -1], ["plain"]):
            found = model(**batch).logits
    torch.testing.assert_close(found, torch.stack([plain[0], base[1], plain[2], base[3]]))
    assert report.fused == calls_per_forward(report) and not report.fallbacks


def test_an_alora_that_would_be_off_in_silence_is_refused():
    model = alora().eval()
    peft_kernels.patch(model, strict=True)
    with (
        pytest.raises(ValueError, match=r"'default' is an aLoRA.*: pass adapter_names, or ids per token"),
        peft_kernels.adapter_ids([0, -1, 0, 0], ["default"]),
    ):
        model(**prompts())
    model.base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].register_forward_hook(lambda *a: None)
    with (
        pytest.raises(ValueError, match=r"no kernel for it here \(hook on lora_A.*\); pass adapter_names"),
        peft_kernels.adapter_ids(torch.zeros(4, 7, dtype=torch.int32), ["default"]),
    ):
        model(**prompts())


def test_tokens_of_an_alora_can_be_named():
    model = alora().eval()
    report = peft_kernels.patch(model)
    batch = prompts()
    expected = model(**batch).logits
    ids = torch.full((4, 7), -1)
    ids[0], ids[1, 3:], ids[2, 5:] = 0, 0, 0
    with peft_kernels.adapter_ids(ids, ["default"]):
        found = model(**batch).logits
    assert torch.equal(found, expected) and not report.fallbacks


# -- frozen factors ---------------------------------------------------------------------------------------------------


def test_lora_fa_keeps_no_input_and_computes_no_gradient_of_a():
    """LoRA-FA (arXiv:2308.03303) trains B alone: PEFT's optimizer freezes A."""
    model = peft_model("llama", target_modules=["down_proj"])
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=16, lr=1e-2)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert not layer.lora_A["default"].weight.requires_grad
    kept = {}
    for patched in (False, True):
        if patched:
            report = peft_kernels.patch(model, strict=True)
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=tensors: kept.append(t) or t, lambda t: t):
            y = layer(torch.randn(50, layer.in_features))
        y.sum().backward()
        kept[patched] = sum(t.numel() for t in tensors if t.dim() == 2 and len(t) == 50)
    assert report.fused == 1 and kept == {False: 50 * 4, True: 50 * 4}  # h, and not x
    assert layer.lora_A["default"].weight.grad is None
    before = results(model)["loss"]
    optimizer.step()
    assert results(model)["loss"] != before


# -- what is large or shared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_head_with_a_large_vocabulary(name):
    model = adapted(name, lora_config(target_modules=["lm_head"]), {"vocab_size": 5000, "tie_word_embeddings": True})
    inner = model.base_model.model
    assert inner.lm_head.base_layer.weight is inner.get_input_embeddings().weight
    report = assert_fused_like_peft(model)
    assert report.fused == 1
