"""transformers' continuous batching of a model with prefixes: each request gives what it gives alone by `generate`,
beside a pool too; what is refused."""

import time

import pytest
import torch
from models import base_model, in_rows, served, small_cache
from prefixes import LENGTHS, several, with_values
from transformers import CompileConfig, GenerationConfig

import peft_kernels
from peft_kernels import PrefixTuningConfig

PROMPTS = [[5, 9, 13], [7, 8, 9, 10, 11, 12, 13, 14, 20, 21, 22], [5, 9, 13], [3, 3], [7, 8, 9, 10, 11, 12, 13, 14]]
NAMES = ["long", None, "short", "long", "short"]
GREEDY = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}


def greedy(**changes):
    return GenerationConfig(**GREEDY | {"eos_token_id": -1} | changes)


@torch.no_grad()
def alone(model, prompt, name):
    def generate():
        return model.generate(torch.tensor([prompt]), **GREEDY, eos_token_id=None)[0, len(prompt) :].tolist()

    if name is None:
        return generate()
    with in_rows([name]):
        return generate()


def assert_each_alone(model, names):
    expected = [alone(model, prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert len({str(tokens) for tokens in expected}) >= 4, "the prefixes matter"
    found = peft_kernels.generate_batch(model, PROMPTS, names, greedy(), small_cache())
    assert [output.generated_tokens for output in found] == expected
    assert not any(output.error for output in found) and model.config._attn_implementation == "peft_kernels"


def shifting(name, **changes):
    """Prefixes of different lengths, behind which the tokens' positions start."""
    model = base_model(name, **changes).eval()
    for prefix, P in LENGTHS.items():
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=P, shift_positions=True), prefix)
    return with_values(model)


@pytest.mark.parametrize("active", [[], "short"], ids=["none", "active"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_each_request_equals_its_prefix_alone(name, active):
    """Whole attention, learned positions, a window, windows in some layers."""
    model = shifting(name)
    peft_kernels.set_active(model, active)
    assert_each_alone(model, NAMES)


def test_a_model_that_was_eager():
    model = base_model("llama", attn_implementation="eager").eval()
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, composition="add", gate=True)
    for prefix in LENGTHS:
        peft_kernels.attach(model, config, prefix)
    assert_each_alone(with_values(model, 0.3), NAMES)
    peft_kernels.detach(model, "long")
    peft_kernels.detach(model, "short")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("active", [[], "short"], ids=["none", "active"])
def test_beside_a_pool(active):
    _, model, _ = served()
    for prefix, P in (LENGTHS | {"french": 3}).items():
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=P), prefix)
    with_values(model)
    peft_kernels.set_active(model, active)
    assert_each_alone(model, ["long", "german", "french", "short", None])
    with torch.no_grad(), in_rows(["long", "german", None]):
        together = model(torch.tensor([PROMPTS[0]] * 3)).logits
    with torch.no_grad(), in_rows(["long"]):
        torch.testing.assert_close(together[:1], model(torch.tensor(PROMPTS[:1])).logits)


def test_several_sequences_of_a_request_while_the_model_is_called():
    model = several()
    expected, ids = [alone(model, PROMPTS[1], name) for name in LENGTHS], torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        before = model(ids).logits
    manager = peft_kernels.init_continuous_batching(
        model, greedy(num_return_sequences=2, do_sample=True, top_k=1), small_cache()
    )
    first, second = (manager.add_request(PROMPTS[1], adapter=name) for name in LENGTHS)
    manager.start()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before), "by another thread, without the engine's rows"
    found, end = {}, time.monotonic() + 60
    while len(found) < 4 and time.monotonic() < end:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            found[output.request_id] = output.generated_tokens
    manager.stop(block=True)
    assert len(found) == 4 and {*expected[0]} != {*expected[1]}
    for request, tokens in zip((first, second), expected, strict=True):
        assert [t for i, t in found.items() if i.partition("__")[0] == request] == [tokens] * 2


