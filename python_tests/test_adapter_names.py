"""Each row with its own adapter in patched models, by PEFT's adapter_names: against PEFT, always with a count;
checkpointing, threads, exceptions, layers without a kernel."""

import copy
import pickle
import threading
from collections import Counter

import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from models import (
    GENERATING,
    MODELS,
    NAMES,
    Operators,
    assert_as_close_as_peft,
    base_model,
    batch,
    calls_per_forward,
    in_double,
    inputs,
    lora_config,
    nothing_is_left,
    peft_model,
    randomise,
    results,
    two_adapters,
)
from peft import get_peft_model
from torch import nn

import peft_kernels
from peft_kernels.integrations import gathering
from peft_kernels.integrations.gathering import INACTIVE


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_every_gradient_equal_peft(name):
    model = two_adapters(name).eval()
    plain, exact = results(model, **batch()), results(in_double(model), **batch())
    report = peft_kernels.patch(model, strict=True)
    with Operators() as operators:
        found = results(model, **batch())
    assert_as_close_as_peft(found, plain, exact)
    once = calls_per_forward(report)
    assert report.fused + report.fallbacks[INACTIVE] == once
    assert operators.calls["batched_lora"] == report.fused == operators.calls["batched_lora_backward"]
    assert operators.calls["batched_lora_route"] <= 2 and not operators.calls["lora_linear"]
    assert nothing_is_left(model)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_training_is_allowed(name):
    """PEFT refuses; without dropout it is what eval computes."""
    model = two_adapters(name).eval()
    plain, exact = results(model, **batch()), results(in_double(model), **batch())
    report = peft_kernels.patch(model.train(), strict=True)
    assert_as_close_as_peft(results(model, **batch()), plain, exact)
    assert report.fused == calls_per_forward(report)


def test_dropout_in_training():
    model = two_adapters(lora_dropout=0.4).train()
    peft_kernels.patch(model, strict=True)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(**batch()).logits)
    dropped, kept = draws[0], model.eval()(**batch()).logits
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    same = [torch.equal(a, b) for a, b in zip(dropped, kept, strict=True)]
    assert same[:2] == [False, False] and same[3] is False
    torch.testing.assert_close(dropped[2], kept[2])  # the base model drops nothing


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", GENERATING)
def test_generate_gives_the_same_tokens(name, beams):
    model = two_adapters(name).eval()
    search = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams)
    prompt = {"input_ids": inputs(rows=4)["input_ids"], "adapter_names": NAMES}
    plain = model.generate(**prompt, **search)
    report = peft_kernels.patch(model, strict=True)
    with Operators() as operators:
        assert torch.equal(model.generate(**prompt, **search), plain)
    assert report.fused > calls_per_forward(report) and set(report.fallbacks) <= {INACTIVE}
    assert operators.calls["batched_lora"] == report.fused and operators.calls["batched_lora_route"] <= 6
    assert nothing_is_left(model)


def test_a_generation_gathers_once(monkeypatch):
    model = two_adapters().eval()
    report = peft_kernels.patch(model, strict=True)
    entries, gather = [], gathering.add_factors
    monkeypatch.setattr(gathering, "add_factors", lambda *a: entries.append(a) or gather(*a))
    with torch.no_grad():
        model(**batch())
    once = len(entries)
    search = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    model.generate(input_ids=inputs(rows=4)["input_ids"], adapter_names=NAMES, **search)
    assert len(entries) == 2 * once > 0 and report.fused == 6 * calls_per_forward(report)


def test_generate_returns_several_sequences_of_each_row():
    model = two_adapters().eval()
    peft_kernels.patch(model, strict=True)
    prompt, search = inputs(rows=4)["input_ids"], dict(max_new_tokens=4, do_sample=False, num_beams=3)
    one = model.generate(input_ids=prompt, adapter_names=NAMES, **search)
    several = model.generate(input_ids=prompt, adapter_names=NAMES, num_return_sequences=3, **search)
    assert torch.equal(several[::3], one)
    torch.manual_seed(3)
    drawn = model.generate(
        input_ids=prompt, adapter_names=NAMES, num_return_sequences=2, do_sample=True, max_new_tokens=4
    )
    assert len(drawn) == 8


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_checkpointed_layers_keep_the_adapters(name, use_reentrant):
    model = two_adapters(name, lora_dropout=0.3)
    model.enable_input_require_grads()
    report = peft_kernels.patch(model.train(), strict=True)
    torch.manual_seed(5)
    expected = results(model, **batch())
    once = report.fused
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    found = results(model, **batch())
    torch.testing.assert_close(found, expected)  # T5 attends otherwise where it keeps no cache
    assert name == "t5" or all(torch.equal(found[key], expected[key]) for key in expected)
    assert report.fused > 2 * once and not report.fallbacks


