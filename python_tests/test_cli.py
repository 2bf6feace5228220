"""The command line: info tells, bench forwards, and the demo in miniature finds what it should, wrong things too."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import peft_kernels
from peft_kernels import backends, cli

RUN = CliRunner()


def test_info_names_every_backend_and_the_reason():
    result = RUN.invoke(cli.app, ["info"])
    assert result.exit_code == 0, result.output
    for row in backends.describe():
        assert row["name"] in result.output
    assert "used" in result.output
    assert peft_kernels.__version__ in result.output


def test_info_is_in_words(monkeypatch):
    said = "no CUDA device: CUDA driver version is insufficient (driver none, runtime 13.0)"
    library = SimpleNamespace(peft_kernels_cuda_devices=lambda: said.encode())
    monkeypatch.setattr(backends, "operator_library", lambda: library)
    assert backends.cuda_summary() == "no NVIDIA driver here; the kernels were built with CUDA 13.0"
    facts = {"version": "1.0", "revision": None, "instruction_sets": ["default", "avx512_bf16"]}
    monkeypatch.setattr(cli, "facts", lambda: {
        "version": "1.0", "torch": "2", "python": "3", "devices": ["cpu"], "instruction_set": "avx2",
        "cuda": backends.cuda_summary(), "sm90_asked_for": backends.sm90_asked_for(), "build": facts, "backends": [],
    })  # fmt: skip
    monkeypatch.delenv("PEFT_KERNELS_SM90", raising=False)
    output = RUN.invoke(cli.app, ["info"]).output
    assert "CUDA: no NVIDIA driver here" in output
    assert "Hopper" not in output
    assert "build: version 1.0, instruction sets default avx512_bf16\n" in output  # the revision is not known
    monkeypatch.setenv("PEFT_KERNELS_SM90", "1")
    output = RUN.invoke(cli.app, ["info"]).output
    assert "PEFT_KERNELS_SM90=1: on compute capability 9.0 the kernels for Hopper run" in output


def test_info_json_is_the_same_as_data():
    result = RUN.invoke(cli.app, ["info", "--json"])
    found = json.loads(result.output)
    assert found["backends"] == backends.describe()
    assert found["version"] == peft_kernels.__version__
    assert {"torch", "devices", "instruction_set", "cuda", "build"} <= found.keys()
    bound = {row["device"]: row["name"] for row in found["backends"] if row["bound"]}
    assert bound["cpu"] == backends.bound("cpu")


def test_bench_forwards_arguments_and_exit_code(tmp_path, monkeypatch, capfd):
    script = tmp_path / "run.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    monkeypatch.setattr(cli, "BENCHMARK", script)
    result = RUN.invoke(cli.app, ["bench", "--op", "lora_linear", "--help", "x"])
    assert result.exit_code == 3
    assert "['--op', 'lora_linear', '--help', 'x']" in capfd.readouterr().out


def test_bench_outside_a_source_tree_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "BENCHMARK", tmp_path / "run.py")
    result = RUN.invoke(cli.app, ["bench"])
    assert result.exit_code == 2
    assert "clone the repository" in result.output


def test_a_domain_that_is_missing_is_replaced_aloud(monkeypatch):
    from peft_kernels.demo import corpus

    (name, origin, _), *others = corpus.CANDIDATES
    monkeypatch.setattr(corpus, "CANDIDATES", [(name, origin, lambda: b""), *others])
    texts, said = corpus.choose(3)
    assert [text.name for text in texts] == [row[0] for row in others][:3]
    assert len(said) == 1
    assert name in said[0]
    monkeypatch.setattr(corpus, "CANDIDATES", corpus.CANDIDATES[:2])
    with pytest.raises(RuntimeError, match="needs 3 domains"):
        corpus.choose(3)


@pytest.fixture
def miniature(monkeypatch):
    """The demo with a model and a training of a few seconds."""
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    from peft_kernels.demo import task

    size = task.Size(
        base_steps=40,
        adapt_steps=8,
        extra_steps=8,
        method_domains=1,
        method_steps=12,
        hidden=64,
        intermediate=96,
        layers=2,
        heads=2,
        batch=8,
        window=48,
        held_out_windows=16,
        generated=4,
        decode_rows=4,
        decode_steps=2,
        decode_turns=1,
    )
    monkeypatch.setitem(task.SIZES, "quick", size)
    return size


@pytest.fixture
def hurried(monkeypatch, miniature):
    """The same, where methods are hardly compared with each other."""
    from peft_kernels.demo import task

    monkeypatch.setitem(task.SIZES, "quick", dataclasses.replace(miniature, method_steps=1))


def demo(out, *arguments):
    return RUN.invoke(cli.app, ["demo", "--quick", "--device", "cpu", "--out", str(out), *arguments])


def test_demo(tmp_path, miniature):
    from peft_kernels.demo import methods, prefixes

    result = demo(tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["size"] == dataclasses.asdict(miniature)
    assert {"device", "versions", "version", "revision", "date", "backend", "seconds", "replaced"} <= found.keys()
    domains = [row["domain"] for row in found["comparisons"]]
    assert len(set(domains[:4])) == 4
    assert found["comparisons"][4]["method"]["dropout"]
    for row in found["comparisons"]:
        assert row["problems"] == []
        assert row["fused_modules"] > 0
        assert row["bits_after"]["patched"] < row["bits_before"]
        saved = row["saved_bytes"]
        assert saved["patched"] < saved["peft"] if row["method"]["dropout"] else saved["patched"] <= saved["peft"]
        assert len(row["losses"]["patched"]) == row["steps"] == len(row["step_times_ms"]["patched"])
        assert row["step_ms"].keys() == row["ratio"].keys() == {"peft", "patched", "again"}
        assert (tmp_path / row["adapters"]["patched"] / "adapter_model.safetensors").exists()
        assert row["domain"] in result.output
    assert all(line.split(",")[0] in result.output for line in found["conclusion"])
    assert [(row["domain"], row["method"]) for row in found["methods"]] == [
        (domains[0], method) for method in methods.METHODS
    ]
    assert all(row["bits_after"] < row["bits_before"] and not row["problems"] for row in found["methods"])
    assert [len(claim["gains"]) for claim in found["claims"]] == [1] * len(methods.CLAIMS)
    assert [(row["domain"], row["method"], row["width"]) for row in found["prefixes"]] == [
        (domains[0], method, width)
        for method, width in {"LoRA": 16, **{f"prefix, {name}": prefixes.LENGTH for name in prefixes.INITS}}.items()
    ]
    assert all(not row["problems"] for row in found["prefixes"])
    assert "Methods at one budget" in result.output and f"Prefixes of {prefixes.LENGTH}" in result.output
    served = found["serving"]
    assert not served["problems"]
    rows = [row["adapter"] for row in served["answers"]]
    first, *others = (domain.replace(" ", "-") for domain in domains[:4])
    bottlenecks = [f"{first}-{kind}" for kind in methods.SERVED]
    assert rows == [None, first, *bottlenecks, *(who for domain in others for who in (None, domain))]
    assert [row["adapter"] for row in served["prefixed"]] == [None, *(f"{first}-{name}" for name in prefixes.SERVED)]
    for row in (*served["answers"], *served["prefixed"]):
        assert row["error"] <= row["bound"] and not row["problems"]
    assert [row["distinct"] for row in served["throughput"]] == [1, 4]
    for row in served["throughput"]:
        assert row["ratio"].keys() == row["tokens_per_second"].keys() == {"base", "pool", "patched", "peft"}
        assert {len(times) for times in row["step_times_ms"].values()} == {2}
    assert all(f"{count} rows in one batch" in result.output for count in (11, 4))
    assert "Decode step of 4 rows" in result.output
    lines = result.output.splitlines()  # of a log: when a stage starts, and when it has ended
    starts = ["base model on English", f"{domains[0]}, methods, r=16", "one batch, many adapters"]
    for started in starts:
        at = lines.index(f"{started} ...")
        assert any(line.startswith(f"{started}: ") for line in lines[at:])
    for name in ("loss_curves.png", "step_times.png", "methods.png", "prefixes.png", "serving.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def _doubled(model):
    for name, module in model.named_modules():
        if name.endswith("o_proj") and hasattr(module, "scaling"):
            module.scaling["default"] *= 2


def _without_gradient_of_a(model):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.register_hook(torch.zeros_like)


def _with_twice_the_gradient_of_b(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.register_hook(lambda gradient: 2 * gradient)


def _with_a_forward_of_its_own(model):
    layer = next(module for name, module in model.named_modules() if name.endswith("o_proj"))
    layer.forward = lambda x, forward=layer.forward: forward(x)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_doubled, "logits"),
        (_without_gradient_of_a, "loss curves"),
        (_with_twice_the_gradient_of_b, "lora_B"),
        (_with_a_forward_of_its_own, "left alone"),
    ],
)
def test_demo_fails_where_the_patched_model_is_not_the_same(tmp_path, hurried, monkeypatch, spoil, said):
    from peft_kernels import demo as main_job

    plan, patch = main_job.plan, peft_kernels.patch
    monkeypatch.setattr(main_job, "plan", lambda *args, **kwargs: plan(*args, **kwargs)[:1])

    def spoiled(model):
        if "default" in model.peft_config:  # what is being trained, not the copies that are served
            spoil(model)
        return patch(model)

    monkeypatch.setattr(peft_kernels, "patch", spoiled)
    result = demo(tmp_path)
    assert result.exit_code == 1
    assert "not equal" in result.output
    assert said in result.output


def _a_rank_row_less(monkeypatch):
    from peft_kernels.integrations import pooled

    read = pooled.read_adapter

    def without(*args):
        parts = read(*args)
        site, factors = next(iter(parts.items()))
        kept = torch.arange(len(factors.lora_A)).clamp(max=1)[:, None]  # all but the first
        return parts | {site: factors._replace(lora_A=kept * factors.lora_A)}

    monkeypatch.setattr(pooled, "read_adapter", without)


def _rows_of_others(monkeypatch):
    enter = peft_kernels.adapter_ids
    monkeypatch.setattr(peft_kernels, "adapter_ids", lambda ids, adapters: enter(ids[::-1], adapters))


@pytest.mark.parametrize("spoil", [_a_rank_row_less, _rows_of_others])
def test_demo_fails_where_the_mixed_batch_is_not_the_same(tmp_path, hurried, monkeypatch, spoil):
    from peft_kernels import demo as main_job

    plan = main_job.plan
    monkeypatch.setattr(main_job, "plan", lambda *args, **kwargs: plan(*args, **kwargs)[:1])
    spoil(monkeypatch)
    result = demo(tmp_path)
    assert result.exit_code == 1
    assert "not equal: one batch, many adapters: Python: its logits" in " ".join(result.output.split())
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["problems"] for row in found["comparisons"]] == [[]]
    problems = " ".join(found["serving"]["problems"])
    assert "4 adapters: the logits of arm pool" in problems and "arm patched" not in problems


def test_a_row_is_judged_by_what_it_writes_wherever_rounding_does_not_decide(miniature):
    from peft_kernels.demo import serving

    exact = torch.zeros(3, 256, dtype=torch.float64)
    exact[:, 65], exact[:, 66] = torch.tensor([2.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    prompt, letters = torch.tensor([64]), {"A": 65, "B": 66}

    def problems(mixed, alone, logits=exact):
        written = tuple(torch.tensor([letters[letter] for letter in word]) for word in (mixed, alone))
        return serving.judge("a", prompt, written, (logits, exact, exact), 2.0**-20).problems

    assert problems("AAA", "AAA") == []
    assert problems("AAA", "ABB") == [], "a tie, and what PEFT alone has read after it is another text"
    assert "'BAA'" in problems("BAA", "AAA")[0]
    assert "'AAA'" in problems("AAA", "AAB")[0]
    assert "logits" in problems("AAA", "AAA", exact + 2.0**-10)[0]
    assert "logits" in problems("AAA", "AAA", exact * float("nan"))[0]
