"""Prefix tuning as a method: the config, starts, the MLP, several prefixes on a model, LoRA beside them, files."""

import copy
import functools
import json

import pytest
import torch
import transformers as hf
from models import HIDDEN, LAYERS, base_model, inputs, lora_config
from peft import get_peft_model
from prefixes import losses, of_tokens, padded, prefixed, several, with_values
from safetensors.torch import load_file
from torch import nn

import peft_kernels
from peft_kernels import BottleneckConfig, PrefixTuningConfig
from peft_kernels.integrations.prefixes import UNSUPPORTED, prefixes_in
from peft_kernels.modules import Prefix, PrefixEncoder

BAD_FIELDS = {
    "length": ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer from 1 to 8192, got 0"),
    "length-bool": ({"num_virtual_tokens": True}, "num_virtual_tokens must be an integer"),
    "projection": ({"prefix_projection": 1}, "prefix_projection must be True or False, got 1"),
    "hidden": ({"encoder_hidden_size": 0}, "encoder_hidden_size must be an integer of 1 or more, or None, got 0"),
    "slots": ({"slots": "cross"}, "slots must be a list of encoder, decoder, cross, or None for all, got 'cross'"),
    "slot": ({"slots": ["self"]}, "slots must be a list of encoder, decoder, cross"),
    "layers": ({"layers": 3}, "layers must be a list or range of layer indices from 0, or None for all, got 3"),
    "layers-negative": ({"layers": [-1]}, "layers must be a list or range"),
    "init": ({"init": "ones"}, "init must be one of random, zero, text, got 'ones'"),
    "zero": ({"init": "zero"}, "composition must be add, relu or linear where init is 'zero', .*shares the softmax"),
    "no-text": (
        {"init": "text"},
        "text must be the ids of num_virtual_tokens=20 tokens where init is 'text', got None",
    ),
    "no-list": ({"init": "text", "text": 5}, "text must be the ids of num_virtual_tokens=20 tokens .*, got 5"),
    "stray-text": ({"text": [1]}, "text must be None where init is not 'text'"),
    "dropout": ({"prefix_dropout": 1.0}, r"prefix_dropout must be a probability in \[0, 1\), got 1.0"),
    "composition": ({"composition": "cat"}, "composition must be one of merge, add, relu, linear, got 'cat'"),
}


@pytest.mark.parametrize(("fields", "text"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_wrong_field_is_refused_in_words(fields, text):
    with pytest.raises(ValueError, match=f"PrefixTuningConfig: {text}"):
        PrefixTuningConfig(**fields)


def test_a_config_is_written_and_read_baked():
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, layers=range(1, 3), slots=["cross"])
    read = PrefixTuningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config.baked() and not read.prefix_projection and read.layers == (1, 2)
    with pytest.raises(ValueError, match="there is no field 'P'; the fields are num_virtual_tokens"):
        PrefixTuningConfig.from_dict({"P": 8})


# -- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("composition", ["add", "relu", "linear"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5"])
def test_zero_is_the_model_without_a_prefix_and_learns(name, composition, gate):
    config = PrefixTuningConfig(num_virtual_tokens=3, init="zero", composition=composition, gate=gate)
    model, batch = base_model(name).eval(), padded("left")
    before = of_tokens(model, model(**batch).logits, batch)
    peft_kernels.attach(model, config)
    torch.testing.assert_close(of_tokens(model, model(**batch).logits, batch), before)
    nothing = copy.deepcopy(model)
    for _, prefixes in prefixes_in(nothing):
        prefixes.active_name, prefixes.base_attention = None, "eager"  # through the op, without a prefix
    assert torch.equal(model(**batch).logits, nothing(**batch).logits)
    found = losses(model, batch)
    assert all(any(g.any() for k, g in found.items() if f"{owner}.prefixes." in k) for owner, _ in prefixes_in(model))


def test_a_projection_starts_at_zero_too():
    encoder = PrefixEncoder(3, 8, 5)
    keys, values = Prefix(3, 2, 8, 4, composition="add", init="zero", encoder=encoder)()
    assert keys.any() and not values.any() and keys.shape == (2, 3, 8)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
@torch.no_grad()
def test_text_in_front_of_the_tokens_is_the_text(name):
    model, ids = base_model(name).eval(), inputs(1, 9)["input_ids"]
    whole = model(input_ids=ids).logits[:, 4:]
    config = PrefixTuningConfig(num_virtual_tokens=4, init="text", text=ids[0, :4].tolist(), shift_positions=True)
    peft_kernels.attach(model, config)
    torch.testing.assert_close(model(input_ids=ids[:, 4:]).logits, whole)


def test_text_leaves_the_model_as_it_was_and_other_prefixes_out():
    model = several().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config = PrefixTuningConfig(num_virtual_tokens=2, init="text", text=[5, 6])
    found = []
    for active in ("long", []):
        peft_kernels.set_active(model, active)
        peft_kernels.attach(model, config, "text")
        found.append([prefixes["text"].weight.clone() for _, prefixes in prefixes_in(model)])
        peft_kernels.detach(model, "text")
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match=r"text must be ids in \[0, \d+\), the tokens of this model, got \[5, 9999\]"):
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=2, init="text", text=[5, 9999]))


