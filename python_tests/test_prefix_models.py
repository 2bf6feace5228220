"""Prefixes in every type of model, against attention that copies them in front of the keys of each row."""

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
import transformers as hf
from models import GENERATING, LAYERS, MODELS, assert_as_close_as_peft, base_model, in_double, inputs
from prefixes import PADDINGS, ROWS, losses, padded, prefixed, several, slow
from transformers.generation.continuous_batching import continuous_api

import peft_kernels
from peft_kernels import PrefixTuningConfig
from peft_kernels.integrations.rows import RowAdapters, entered

DECODERS = [name for name in GENERATING if name not in ("bart", "t5")]
LONG_SHORT = ["long", "short"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def assert_like_slow(model, batch, names=()):
    """One step of a model, whose rows have these prefixes, against the slow attention."""
    if names:
        ids = [-1 if n is None else sorted(set(names) - {None}).index(n) for n in names]
        with peft_kernels.adapter_ids(ids, sorted(set(names) - {None})):
            found = losses(model, batch)
    else:
        found = losses(model, batch)
    ROWS[:] = names
    try:
        plain = slow(model)
        results = losses(plain, batch), losses(in_double(plain), batch)
    finally:
        ROWS.clear()
    assert_as_close_as_peft(found, *results)
    assert any(key.endswith(".weight") and grad.any() for key, grad in found.items() if ".prefixes." in key)
    return found


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_concatenation(name, padding):
    assert_like_slow(prefixed(name), padded(padding))


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("composition", ["add", "relu", "linear"])
@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_a_step_of_each_composition(name, composition, gate):
    """Capped logits, windows in some layers; a bias of positions, all three slots."""
    config = PrefixTuningConfig(num_virtual_tokens=3, composition=composition, gate=gate)
    assert_like_slow(prefixed(name, config), padded("left"))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_query_sees_all_of_the_prefix(name, padding):
    """Of the first token too, under padding too, beyond the window too: the last position of the prefix and its first
    change every logit."""
    batch, model = padded(padding), prefixed(name)
    seen = batch["attention_mask"] > 0 if "attention_mask" in batch else torch.ones_like(batch["input_ids"]) > 0
    seen = torch.ones_like(seen) if model.config.is_encoder_decoder else seen
    with torch.no_grad():
        before = model(**batch).logits
        for position in (0, -1):
            for key, parameter in model.named_parameters():
                if ".prefixes." in key:
                    parameter[position] += 1
            after = model(**batch).logits
            assert (after != before)[seen].any(-1).all()
            before = after


@pytest.mark.parametrize("name", MODELS)
def test_detach_gives_the_model_back(name):
    model, batch = base_model(name).eval(), padded("left")
    before, implementation, keys = model(**batch).logits, model.config._attn_implementation, [*model.state_dict()]
    kinds = [type(module) for module in model.modules()]
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True), "one")
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=4), "two")
    assert model.config._attn_implementation == "peft_kernels"
    assert not torch.equal(model(**batch).logits, before)
    peft_kernels.detach(model, "two")
    peft_kernels.detach(model, "one")
    assert torch.equal(model(**batch).logits, before) and [*model.state_dict()] == keys
    assert model.config._attn_implementation == implementation
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_rows_with_prefixes_of_their_own(name):
    model = several(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(".prefixes." in key)
    assert_like_slow(model, padded("left"), ["short", None, "long"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_row_is_as_with_its_prefix_alone(name):
    model, batch = several(name), padded("none")
    names = ["short", None, "long"]
    with peft_kernels.adapter_ids([1, -1, 0], LONG_SHORT):
        together = model(**batch).logits
    for row, prefix in enumerate(names):
        peft_kernels.set_active(model, [prefix] if prefix else [])
        alone = model(**batch).logits[row]
        torch.testing.assert_close(together[row], alone)


def greedy(model, ids, steps):
    """Token by token, without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_generation_is_greedy_by_hand(name, cache):
    model, ids = prefixed(name), inputs(3, 5)["input_ids"]
    kind = {"use_cache": False} if cache == "none" else {"cache_implementation": cache} if cache == "static" else {}
    if cache == "static":
        kind["disable_compile"] = True
    found = model.generate(input_ids=ids, **GREEDY, **kind)
    assert torch.equal(found, greedy(slow(model), ids, 6))


@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_generation_under_padding_and_with_beams(name):
    model, batch = prefixed(name), padded("left")
    batch.pop("labels")
    for way in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        assert torch.equal(model.generate(**batch, **GREEDY, **way), slow(model).generate(**batch, **GREEDY, **way))


@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_generation_of_rows_with_prefixes_of_their_own(name):
    model, batch = several(name), padded("left")
    batch.pop("labels")
    with peft_kernels.adapter_ids([1, -1, 0], LONG_SHORT):
        together = model.generate(**batch, **GREEDY)
    for row, prefix in enumerate(("short", None, "long")):
        peft_kernels.set_active(model, [prefix] if prefix else [])
        assert torch.equal(together[row], model.generate(**batch, **GREEDY)[row])


@pytest.mark.parametrize("kind", ["baked", "projection", "rows"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "t5"])
def test_gradient_checkpointing_changes_nothing(name, kind):
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=kind == "projection")
    model = several(name) if kind == "rows" else prefixed(name, config)
    batch = padded("left")

    def step():
        if kind != "rows":
            return losses(model, batch)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(".prefixes." in key)
        model.zero_grad()
        with peft_kernels.adapter_ids([1, -1, 0], LONG_SHORT):
            loss = model(**batch).loss
        loss.backward()  # the recompute runs outside of the block
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = step()
    model.gradient_checkpointing_enable()
    again = step()
    assert plain.keys() == again.keys() and any(".prefixes." in key for key in plain)
    for key, tensor in plain.items():
        assert torch.equal(tensor, again[key]), key


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "gpt2"])
def test_compiled_without_a_break(name):
    model = prefixed(name)
    with torch.no_grad():
        ids = inputs()["input_ids"]
        plain = model(input_ids=ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")(input_ids=ids).logits
    torch.testing.assert_close(compiled, plain)


def test_packed_sequences_do_not_see_each_other():
    model = prefixed()
    ids = inputs(1, 7)["input_ids"]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False).logits
        parts = [model(input_ids=part).logits for part in (ids[:, :3], ids[:, 3:])]
    torch.testing.assert_close(packed, torch.cat(parts, 1))


def test_layers_and_slots():
    model = base_model("bart").eval()
    names = peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, slots=["cross", "encoder"]))
    assert names == ("model.encoder.layers.0.self_attn", "model.decoder.layers.0.encoder_attn")
    assert_like_slow(model, padded("right"))
    model = base_model("llama").eval()
    assert LAYERS == 2 and peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3, layers=[1])) == (
        "model.layers.1.self_attn",
    )
    assert_like_slow(model, padded("right"))


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
@torch.no_grad()
def test_beams_have_the_prefix_of_their_row(name):
    model, batch = several(name), padded("left")
    batch.pop("labels")
    rows = RowAdapters("adapter_ids", torch.tensor([1, -1, 0], dtype=torch.int32), tuple(LONG_SHORT), expand=3)
    with entered(rows):
        together = model.generate(**batch, **GREEDY, num_beams=3)
    for row, prefix in enumerate(("short", None, "long")):
        peft_kernels.set_active(model, [prefix] if prefix else [])
        assert torch.equal(together[row], model.generate(**batch, **GREEDY, num_beams=3)[row])


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_assisted_and_chunked_decoding_are_greedy(name):
    model, ids = prefixed(name), inputs(1, 5)["input_ids"]
    expected = greedy(slow(model), ids, 6)
    for way in (
        {"assistant_model": base_model(name).eval()},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 2},
    ):
        assert torch.equal(model.generate(input_ids=ids, **GREEDY, **way), expected), way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a cache is offloaded from a GPU")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@torch.no_grad()
def test_generation_with_an_offloaded_cache(cache):
    model, ids = prefixed().cuda(), inputs(3, 5)["input_ids"].cuda()
    found = model.generate(input_ids=ids, **GREEDY, cache_implementation=cache, disable_compile=True)
    assert torch.equal(found, greedy(slow(model), ids, 6))


def test_dropout_of_the_attention_is_replayed_under_checkpointing():
    model = prefixed(
        "llama", PrefixTuningConfig(num_virtual_tokens=3, prefix_dropout=0.2), attention_dropout=0.5
    ).train()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(losses(model, inputs()))
        model.gradient_checkpointing_enable()
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())
    torch.manual_seed(6)
    assert not torch.equal(losses(model, inputs())["loss"], results[0]["loss"])


@pytest.mark.parametrize("kind", ["pickle", "copy"])
def test_a_copy_is_the_model_again(kind):
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, shift_positions=True)
    model = prefixed("gpt2", config)
    again = pickle.loads(pickle.dumps(model)) if kind == "pickle" else copy.deepcopy(model)
    batch = inputs()
    results = losses(model, batch), losses(again, batch)
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())
    peft_kernels.detach(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in base_model("gpt2").modules()]
    assert again.config._attn_implementation == "sdpa" and model.config._attn_implementation == "peft_kernels"


def test_16_bit_models_and_autocast():
    model = base_model("llama").to(torch.bfloat16)
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3))
    weights = [p for p in model.parameters() if p.requires_grad]
    assert weights and all(p.dtype is torch.float32 for p in weights)
    model(**inputs()).loss.backward()
    assert all(p.grad.any() for p in weights)
    wide = prefixed()
    with torch.autocast("cpu", torch.bfloat16):
        wide(**inputs()).loss.backward()
    assert all(p.grad.any() for p in wide.parameters() if p.requires_grad)


def test_checkpointing_without_the_call_is_refused():
    model = several().train()
    layer = model.model.layers[0]
    hidden, angles = (
        torch.randn(1, 7, 32, requires_grad=True),
        model.model.rotary_emb(torch.zeros(1), torch.arange(7)[None]),
    )
    with peft_kernels.adapter_ids([0], LONG_SHORT[:1]):
        y = torch.utils.checkpoint.checkpoint(layer, hidden, position_embeddings=angles, use_reentrant=False)
    with pytest.raises(
        RuntimeError, match="was trained with an adapter for each row is called again inside the backward"
    ):
        y.sum().backward()


@pytest.mark.parametrize("flash", [False, True], ids=["without-flash", "flash"])
def test_continuous_batching_does_not_lose_the_prefix_in_silence(flash, monkeypatch):
    for version in (2, 3):
        monkeypatch.setattr(continuous_api, f"is_flash_attn_{version}_available", lambda **_: flash)
    model, ids = prefixed(), inputs(2, 5)["input_ids"]
    with pytest.raises(ValueError, match="peft_kernels"):
        model.generate_batch(ids.tolist(), generation_config=hf.GenerationConfig(**GREEDY), progress_bar=False)
    peft_kernels.detach(model, "default")
    assert all(part._supports_flash_attn for part in model.modules() if isinstance(part, hf.PreTrainedModel))
