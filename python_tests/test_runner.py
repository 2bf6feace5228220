"""Runners of a served model: fullgraph compilation, ids and adapters that change without compiling again, beams,
threads with a runner each, the errors."""

import copy
import threading

import pytest
import torch
from models import ROWS, base_model, in_rows, inputs, served, with_adapter
from test_attach_pool import logits, tokens
from transformers import CompileConfig

import peft_kernels
from peft_kernels.integrations.pooled import pool_of

# The graph is what torch.compile's front end makes; what its backends make of it is not this library's.
FULLGRAPH = {"fullgraph": True, "backend": "aot_eager"}


@pytest.mark.parametrize("compile", [None, FULLGRAPH, {"fullgraph": True}], ids=["eager", "aot_eager", "inductor"])
def test_a_runner_computes_what_the_model_does(compile):
    _, model, _ = served()
    runner = peft_kernels.Runner(model, compile)
    for rows in (ROWS, ROWS[::-1], [None] * len(ROWS), ["german"] * len(ROWS)):
        torch.testing.assert_close(runner(**tokens(), adapters=rows).logits, logits(model, rows))


def test_the_route_is_in_the_graph_once():
    _, model, _ = served()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    runner = peft_kernels.Runner(model, {"fullgraph": True, "backend": backend})
    runner(**tokens(), adapters=ROWS)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("batched_lora_route" in name for name in called) == 1
    assert sum("batched_lora_." in name for name in called) == 2 * 4, "qkv, o, gate_up and down of two layers"
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    assert not any("route" in str(value) for value in output.args[0]), "no route leaves the graph"


def test_adapters_come_and_go_without_compiling_again():
    plain, model, _ = served()
    pool = pool_of(model)
    pool.reserve(8, rank=8)
    growths = pool.growths
    runner = peft_kernels.Runner(model, FULLGRAPH)
    runner(**tokens(), adapters=ROWS)
    with torch.compiler.set_stance("fail_on_recompile"):
        pool.load("new", with_adapter(plain, 7, r=8))
        pool.load("french", with_adapter(plain, 8, r=5), replace=True)
        pool.remove("german")
        for rows in (["new", "french", None, "new", "greek"], ["french"] * 5, [None] * 5):
            torch.testing.assert_close(runner(**tokens(), adapters=rows).logits, logits(model, rows))
    assert pool.growths == growths


def test_generation_with_beams():
    _, model, _ = served()
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    runner = peft_kernels.Runner(model)
    for beams in (1, 3):
        with in_rows([n for n in ROWS for _ in range(beams)]):
            expected = model.generate(**tokens(), **asked, num_beams=beams)
        assert runner.generate(**tokens(), adapters=ROWS, **asked, num_beams=beams).equal(expected)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_beams_of_the_model_s_own_config(name):
    """An encoder sees each sequence once."""
    _, model, _ = served(name)
    model.generation_config.update(num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = peft_kernels.Runner(model).generate(**tokens(), adapters=ROWS)
    for i, name in enumerate(ROWS):
        assert found[i].equal(peft_kernels.Runner(model).generate(tokens()["input_ids"][i : i + 1], adapters=[name])[0])


def test_inside_and_outside_of_inference_mode():
    _, model, _ = served()
    runner = peft_kernels.Runner(model)
    with torch.inference_mode():
        inside = runner(**tokens(), adapters=ROWS).logits
    assert runner(**tokens(), adapters=ROWS).logits.equal(inside)


def test_after_the_model_has_compiled_its_own_generate():
    _, model, _ = served()
    model.get_compiled_call(CompileConfig(backend="eager"))
    runner = peft_kernels.Runner(model)
    asked = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with in_rows(ROWS):
        expected = model.generate(**tokens(), **asked)
    assert runner.generate(**tokens(), adapters=ROWS, **asked).equal(expected)


@pytest.mark.parametrize(("threads", "compile"), [(8, None), (2, FULLGRAPH)], ids=["eager", "compiled"])
def test_threads_with_a_runner_each(threads, compile):
    _, model, _ = served()
    rows = [[n, m] for n in ("french", "german", "greek", None) for m in ("greek", None)][:threads]
    expected = [logits(model, r) for r in rows]
    wrong = []

    def work(i):
        runner = peft_kernels.Runner(model, compile)
        for _ in range(5):
            try:
                torch.testing.assert_close(runner(**tokens(2), adapters=rows[i]).logits, expected[i])
            except AssertionError as error:
                wrong.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_weights_are_shared_and_the_model_stays():
    _, model, _ = served()
    runner, before = peft_kernels.Runner(model), logits(model)
    assert logits(model).equal(before)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(runner(**tokens(), adapters=ROWS).logits, logits(model))


def test_errors():
    _, model, _ = served()
    with pytest.raises(ValueError, match=r"attach_pool\(model\)"):
        peft_kernels.Runner(base_model("llama"))
    runner = peft_kernels.Runner(model)
    with pytest.raises(ValueError, match="adapters for 2 rows, and a layer's input has 5"):
        runner(**tokens(), adapters=["french", None])
    with pytest.raises(KeyError, match="no adapter 'dutch'"):
        runner(**tokens(1), adapters=["dutch"])
    with pytest.raises(TypeError, match="adapters must be a list"):
        runner(**tokens(1), adapters="french")
    runner._model.forward = lambda **_: None
    with pytest.raises(RuntimeError, match="no served layer ran"):
        runner(adapters=["french"])
    wrapped = served()[1]
    wrapped.model.forward = torch.compile(wrapped.model.forward)
    with pytest.raises(ValueError, match="model has a forward of its own"):
        peft_kernels.Runner(wrapped)
    runner, found = peft_kernels.Runner(model), []

    def enter_again(*_):
        try:
            runner(**inputs(1), adapters=[None])
        except RuntimeError as error:
            found.append(error)

    hook = runner._model.register_forward_pre_hook(enter_again)
    runner(**tokens(1), adapters=["french"])
    hook.remove()
    assert "one runner for each thread" in str(found[0])
    assert pool_of(model).pinned == 0
    torch.testing.assert_close(runner(**tokens(), adapters=ROWS).logits, logits(model))


def test_a_copy_of_the_model_is_served_too():
    _, model, _ = served()
    runner = peft_kernels.Runner(copy.deepcopy(model))
    torch.testing.assert_close(runner(**tokens(), adapters=ROWS).logits, logits(model))