def test_text_needs_a_decoder_and_room():
    with pytest.raises(ValueError, match="init='text' is for decoder-only models, which a Bert"):
        peft_kernels.attach(base_model("bert"), PrefixTuningConfig(num_virtual_tokens=1, init="text", text=[3]))
    config = PrefixTuningConfig(num_virtual_tokens=6, init="text", text=[3] * 6)
    model = base_model("mistral")
    with pytest.raises(ValueError, match=r"init='text': model.layers.0.self_attn keeps 3 keys of the text's 6"):
        peft_kernels.attach(model, config)
    assert model.config._attn_implementation == "sdpa" and not prefixes_in(model)


# -- the MLP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_mlp_runs_once_in_a_forward_and_is_baked_on_save(name, tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6)
    model, batch = prefixed(name, config), padded("left")
    encoders = [m for m in model.modules() if isinstance(m, PrefixEncoder)]
    assert len(encoders) == (3 if name == "t5" else 1)
    counts = dict.fromkeys(encoders, 0)

    def count(encoder, *_):
        counts[encoder] += 1

    for encoder in encoders:
        encoder.register_forward_hook(count)
    found = losses(model, batch)
    assert set(counts.values()) == {1}
    assert all(found[key].any() for key, _ in model.named_parameters() if ".prefixes." in key)
    peft_kernels.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(t.shape)[:2] for t in tensors.values()} == {(3, 2)} and all(".weight" in key for key in tensors)
    again = base_model(name).eval()
    peft_kernels.load(again, tmp_path, "task")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_prefix_dropout_is_for_training():
    model, batch = prefixed(config=PrefixTuningConfig(num_virtual_tokens=3, prefix_dropout=0.5)), inputs()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)


# -- on a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "bart", "gpt2"])
def test_save_and_load(name, tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=3, composition="add", gate=True)
    model, batch = prefixed(name, config), padded("right")
    peft_kernels.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX"
    again = base_model(name).eval()
    places = peft_kernels.load(again, tmp_path, "task", trainable=True)
    assert len(places) == len(prefixes_in(model)) and peft_kernels.active_adapters(again) == ("task",)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert {k for k, p in again.named_parameters() if p.requires_grad} == {
        k for k in again.state_dict() if ".task." in k
    }
    with pytest.raises(ValueError, match=r"prefixes.weight must have shape \[3, 2, 1, 8\] in this model, got"):
        peft_kernels.load(base_model("llama", num_key_value_heads=1), _llama_file(tmp_path))


def _llama_file(folder):
    peft_kernels.save_pretrained(prefixed(), folder / "llama")
    return folder / "llama"


def test_the_number_of_parameters(capsys):
    model = base_model("llama")
    total = sum(p.numel() for p in model.parameters())
    config = PrefixTuningConfig(num_virtual_tokens=5, gate=True)
    peft_kernels.attach(model, config)
    trained = LAYERS * (2 * 5 * 2 * 8 + 4)
    assert LAYERS * config.parameters(2, 8, 4) == trained and HIDDEN == 4 * 8
    peft_kernels.print_trainable_parameters(model)
    assert f"trainable params: {trained:,d} || all params: {total + trained:,d}" in capsys.readouterr().out


def test_one_prefix_is_active_and_may_skip_layers():
    model, batch = several(), inputs()
    with pytest.raises(ValueError, match="a model attends to one prefix, got long and short; adapter_ids gives each"):
        peft_kernels.set_active(model, ["long", "short"])
    peft_kernels.set_active(model, "short", skip_layers=[0])
    assert [prefixes.active_name for _, prefixes in prefixes_in(model)] == [None, "short"]
    partly = model(**batch).logits
    peft_kernels.set_active(model, "short")
    assert not torch.equal(model(**batch).logits, partly)
    assert peft_kernels.active_adapters(model) == ("short",)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.prefixes.short.weight" for i in range(LAYERS)}
    peft_kernels.set_active(model, [])
    assert torch.equal(model(**batch).logits, base_model("llama").eval()(**batch).logits)


