"""HF PEFT's prefixes read and written, and positions that start behind the prefix."""

import copy
import json

import pytest
import torch
import transformers as hf
from models import LAYERS, base_model, inputs
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft import PrefixTuningConfig as PeftsConfig
from prefixes import with_values
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import peft_kernels
from peft_kernels import BottleneckConfig, PrefixTuningConfig
from peft_kernels.integrations.prefix_positions import Shifts

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
}  # fmt: skip
RIGHT = {  # where PEFT is right: decoders whose windows, if they have any, hold the prefix and the tokens
    "llama": {}, "llama-yarn": YARN, "llama-llama3": LLAMA3, "qwen2": {}, "qwen3": {}, "gemma": {},
    "mistral": {"sliding_window": 32}, "gemma3": {"sliding_window": 32}, "gpt2": {}, "opt": {},
}  # fmt: skip


def base(name: str) -> PreTrainedModel:
    return base_model(name.partition("-")[0], **RIGHT[name]).eval()


def pefts(name: str, **changes) -> PeftModel:
    config = PeftsConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, **changes)
    model = get_peft_model(base(name), config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", RIGHT)
@torch.no_grad()
def test_pefts_prefix_gives_pefts_logits(name, projection, tmp_path):
    changes = {"prefix_projection": True, "encoder_hidden_size": 8} if projection else {}
    theirs, ids = pefts(name, **changes), inputs(2, 9)["input_ids"]
    theirs.save_pretrained(tmp_path)
    ours = base(name)
    peft_kernels.load(ours, tmp_path)
    everything = torch.ones_like(ids)
    found = ours(input_ids=ids, attention_mask=everything).logits
    torch.testing.assert_close(found, theirs(input_ids=ids, attention_mask=everything).logits)
    generated = theirs.generate(input_ids=ids, attention_mask=everything, **GREEDY)
    assert torch.equal(ours.generate(input_ids=ids, attention_mask=everything, **GREEDY), generated)


@pytest.mark.parametrize("name", RIGHT)
@torch.no_grad()
def test_our_prefix_gives_our_logits_in_peft(name, tmp_path):
    ours, ids = base(name), inputs(2, 9)["input_ids"]
    learned = name in ("gpt2", "opt")
    peft_kernels.attach(ours, PrefixTuningConfig(num_virtual_tokens=4, shift_positions=learned), "task")
    with_values(ours)
    peft_kernels.export_prefix(ours, tmp_path, "task")
    theirs = PeftModel.from_pretrained(base(name), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)
    again = base(name)
    peft_kernels.load(again, tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
@torch.no_grad()
def test_the_head_beside_a_prefix_goes_along_both_ways(kind, tmp_path):
    torch.manual_seed(0)
    ids, config = inputs(2, 9)["input_ids"], hf.LlamaConfig(**SMALL, pad_token_id=0, num_labels=3)
    ours = getattr(hf, kind)(config).eval()
    whole, again = copy.deepcopy(ours), copy.deepcopy(ours)
    task = "SEQ_CLS" if "Sequence" in kind else "TOKEN_CLS"
    theirs = get_peft_model(copy.deepcopy(ours), PeftsConfig(task_type=task, num_virtual_tokens=4)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    peft_kernels.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(input_ids=ids).logits, wanted)
    peft_kernels.export_prefix(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == task
    loaded = PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    assert type(loaded) is type(theirs)
    torch.testing.assert_close(loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, wanted)
    peft_kernels.detach(ours)
    assert torch.equal(ours(input_ids=ids).logits, whole(input_ids=ids).logits)
    with pytest.raises(ValueError, match="load: modules_to_save: a LlamaForCausalLM has no parameters in a mod"):
        peft_kernels.load(hf.LlamaForCausalLM(config), tmp_path / "theirs")


@pytest.mark.parametrize("kind", [hf.LlamaModel, hf.LlamaForQuestionAnswering, hf.LlamaForSequenceClassification])
@torch.no_grad()
def test_a_head_that_was_not_trained_is_exported_as_it_is(kind, tmp_path):
    torch.manual_seed(0)
    ours, ids = kind(hf.LlamaConfig(**SMALL, pad_token_id=0)).eval(), inputs(2, 9)["input_ids"]
    theirs = kind(ours.config).eval()  # with a head of its own
    theirs.base_model.load_state_dict(ours.base_model.state_dict())
    peft_kernels.attach(ours, PrefixTuningConfig(num_virtual_tokens=3), "task")
    with_values(ours)
    wanted = ours(input_ids=ids)[0]
    if kind is hf.LlamaForSequenceClassification:
        peft_kernels.attach(ours, PrefixTuningConfig(num_virtual_tokens=3, modules_to_save=["score"]), "other")
        ours.score.weight.add_(1)  # the other's
    peft_kernels.export_prefix(ours, tmp_path, "task")
    found = PeftModel.from_pretrained(theirs, tmp_path).eval()(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bart"])
@torch.no_grad()
def test_learned_positions_start_behind_the_prefix_and_again_at_zero(name):
    model, batch = base_model(name).eval(), inputs()
    before = model(**batch).logits
    config = PrefixTuningConfig(num_virtual_tokens=3, composition="add", init="zero", shift_positions=True)
    peft_kernels.attach(model, config)
    moved = copy.deepcopy(model)
    peft_kernels.detach(moved)
    assert torch.equal(moved(**batch).logits, before) and not any(isinstance(m, Shifts) for m in moved.modules())
    table = next(m for n, m in moved.named_modules() if n.endswith(("wpe", "decoder.embed_positions")))
    table.weight.copy_(table.weight.roll(-3, 0))
    torch.testing.assert_close(model(**batch).logits, moved(**batch).logits)
    peft_kernels.set_active(model, [])
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@torch.no_grad()
def test_each_row_has_the_positions_of_its_prefix(name):
    model, batch = base_model(name).eval(), inputs(3)
    for prefix, P in (("long", 5), ("short", 2)):
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=P, shift_positions=True), prefix)
    with_values(model)
    with peft_kernels.adapter_ids([1, -1, 0], ["long", "short"]):
        together = model(**batch).logits
        generated = model.generate(input_ids=batch["input_ids"], **GREEDY)
    for row, prefix in enumerate(("short", None, "long")):
        peft_kernels.set_active(model, [prefix] if prefix else [])
        torch.testing.assert_close(together[row], model(**batch).logits[row])
        assert torch.equal(generated[row], model.generate(input_ids=batch["input_ids"], **GREEDY)[row])


@pytest.mark.parametrize("order", ["attach pool detach unpatch", "attach pool unpatch detach"])
@torch.no_grad()
def test_shifted_positions_beside_a_pool(order):
    model, batch = base_model("gpt2").eval(), inputs()
    before, classes = model(**batch).logits, [type(module) for module in model.modules()]
    steps = {
        "attach": lambda: peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, shift_positions=True)),
        "pool": lambda: peft_kernels.attach_pool(model, adapters=2),
        "detach": lambda: peft_kernels.detach(model),
        "unpatch": lambda: peft_kernels.unpatch(model),
    }
    for step in order.split():
        made = steps[step]()
        if step == "pool":
            assert made.left_alone["transformer.wpe"] == "a prefix shifts its positions"
        model(**batch)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**batch).logits, before)


