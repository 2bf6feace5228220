"""transformers' continuous batching with an adapter for each request: each equals its adapter alone, versions, results
of several sequences, cancelled requests, the errors."""

import time

import pytest
import torch
from models import base_model, in_rows, served, small_cache, with_adapter
from transformers import GenerationConfig

import peft_kernels
from peft_kernels.integrations.pooled import pool_of
from peft_kernels.integrations.requests import Requests

PROMPTS = [[5, 9, 13], [7, 8, 9, 10, 11, 12, 13, 14], [5, 9, 13], [5, 9, 13], [3, 3], [7, 8, 9, 10, 11, 12, 13, 14]]
NAMES = ["french", None, "german", None, "greek", "french"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def greedy(**changes):
    return GenerationConfig(**GREEDY | {"eos_token_id": -1} | changes)


@torch.no_grad()
def alone(model, prompt, name):
    with in_rows([name]):
        tokens = model.generate(torch.tensor([prompt]), **GREEDY, eos_token_id=None)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", "all-linear"), ("gemma3", "all-linear"), ("llama", ["v_proj", "embed_tokens", "lm_head"])],
    ids=str,
)
def test_each_request_equals_its_adapter_alone(name, targets):
    _, model, _ = served(name, target_modules=targets)
    expected = [alone(model, prompt, n) for prompt, n in zip(PROMPTS, NAMES, strict=True)]
    assert len({str(tokens) for tokens in expected}) >= 5, "the adapters matter"
    found = peft_kernels.generate_batch(model, PROMPTS, NAMES, greedy(), small_cache())
    assert [output.generated_tokens for output in found] == expected
    assert not any(output.error for output in found) and pool_of(model).pinned == 0
    assert [alone(model, prompt, n) for prompt, n in zip(PROMPTS, NAMES, strict=True)] == expected


def test_a_request_keeps_the_version_that_it_began_with():
    plain, model, _ = served()
    pool, expected = pool_of(model), alone(model, PROMPTS[0], "french")
    manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
    old = manager.add_request(PROMPTS[0], adapter="french")
    pool.load("french", with_adapter(plain, 9), replace=True)
    new = manager.add_request(PROMPTS[0], adapter="french")
    pool.remove("german")
    with pytest.raises(KeyError, match="german"):
        manager.add_request(PROMPTS[0], adapter="german")
    manager.start()
    found = results(manager, 2)
    manager.stop(block=True)
    assert found[old].generated_tokens == expected
    assert found[new].generated_tokens == alone(model, PROMPTS[0], "french") != expected
    assert pool.pinned == 0


def results(manager, count, of=""):
    """Of the first so many sequences to finish, of requests whose ids begin so."""
    found, end = {}, time.monotonic() + 60
    while len(found) < count and time.monotonic() < end:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished() and output.request_id.startswith(of):
            found[output.request_id] = output
    return found


def test_several_sequences_of_a_request():
    _, model, _ = served()
    manager = peft_kernels.init_continuous_batching(
        model, greedy(num_return_sequences=2, do_sample=True, top_k=1), small_cache()
    )
    request = manager.add_request(PROMPTS[1], adapter="greek")
    manager.start()
    found = results(manager, 2)
    manager.stop(block=True)
    expected = alone(model, PROMPTS[1], "greek")
    assert len(found) == 2 and request in found
    assert all(output.generated_tokens == expected for output in found.values())
    assert pool_of(model).pinned == 0


def test_a_cancelled_request_keeps_its_adapter_as_long_as_it_runs():
    """transformers does not cancel the further sequences of a request, nor the step that is under way."""
    _, model, _ = served()
    cfg = greedy(num_return_sequences=2, do_sample=True, top_k=1, max_new_tokens=30)
    manager = peft_kernels.init_continuous_batching(model, cfg, small_cache())
    request = manager.add_request(PROMPTS[0], adapter="greek")
    other = manager.add_request(PROMPTS[1], adapter="french")
    step, steps = manager._generation_step, []

    def cancelling_step():
        steps.append(pool_of(model).pinned)
        if len(steps) == 6:
            manager.cancel_request(request)
        step()

    manager._generation_step = cancelling_step
    manager.start()
    found = results(manager, 2, of=other)
    manager.stop(block=True)
    assert steps[:7] == [2] * 7 and steps[-1] == 1 and pool_of(model).pinned == 0
    with in_rows(["french"]), torch.no_grad():
        tokens = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert all(output.generated_tokens == tokens[0, len(PROMPTS[1]) :].tolist() for output in found.values())


