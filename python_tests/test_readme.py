"""The README's examples run as they stand there, each by itself, and do what the README says of them."""

import ast
import copy
import functools
from pathlib import Path

import pytest
import torch
from models import calls_per_forward, in_rows, nothing_is_left, small_cache
from peft import PeftModel
from torch import nn

import peft_kernels
from peft_kernels.integrations import continuous

README = Path(__file__).parent.parent / "README.md"


def example(title):
    """The code under a heading of the README, as a syntax tree."""
    section = README.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return ast.parse(section.partition("```python\n")[2].partition("```")[0])


def run(statements, names):
    exec(compile(ast.Module(statements, []), str(README), "exec"), names)


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_many_adapters_trained_at_once_are_each_trained_alone(in_double, capsys):
    """Three steps of the example, and each adapter beside it by plain PEFT: on its own rows, by an optimizer alone."""
    *before, loop = example("Many adapters trained at once").body
    names = {}
    torch.manual_seed(6)
    run(before, names)
    model, rates = names["model"], names["rates"]
    plain = copy.deepcopy(model)
    peft_kernels.unpatch(plain)
    run([loop], names)
    said = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    together = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in together.values()} == {torch.float64} and len(rates) == len(said) == 3
    found = {}
    for name, rate in rates.items():
        losses, found[name] = trained_alone(copy.deepcopy(plain), name, rate, names["batches"])
        torch.testing.assert_close(losses, [step[name] for step in said if name in step])
    alone = found["alice"] | found["bob"] | found["carol"]
    torch.testing.assert_close(together, alone)
    untrained = dict(plain.named_parameters())
    assert all(not torch.equal(p, untrained[n]) for n, p in together.items())
    assert names["report"].fused == 3 * calls_per_forward(names["report"]) and nothing_is_left(model)


def trained_alone(model, name, rate, batches):
    """Losses and factors of one adapter that PEFT trains."""
    model.set_adapter(name)
    factors = {n: p for n, p in model.named_parameters() if f".{name}." in n}
    optimizer, losses = torch.optim.AdamW(factors.values(), lr=rate), []
    for owners, tokens in batches:
        own = tokens[[owner == name for owner in owners]]
        if len(own):
            logits = model(input_ids=own).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].mT, own[:, 1:])  # the model's own is taken in fp32
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, {n: p.detach() for n, p in factors.items()}


def test_serving_many_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(continuous, "ContinuousBatchingConfig", small_cache)  # not all memory of this machine
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # the same graphs
    names = {}
    run(example("Serving many adapters").body, names)
    model, input_ids, rows = names["model"], names["input_ids"], ["french", None, "german"]
    with in_rows(rows):
        tokens = model.generate(input_ids, max_new_tokens=20, do_sample=False)
    assert names["tokens"].equal(tokens) and len(names["pool"]) == 2
    assert all(output.error is None and output.generated_tokens for output in names["outputs"])
    peft_kernels.unpatch(model)
    for i, name in enumerate(rows):
        alone = PeftModel.from_pretrained(copy.deepcopy(model), f"checkpoints/{name}") if name else model
        with torch.no_grad():
            torch.testing.assert_close(names["logits"][i], alone(input_ids=input_ids[i : i + 1]).logits[0])


def test_patching(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    *before, trainer = example("Patching").body
    run(before, names)
    model, report = names["model"], names["report"]
    assert "gate_up" in capsys.readouterr().out and report.fused == 2 * calls_per_forward(report)
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    run([trainer], names)
    callbacks = names["trainer"].callback_handler.callbacks
    assert any(isinstance(callback, peft_kernels.PeftKernelsCallback) for callback in callbacks)


def test_many_adapters_in_one_batch():
    names = {}
    torch.manual_seed(0)
    run(example("Many adapters in one batch").body, names)
    assert names["tokens"].shape == (3, 16 + 8) and nothing_is_left(names["model"])
    trained = {n for n, p in names["model"].named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".french." in n for n in trained) and any(".german." in n for n in trained)


def assert_near(found, expected):
    """As near as the oracle wants sums of as many terms as anything here has, in fp32 and whatever their order."""
    terms = 64
    assert (found - expected).abs().max() <= terms**0.5 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_the_ops():
    names = {}
    torch.manual_seed(0)
    run(example("The ops").body, names)
    x, weight, bias, lora_A, lora_B, mask = (names[n] for n in ("x", "weight", "bias", "lora_A", "lora_B", "mask"))
    dropped, plain = x * mask * (65536 / round(0.9 * 65536)), x @ weight.mT + bias
    assert_near(names["y"], plain + 2 * dropped @ lora_A.mT @ lora_B.mT)
    assert_near(names["z"][2], plain[2])
    assert_near(names["z"][1], plain[1] + 2 * x[1] @ names["a_0"].mT @ names["b_0"].mT)
    assert_near(names["k"], x @ names["w_k"].mT)
    lora = x @ weight.mT + 2 * x @ lora_A.mT @ lora_B.mT
    assert_near(names["added"], lora)
    assert_near(names["d"], lora / (weight + 2 * lora_B @ lora_A).norm(dim=1) + bias)
    assert names["m"].shape == x.shape
    table, tokens, a, b = (names[n] for n in ("table", "tokens", "a_table", "b_table"))
    assert_near(names["rows"], (table + 2 * a.mT @ b.mT)[tokens])
    without = torch.nn.functional.scaled_dot_product_attention(
        names["query"], names["key"], names["value"], is_causal=True, enable_gqa=True
    )
    assert_near(names["o"][1], without[1])
    assert names["h"].shape == x.shape and not torch.equal(names["o"][0], without[0])


def test_bottleneck_adapters_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    *before, last = example("Bottleneck adapters").body
    run(before, names)
    model, tokens = names["model"], names["tokens"]
    with torch.no_grad():
        alone = model.eval()(input_ids=tokens).logits
        run([last], names)
        torch.testing.assert_close(model(input_ids=tokens).logits, alone)
        peft_kernels.unwiden(model)
        peft_kernels.set_active(model, [])
        assert not torch.equal(model(input_ids=tokens).logits, alone)
    assert "2 blocks widened, 0 left" in capsys.readouterr().out


def test_prefixes_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    torch.manual_seed(0)
    run(example("Prefixes").body, names)
    model, tokens, written = names["model"], names["tokens"], names["written"]
    for row, name in enumerate(("news", "style", None, "news")):
        peft_kernels.set_active(model, name or [])
        alone = model.generate(tokens[row : row + 1], max_new_tokens=8, do_sample=False)
        assert torch.equal(written[row], alone[0])