def test_positions_that_a_pool_has_cannot_be_shifted():
    model = base_model("gpt2").eval()
    peft_kernels.attach_pool(model, adapters=2)
    with pytest.raises(ValueError, match="attach: shift_positions: the model's learned positions have a place in"):
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, shift_positions=True))
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3))


@torch.no_grad()
def test_shifted_positions_inside_of_pefts_lora():
    model, batch = base_model("gpt2").eval(), inputs()
    before = model(**batch).logits
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, shift_positions=True))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["wpe"])).eval()  # which adds zero
    with_prefix = wrapped(**batch).logits
    peft_kernels.set_active(wrapped, [])
    assert torch.equal(wrapped(**batch).logits, before)
    peft_kernels.set_active(wrapped, "default")
    assert torch.equal(wrapped(**batch).logits, with_prefix)
    peft_kernels.detach(wrapped)
    assert torch.equal(wrapped(**batch).logits, before)
    assert not any(isinstance(module, Shifts) for module in wrapped.modules())


def test_rows_of_one_position_table_need_one_shift():
    model, batch = base_model("bart").eval(), inputs()
    for prefix, P in (("long", 5), ("short", 2)):
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=P, shift_positions=True), prefix)
    with peft_kernels.adapter_ids([0, 0], ["long"]):
        model(**batch)
    shifts = pytest.raises(ValueError, match="all rows the same positions, and these prefixes shift them by 2, 5; give")
    with shifts, peft_kernels.adapter_ids([0, 1], ["long", "short"]):
        model(**batch)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_text_then_tokens_is_the_whole_text(name):
    model, ids = base_model(name).eval(), inputs(1, 9)["input_ids"]
    whole = model.generate(input_ids=ids, **GREEDY)[:, 4:]
    config = PrefixTuningConfig(num_virtual_tokens=4, init="text", text=ids[0, :4].tolist(), shift_positions=True)
    peft_kernels.attach(model, config)
    assert torch.equal(model.generate(input_ids=ids[:, 4:], **GREEDY), whole)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