def test_request_ids():
    _, model, _ = served()
    expected = alone(model, PROMPTS[0], "greek")  # before the engine switches the attention
    manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
    manager.add_request(PROMPTS[0], "mine", adapter="greek")
    for taken in ("mine", "mine__child#0"):
        with pytest.raises(ValueError, match="another one than those of running requests"):
            manager.add_request(PROMPTS[0], taken, adapter="french")
    manager.start()
    for _ in range(3):
        assert results(manager, 1)["mine"].generated_tokens == expected
        manager.add_request(PROMPTS[0], "mine", adapter="greek")
    manager.stop(block=True)


@pytest.mark.parametrize("hard_stop", [False, True], ids=["idle", "hard-stop"])
def test_requests_go_when_they_end(hard_stop):
    """Without a step after theirs, and without stop() having waited."""
    _, model, _ = served()
    manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
    manager.add_request(PROMPTS[0], adapter="greek")
    assert pool_of(model).pinned == 1
    manager.start()
    if hard_stop:
        manager.stop(block=False, hard_stop=True)
    else:
        results(manager, 1)
    end = time.monotonic() + 60
    while pool_of(model).pinned and time.monotonic() < end:
        time.sleep(0.01)
    assert pool_of(model).pinned == 0 and (hard_stop or manager.is_running())
    manager.stop(block=True)


def test_a_request_that_could_not_be_added_leaves_the_others():
    _, model, _ = served()
    requests = Requests(pool_of(model))
    for name in ("french", "german"):
        requests.begin(name, name)
    requests.let_go(["french", "german__child#0"])
    requests.end("french")
    assert requests.slot("german__child#1") == pool_of(model).slot("german") and pool_of(model).pinned == 1
    with pytest.raises(KeyError):
        requests.slot("french")
    requests.let_go([])
    assert pool_of(model).pinned == 0


def test_a_manager_that_is_kept():
    _, model, _ = served()
    manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
    manager.start()
    manager.add_request(PROMPTS[0], adapter="greek")
    results(manager, 1)
    manager.stop(block=True, keep_for_next_session=True)
    ids = manager.ids
    assert peft_kernels.init_continuous_batching(model) is manager and manager.ids is ids
    model.destroy_cached_continuous_batching_manager()
    model._cached_continuous_batching_manager = model.init_continuous_batching(greedy(), small_cache())
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        peft_kernels.init_continuous_batching(model)


def test_in_inference_mode():
    _, model, _ = served()
    with torch.inference_mode():
        (found,) = peft_kernels.generate_batch(model, PROMPTS[:1], ["greek"], greedy(), small_cache())
    assert found.generated_tokens == alone(model, PROMPTS[0], "greek")


def test_errors():
    _, model, _ = served()
    with pytest.raises(ValueError, match=r"attach_pool\(model\)"):
        peft_kernels.init_continuous_batching(base_model("llama"))
    with pytest.raises(ValueError, match="allow_block_sharing must be False"):
        peft_kernels.generate_batch(model, PROMPTS, NAMES, greedy(), small_cache(allow_block_sharing=True))
    with pytest.raises(ValueError, match="one entry per input"):
        peft_kernels.generate_batch(model, PROMPTS, NAMES[1:], greedy(), small_cache())
    with pytest.raises(KeyError, match="no adapter 'dutch'"):
        peft_kernels.generate_batch(model, PROMPTS[:1], ["dutch"], greedy(), small_cache())
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        peft_kernels.generate_batch(
            model, PROMPTS, NAMES, greedy(num_return_sequences=2, do_sample=True), small_cache()
        )
    before = model.config._attn_implementation
    for prompts, got in (([None], "None in place 0"), (["hello"], "'hello' in place 0"), ("hello", "a str"),
                         ([[1, "x"]], "in place 0"), ({"input_ids": [[1]]}, "a dict")):  # fmt: skip
        with pytest.raises(TypeError, match=rf"inputs must be .*tokenizer\(prompts\)\['input_ids'\], got .*{got}"):
            peft_kernels.generate_batch(model, prompts, ["greek"], greedy(), small_cache())
    assert model.config._attn_implementation == before and pool_of(model).pinned == 0