def test_rows_that_cannot_be():
    model = several()
    refused = functools.partial(pytest.raises, ValueError)
    with (
        refused(match="prefixes are for whole sequences; give one id"),
        peft_kernels.adapter_ids([[0] * 7] * 2, ["long"]),
    ):
        model(**inputs())
    with refused(match="no layer that ran has an adapter 'other'"), peft_kernels.adapter_ids([0, 1], ["long", "other"]):
        model(**inputs())
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=2, composition="add"), "added")
    with (
        refused(match="long, added must have the same composition"),
        peft_kernels.adapter_ids([0, 1], ["long", "added"]),
    ):
        model(**inputs())


def test_gates_of_rows():
    model = base_model("llama").eval()
    for name, gate in (("gated", True), ("plain", False)):
        config = PrefixTuningConfig(num_virtual_tokens=3, composition="add", gate=gate)
        peft_kernels.attach(model, config, name)
    with_values(model)
    with torch.no_grad(), peft_kernels.adapter_ids([0, 1], ["gated", "plain"]):
        together = model(**inputs()).logits
    for row, name in enumerate(("gated", "plain")):
        peft_kernels.set_active(model, name)
        torch.testing.assert_close(together[row], model(**inputs()).logits[row])


def test_lora_and_bottlenecks_beside_it_patched_and_not():
    model = get_peft_model(base_model("llama").eval(), lora_config()).eval()
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True), "prefix")
    peft_kernels.attach(model, BottleneckConfig.scaled_parallel(r=4), "ffn")
    peft_kernels.set_active(model, ["prefix", "ffn"])
    with_values(model)
    batch = inputs()
    plain = losses_of(model, batch)
    kinds = [type(module) for module in model.modules()]
    peft_kernels.patch(model)
    patched = losses_of(model, batch)
    assert plain.keys() == patched.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(patched[key], tensor)
    peft_kernels.unpatch(model)
    assert [type(module) for module in model.modules()] == kinds
    peft_kernels.detach(model, "prefix")
    peft_kernels.detach(model, "ffn")
    fresh = get_peft_model(base_model("llama").eval(), lora_config())
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_with_lora_of_their_own_have_the_active_prefix(name):
    model, batch = get_peft_model(base_model(name).eval(), lora_config()).eval(), inputs(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    peft_kernels.patch(model)
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, shift_positions=True), "prefix")
    with_values(model)
    with torch.no_grad():
        alone = model(**batch).logits[0]
        with model.disable_adapter():
            without = model(**batch).logits[1]
        with peft_kernels.adapter_ids([0, -1], ["default"]):
            together = model(**batch).logits
    torch.testing.assert_close(together, torch.stack([alone, without]))


def losses_of(model: nn.Module, batch) -> dict:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_t5s_bias_is_frozen_or_refused():
    model = base_model("t5")
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3), freeze=False)
    with pytest.raises(TypeError, match="attn_mask has no gradient here"):
        model(**inputs())


OTHERS = {
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4)),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig(n_layer=1, hidden_size=32, n_head=4)),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig(n_layer=1, n_embd=32, n_head=4, rotary_dim=4)),
    "mpt": (hf.MptForCausalLM, hf.MptConfig(n_layers=1, d_model=32, n_heads=4, vocab_size=64)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_the_attention_interface_are_refused_by_name(name):
    model_class, config = OTHERS[name]
    assert name in UNSUPPORTED
    with pytest.raises(ValueError, match=f"{name} computes its attention itself and does not ask .* bloom, codegen"):
        peft_kernels.attach(model_class(config), PrefixTuningConfig())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="slots: a LlamaForCausalLM has no cross attention; it has decoder"):
        peft_kernels.attach(base_model("llama"), PrefixTuningConfig(slots=["cross"]))
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 2\), the layers of this model, got 2"):
        peft_kernels.attach(base_model("llama"), PrefixTuningConfig(layers=[2]))
    with pytest.raises(ValueError, match="there is no cross attention in the layers"):
        peft_kernels.attach(base_model("bart"), PrefixTuningConfig(slots=["cross"], layers=[0]))
    with pytest.raises(ValueError, match="has heads of 4; they must be a multiple of 8"):
        peft_kernels.attach(base_model("llama", head_dim=4), PrefixTuningConfig())