PARTLY = {  # rotary embeddings of a part of each head, or of some layers
    "phi": (hf.PhiForCausalLM, hf.PhiConfig(**SMALL, partial_rotary_factor=0.5)),
    "glm": (hf.GlmForCausalLM, hf.GlmConfig(**SMALL, head_dim=16, pad_token_id=0)),
    "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0], pad_token_id=0)),
    "cohere2": (hf.Cohere2ForCausalLM, hf.Cohere2Config(**SMALL, **WINDOWS)),
    "exaone4": (hf.Exaone4ForCausalLM, hf.Exaone4Config(**SMALL, **WINDOWS)),
}


@pytest.mark.parametrize("name", PARTLY)
@torch.no_grad()
def test_keys_are_turned_where_the_model_turns_them(name, tmp_path):
    torch.manual_seed(0)
    model_class, config = PARTLY[name]
    ours, ids = model_class(config).eval(), inputs(2, 9)["input_ids"]
    whole = copy.deepcopy(ours)
    theirs = get_peft_model(whole, PeftsConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    peft_kernels.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    peft_kernels.export_prefix(ours, tmp_path / "ours")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")]
    torch.testing.assert_close(*(tensors["prompt_embeddings"] for tensors in files))


def test_a_file_in_16_bits_is_not_rounded_again(tmp_path):
    theirs = pefts("llama")
    theirs.save_pretrained(tmp_path)
    file, found = tmp_path / "adapter_model.safetensors", {}
    for dtype in (torch.bfloat16, torch.float32):
        rounded = theirs.get_prompt_embedding_to_save("default").detach().bfloat16().to(dtype)
        save_file({"prompt_embeddings": rounded}, file)
        model = base("llama")
        peft_kernels.load(model, tmp_path)
        found[dtype] = model.state_dict()
    for key, tensor in found[torch.float32].items():
        assert torch.equal(found[torch.bfloat16][key], tensor)
    save_file({"prompt_embeddings": rounded.int()}, file)
    with pytest.raises(ValueError, match=r"must be of a floating-point dtype, got torch\.int32"):
        peft_kernels.load(base("llama"), tmp_path)
    save_file({"prompt_embeddings": rounded}, file)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn are on meta; move them to a device first"):
        peft_kernels.load(base("llama").to("meta"), tmp_path)


def test_what_peft_has_not_is_refused(tmp_path):
    model = base_model("gpt2")
    peft_kernels.attach(model, BottleneckConfig(r=4), "ffn")
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3), "still")
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, composition="add"), "added")
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, layers=[0]), "some")
    for name, text in {
        "ffn": "'ffn' is no prefix",
        "still": "'still': PEFT's positions start behind the prefix",
        "added": "'added': PEFT has prefixes in all layers, that share the softmax, without gates",
        "some": "'some': PEFT has prefixes in all layers",
    }.items():
        with pytest.raises(ValueError, match=f"export_prefix: {text}"):
            peft_kernels.export_prefix(model, tmp_path, name)
    bart = base_model("bart")
    peft_kernels.attach(bart, PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="decoder-only models, which a BartForConditionalGeneration is not; in an enc"):
        peft_kernels.export_prefix(bart, tmp_path)
    dynamic = base_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    peft_kernels.attach(dynamic, PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="rotary embeddings of type 'dynamic' depend on the length"):
        peft_kernels.export_prefix(dynamic, tmp_path)


def test_a_file_of_pefts_that_does_not_fit_is_refused(tmp_path):
    pefts("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="decoder-only models, which a T5"):
        peft_kernels.load(base_model("t5"), tmp_path)
    with pytest.raises(
        ValueError, match=rf"prompt_embeddings of .* must have shape \[4, {LAYERS * 2 * 8}\].*got \[4, 64"
    ):
        peft_kernels.load(base_model("llama", num_key_value_heads=1), tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="got none"):
        peft_kernels.load(base_model("llama"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    assert [*load_file(tmp_path / "adapter_model.safetensors")] == ["other"]