def test_eight_threads_with_different_adapters():
    model = two_adapters().eval()
    peft_kernels.patch(model, strict=True)
    mixes = [[("default", "other", "__base__")[(i * 7 + j) % 3] for j in range(4)] for i in range(8)]
    with torch.no_grad():
        expected = [model(**batch(names)).logits for names in mixes]
    wrong, ran = [], Counter()

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                ran[i] += 1
                if not torch.equal(model(**batch(mixes[i])).logits, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and ran == dict.fromkeys(range(8), 20)
    assert nothing_is_left(model)


def test_generate_in_a_new_thread():
    model = two_adapters().eval()
    peft_kernels.patch(model, strict=True)
    call = dict(input_ids=inputs(rows=4)["input_ids"], max_new_tokens=4, do_sample=False)
    expected, found = model.generate(adapter_names=NAMES, **call), []
    thread = threading.Thread(target=lambda: found.append(model.generate(adapter_names=NAMES, **call)))
    with peft_kernels.adapter_ids([-1] * 4, adapters=[]):  # of this thread: the other does not see it
        model.generate(**call)
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_an_exception_leaves_nothing_behind():
    model = two_adapters().eval()
    peft_kernels.patch(model, strict=True)
    expected = model(**inputs()).logits
    layer = model.base_model.model.model.layers[1].mlp.act_fn
    hook = layer.register_forward_pre_hook(lambda *a: 1 / 0)
    for run in (lambda: model(**batch()), lambda: model.generate(**batch(), max_new_tokens=2)):
        with pytest.raises(ZeroDivisionError):
            run()
    hook.remove()
    with pytest.raises(ValueError, match=r"adapter_names: there are ids for \[2\].*leading sizes \[4, 7\]"):
        model(**inputs(rows=4), adapter_names=["default", "other"])
    assert nothing_is_left(model) and torch.equal(model(**inputs()).logits, expected)


@pytest.mark.parametrize("names,error,text", [
    (["default", "oter", "__base__", "x"], ValueError, "no adapter 'oter', 'x'; it has 'default', 'other', and"),
    ("default", TypeError, "must be a list of str"),
    ([0, 1, 0, 1], TypeError, "must be a list of str"),
])  # fmt: skip
def test_bad_names_are_refused_in_words(names, error, text):
    model = two_adapters().eval()
    peft_kernels.patch(model)
    with pytest.raises(error, match=text) as caught:
        model(**inputs(rows=4), adapter_names=names)
    assert str(caught.value).startswith("adapter_names: ") and nothing_is_left(model)


# -- layers without a kernel, or in a state without one ---------------------------------------------------------------


def with_embedding_and_head():
    """LoRA on the embedding, which has no kernel for rows, and a head that is trained whole."""
    config = dict(target_modules=["embed_tokens", "q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base_model("llama"), lora_config(**config))
    model.add_adapter("other", lora_config(r=3, **config))
    for index, head in enumerate(model.base_model.model.lm_head.modules_to_save.values()):
        nn.init.normal_(head.weight, 0, 0.1 * (index + 1))
    for embedding in model.base_model.model.model.embed_tokens.lora_embedding_B.values():
        nn.init.normal_(embedding, 0, 0.3)
    return randomise(model).eval()


def test_layers_without_a_kernel_are_told_the_adapters():
    model = with_embedding_and_head()
    names = NAMES
    plain, exact = (results(m, **batch(names)) for m in (model, in_double(model)))
    kinds = {name: type(module) for name, module in model.named_modules()}
    report = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(results(model, **batch(names)), plain, exact)
    assert report.fused == calls_per_forward(report) - 1 == 4 and nothing_is_left(model)
    assert report.fallbacks == {"rows with adapters of their own on an embedding": 1}
    ids = torch.tensor([0, 1, -1, 1])
    per_token = dict(ids=ids[:, None].expand(4, 7), adapters=["default", "other"])
    for given in (dict(ids=ids, adapters=["default", "other"]), per_token):
        with peft_kernels.adapter_ids(**given):
            assert_as_close_as_peft(results(model, **inputs(rows=4)), plain, exact)
    peft_kernels.patch(model)  # nothing more to do
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in model.named_modules()}
        assert_as_close_as_peft(results(again, **batch(names)), plain, exact)
    peft_kernels.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_a_state_without_a_kernel_runs_as_in_peft():
    model = two_adapters().eval()
    down = model.base_model.model.model.layers[0].mlp.down_proj
    down.lora_A["other"].to(torch.bfloat16)
    down.lora_B["other"].to(torch.bfloat16)
    assert "other" in down.lora_A
    plain, exact = results(model, **batch()), results(in_double(model), **batch())
    report = peft_kernels.patch(model)
    assert_as_close_as_peft(results(model, **batch()), plain, exact)
    assert report.fallbacks == {"factors of several dtypes in one call": 1} and nothing_is_left(model)
    ids = torch.tensor([0, 1, -1, 1])[:, None].expand(4, 7)
    with peft_kernels.adapter_ids(ids, adapters=["default", "other"]):
        assert_as_close_as_peft(results(model, **inputs(rows=4)), plain, exact)


def test_others_still_know_the_layers():
    """FSDP, accelerate and pickle find a decoder layer by the name of its class, transformers by isinstance."""
    model = two_adapters()
    layer = model.base_model.model.model.layers[0]
    kind = type(layer)
    peft_kernels.patch(model)
    assert type(layer) is not kind and isinstance(layer, kind) and type(layer).__name__ == kind.__name__
    assert get_module_class_from_name(model, "LlamaDecoderLayer") is type(layer)
    peft_kernels.unpatch(model)
    assert type(layer) is kind


def test_what_peft_refuses_is_refused():
    model = two_adapters().eval()
    peft_kernels.patch(model)
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="unmerge"):
        model(**batch())
    model.unmerge_adapter()
    model(**batch())
    assert nothing_is_left(model)


def test_a_layer_that_came_after_patch():
    """It is told the names in PEFT's way, and so are all."""
    model = peft_model("llama", target_modules=["q_proj"]).eval()
    report = peft_kernels.patch(model, strict=True)
    model.add_adapter("other", lora_config(target_modules=["down_proj"]))
    with torch.no_grad():
        found = model(**batch()).logits
        assert report.fused == 0 and any("adapter_names" in reason for reason in report.fallbacks)
        peft_kernels.patch(model, strict=True)
        torch.testing.assert_close(model(**batch()).logits, found)
    assert report.fused > 0
