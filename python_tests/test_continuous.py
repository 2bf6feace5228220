"""transformers' continuous batching with an adapter for each request: each equals its adapter alone, versions, results
of several sequences, cancelled requests, the errors."""

import time

import pytest
import torch
from models import base_model, in_rows, served, small_cache, with_adapter
from test_attach_pool import pool_of
from transformers import GenerationConfig

import peft_kernels

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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_each_request_equals_its_adapter_alone(name):
    _, model, _ = served(name)
    expected = [alone(model, prompt, n) for prompt, n in zip(PROMPTS, NAMES, strict=True)]
    assert len({str(tokens) for tokens in expected}) >= 5, "the adapters matter"
    found = peft_kernels.generate_batch(model, PROMPTS, NAMES, greedy(), small_cache())
    assert [output.generated_tokens for output in found] == expected
    assert not any(output.error for output in found) and sum(pool_of(model)._pins.values()) == 0
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
    assert sum(pool._pins.values()) == 0


def results(manager, count):
    found, end = {}, time.monotonic() + 60
    while len(found) < count and time.monotonic() < end:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
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
    assert sum(pool_of(model)._pins.values()) == 0


def test_a_cancelled_request_lets_its_adapter_go():
    _, model, _ = served()
    manager = peft_kernels.init_continuous_batching(model, greedy(max_new_tokens=40), small_cache())
    request = manager.add_request(PROMPTS[0], adapter="greek")
    assert sum(pool_of(model)._pins.values()) == 1
    manager.cancel_request(request)
    assert sum(pool_of(model)._pins.values()) == 0
    manager.start()
    manager.stop(block=True)


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