def test_a_manager_is_made_while_another_thread_calls_the_model():
    model, ids, during = several(), torch.tensor([PROMPTS[1]]), []
    peft_kernels.set_active(model, "short")
    of_processors = model._get_logits_processor

    def call_first(config):
        during.append(model(ids).logits)
        return of_processors(config)

    model._get_logits_processor = call_first
    with torch.no_grad():
        before = model(ids).logits
        peft_kernels.init_continuous_batching(model, greedy(), small_cache())
        assert len(during) == 1 and torch.equal(during[0], before)


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        (["long"], "the engine ends, as the prefix 'long' was taken off before its requests had ended"),
        (LENGTHS, "the engine ends, as the last prefix was taken off"),
    ],
    ids=["one", "all"],
)
def test_a_prefix_that_goes_ends_the_engine(gone, text):
    model = several()
    manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
    requests = [manager.add_request(PROMPTS[0], adapter=name) for name in LENGTHS]
    for name in gone:
        peft_kernels.detach(model, name)
    assert failed(manager) == dict.fromkeys(requests, text)


def failed(manager):
    """What the manager's two requests say, once it is started."""
    manager.start()
    outputs = [manager.get_result(timeout=60) for _ in range(2)]
    manager.join(time.perf_counter(), timeout=60)
    assert not manager.is_running()
    manager.stop(block=True)
    return {output.request_id: output.error.removeprefix("continuous batching: ") for output in outputs}


def test_a_prefix_that_comes_back_is_another_one():
    model = several()
    manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
    for name in LENGTHS:
        manager.add_request(PROMPTS[0], adapter=name)
    step, steps = manager._generation_step, []

    def changing_step():
        steps.append(None)
        if len(steps) == 3:
            peft_kernels.detach(model, "long")
            peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3), "long")
        step()

    manager._generation_step = changing_step
    assert all("the prefix 'long' was taken off" in text for text in failed(manager).values()) and len(steps) == 3
    assert manager.add_request(PROMPTS[0], adapter="long") is None, "the engine has ended"


@pytest.mark.parametrize("started", [False, True], ids=["made", "started"])
def test_a_prefix_comes_before_the_engine(started):
    _, model, _ = served()
    model.set_attn_implementation("eager")
    manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
    if started:
        manager.start()
    with pytest.raises(ValueError, match=r"attach: the attention is 'paged\|eager', .* stop its manager"):
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3))
    manager.stop(block=True)
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=3))
    peft_kernels.detach(model, "default")
    assert model.config._attn_implementation == "eager"


def test_a_manager_that_is_kept():
    """It is that of the prefixes, and of the pool, that it was made for."""
    _, model, _ = served()
    config = PrefixTuningConfig(num_virtual_tokens=3)

    def keep():
        manager = peft_kernels.init_continuous_batching(model, greedy(), small_cache())
        manager.start()
        manager.stop(block=True, keep_for_next_session=True)
        assert peft_kernels.init_continuous_batching(model) is manager
        manager.stop(block=True)

    for change in (lambda: peft_kernels.attach(model, config), lambda: peft_kernels.detach(model, "default")):
        keep()
        change()
        with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
            peft_kernels.init_continuous_batching(model)
        model.destroy_cached_continuous_batching_manager()
    peft_kernels.attach(model, config)
    keep()
    peft_kernels.detach(model, "default")
    peft_kernels.attach(model, config)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        peft_kernels.init_continuous_batching(model)
    model.destroy_cached_continuous_batching_manager()
    peft_kernels.unpatch(model)
    keep()
    peft_kernels.attach_pool(model, adapters=2)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        peft_kernels.init_continuous_batching(model)


def test_errors():
    model = several()
    with pytest.raises(KeyError, match="the model has no prefix 'other'; it has 'long', 'short'"):
        peft_kernels.generate_batch(model, PROMPTS[:1], ["other"], greedy(), small_cache())
    with pytest.raises(ValueError, match="varlen_compile_config must be left out in a model with prefixes"):
        compiled = small_cache(varlen_compile_config=CompileConfig())
        peft_kernels.generate_batch(model, PROMPTS[:1], ["long"], greedy(), compiled)
    assert model.config._attn_implementation == "peft_kernels"
    peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=2, composition="add"), "added")
    with pytest.raises(ValueError, match=r"must have one composition, .* 'short' has 'merge', 'added' has 'add'"):
        peft_kernels.init_continuous_batching(model)
