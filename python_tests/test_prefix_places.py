"""Where prefixes go, beside what, and that an attach or a load that fails leaves the model as it was."""

import pytest
import torch
import transformers as hf
from models import _ENCODER, base_model, inputs
from prefixes import losses, prefixed, several
from torch import nn
from torch.distributed.tensor import DeviceMesh, distribute_tensor

import peft_kernels
from peft_kernels import BitFitConfig, BottleneckConfig, MAMConfig, PrefixTuningConfig, PTuningV2Config
from peft_kernels.integrations.own_parameters import NOTE
from peft_kernels.integrations.prefixes import prefix_sites, prefixes_in
from peft_kernels.modules import PrefixEncoder

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


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_positions_that_cannot_start_elsewhere(name):
    with pytest.raises(ValueError, match=r"shift_positions: a .* has no decoder with rotary or learned positions"):
        peft_kernels.attach(base_model(name), PrefixTuningConfig(num_virtual_tokens=3, shift_positions=True))


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


TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 64}
WITHOUT_BLOCKS = {
    "distilbert": (hf.DistilBertModel, hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=32)),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**TINY, num_hidden_layers=2)),
}


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_layers_are_skipped_where_no_block_is_known(name):
    model_class, config = WITHOUT_BLOCKS[name]
    model = model_class(config)
    peft_kernels.attach(model, SHORT)
    peft_kernels.set_active(model, "default", skip_layers=[0])
    assert [prefixes.active_name for _, prefixes in prefixes_in(model)] == [None, "default"]
    with pytest.raises(ValueError, match=r"skip_layers must lie in \[0, 2\)"):
        peft_kernels.set_active(model, "default", skip_layers=[2])


def test_another_model_of_the_same_config_computes_what_it_did():
    model = base_model("gemma2", attn_implementation="eager").eval()
    other, batch = type(model)(model.config).eval(), inputs()
    before = other(**batch).logits
    peft_kernels.attach(model, SHORT)
    torch.testing.assert_close(other(**batch).logits, before)


def test_an_mlp_under_reentrant_checkpoints():
    model = prefixed("llama", PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)).train()
    model.enable_input_require_grads()
    plain = losses(model, inputs())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    again = losses(model, inputs())
    assert plain.keys() == again.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(again[key], tensor)


def test_gates_in_another_type_than_the_queries():
    config = PrefixTuningConfig(num_virtual_tokens=3, composition="add", gate=True)
    model = prefixed("llama", config).half()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**inputs())
        with peft_kernels.adapter_ids([0, -1], ["default"]):
            model(**inputs())


def test_a_mam_adapter_with_deep_prompts_is_read_as_that():
    config = MAMConfig(PTuningV2Config(num_virtual_tokens=3), BottleneckConfig.scaled_parallel(r=4))
    assert MAMConfig.from_dict(config.to_dict()) == config


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


def test_an_mlp_and_fsdp(one_process):
    encoder = PrefixEncoder(3, 8, 4)
    encoder.embedding = nn.Parameter(distribute_tensor(encoder.embedding.detach(), one_process))
    with pytest.raises(RuntimeError, match="FSDP has sharded the MLP of prefix_projection with one layer"):
        encoder()
    model, batch = prefixed("llama", PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)), inputs()
    before = model(**batch).logits
    torch.distributed.fsdp.fully_shard(model)
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(ValueError, match="detach: the FSDPLlamaForCausalLM has a class that was made after attach"):
        peft_kernels.detach(model)
    assert torch.equal(model(**batch).logits, before)
