"""Where prefixes go, beside what, and that an attach or a load that fails leaves the model as it was."""

import pytest
import torch
import transformers as hf
from models import _ENCODER, base_model
from prefixes import several
from torch import nn

import peft_kernels
from peft_kernels import BitFitConfig, BottleneckConfig, MAMConfig, PrefixTuningConfig
from peft_kernels.integrations.own_parameters import NOTE
from peft_kernels.integrations.prefixes import prefix_sites, prefixes_in

SHORT = PrefixTuningConfig(num_virtual_tokens=3)


def test_a_model_inside_of_another_module():
    model = nn.Sequential(base_model("llama"))
    peft_kernels.attach(model, BottleneckConfig.scaled_parallel(r=4))
    peft_kernels.set_active(model, "default", skip_layers=[0])
    peft_kernels.detach(model)
    with pytest.raises(ValueError, match="prefixes are for transformers' models, which a Sequential is not"):
        peft_kernels.attach(model, SHORT)


def test_a_bert_as_decoder_is_a_decoder():
    parts = (
        hf.BertModel(hf.BertConfig(**_ENCODER)),
        hf.BertConfig(**_ENCODER, is_decoder=True, add_cross_attention=True),
    )
    model = hf.EncoderDecoderModel(encoder=parts[0], decoder=hf.BertLMHeadModel(parts[1]))
    slots = [site.slot for site in prefix_sites(model)]
    assert slots == ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]


def test_attention_sinks_are_refused():
    config = hf.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="self_attn has attention sinks"):
        peft_kernels.attach(hf.GptOssForCausalLM(config), SHORT)


def test_the_biases_of_an_mlp_are_none_of_the_models():
    model = base_model("bert")
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True), "prefix")
    assert not any("prefixes" in name for name in peft_kernels.attach(model, BitFitConfig(), "biases"))


def test_a_load_that_fails_half_way_changes_nothing(tmp_path):
    model, config = base_model("llama"), MAMConfig(SHORT, BottleneckConfig.scaled_parallel(r=4))
    peft_kernels.attach(model, config)
    peft_kernels.save_pretrained(model, tmp_path)
    model = base_model("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp are not there"):
        peft_kernels.load(model, tmp_path)
    assert model.config._attn_implementation == "sdpa" and not prefixes_in(model) and NOTE not in model.__dict__


@pytest.mark.parametrize("projection", [False, True])
def test_what_a_skipped_layer_has_is_not_trained(projection):
    model = several() if not projection else base_model("llama")
    if projection:
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True), "short")
    peft_kernels.set_active(model, "short", skip_layers=[0])
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {"layers.0." in key for key in trained} == {projection, False}, "the MLP lies in the first layer"
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
