"""The benchmark of whole decoder layers: cells, arms, peers in a model, memory, rows. Nothing here asserts a time."""

import dataclasses
import math

import pytest
import torch
import typer
from benchmark_rows import decoder_rows, write
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from benchmarks import decoder, decoder_arms, gate, record, run, runs, shapes
from benchmarks.peers import axolotl, layers, unsloth

pytest.importorskip("peft")

CPU = torch.device("cpu")
TRAINING = decoder.cells("quick")[2]
DECODING = decoder.cells("quick")[1]


def a_run():
    return decoder.Run(CPU, 2, 0.0, record.provenance(CPU))


def built(cell, *kinds):
    torch.manual_seed(0)
    arms, left_out = decoder_arms.build(cell, CPU, kinds)
    return {arm.name: arm for arm in arms}, left_out


# -- cells ------------------------------------------------------------------------------------------------------------


def test_the_gpu_grid_is_a_llama_3_8b_and_begins_with_what_has_a_target():
    found = decoder.cells("gpu")
    llama = next(model for model in shapes.MODELS if model.name == "llama-3-8b")
    for cell in found:
        assert (cell.hidden, cell.intermediate) == (llama.hidden, llama.intermediate)
        head = cell.hidden // cell.heads
        assert (cell.heads * head, cell.key_value_heads * head, cell.r) == (llama.query, llama.key_value, 16)
    assert [(cell.step, cell.p) for cell in found[:3]] == [("training", "0.1"), ("decoding", "0"), ("training", "0")]
    assert (found[1].B, found[1].adapters) == (64, 16)
    assert {cell.adapters for cell in found if cell.step == "decoding"} >= {1, 16, 64}
    for grid in shapes.GRIDS:
        assert len(set(decoder.cells(grid))) == len(decoder.cells(grid)) > 3
        assert grid in decoder.LEAST_ROUNDS and grid in decoder.SECONDS


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_arms_compute_the_same_and_differ_where_one_is_wrong():
    arms, left_out = built(TRAINING, "peft", "peft_narrow", "patched")
    assert list(arms) == ["frozen", "frozen_again", "peft", "patched"] and list(left_out) == ["peft_narrow"]
    assert len(arms["patched"].run()) == 1 + 2 * len(decoder_arms.LINEARS) + 1  # the loss, A and B each, embedded
    assert len(arms["frozen"].run()) == 2
    both = [arms["peft"], arms["patched"]]
    assert not runs.differing(both, TRAINING.dtype, TRAINING.layers)
    wrong = dataclasses.replace(arms["peft"], run=lambda: [2 * t for t in arms["peft"].run()])
    assert runs.differing([wrong, arms["patched"]], TRAINING.dtype, TRAINING.layers)


def test_adapters_in_the_base_s_dtype_have_the_values_of_those_in_fp32():
    cell = dataclasses.replace(TRAINING, dtype=torch.bfloat16)
    arms, left_out = built(cell, "peft", "peft_narrow", "patched_narrow", "patched")
    assert not left_out
    trained = {name: [p for p in arm.parameters if p.requires_grad] for name, arm in arms.items()}
    assert {p.dtype for p in trained["peft"]} == {torch.float32} and arms["peft"].adapter_dtype == "float32"
    assert {p.dtype for p in trained["peft_narrow"]} == {torch.bfloat16}
    for wide, narrow in zip(trained["peft"], trained["peft_narrow"], strict=True):
        assert torch.equal(wide, narrow.float()) and narrow.any()
    assert not runs.differing([*arms.values()][2:], cell.dtype, cell.layers)


def plain(x, member, p):
    dropped = functional.dropout(x, p)
    return functional.linear(x, member.weight) + dropped @ member.lora_A.mT @ member.lora_B.mT * member.scaling


def plain_functions(device):
    """A peer's functions, in plain PyTorch."""

    def mlp(x, members, p):
        gate_proj, up, down = members
        return plain(functional.silu(plain(x, gate_proj, p)) * plain(x, up, p), down, p)

    def qkv(x, members, p):
        return tuple(plain(x, member, p) for member in members)

    return layers.Functions(qkv, mlp, plain)


@pytest.mark.parametrize("module", [unsloth, axolotl], ids=["unsloth", "axolotl"])
def test_a_peer_s_functions_run_in_the_model(module, monkeypatch):
    monkeypatch.setattr(module, "layer_functions", plain_functions)
    arms, left_out = built(TRAINING, module.NAME, "peft")
    assert not left_out and arms[module.NAME].backend == "peer"
    assert not runs.differing([arms[module.NAME], arms["peft"]], TRAINING.dtype, TRAINING.layers)
    dropped, _ = built(dataclasses.replace(TRAINING, p="0.5"), module.NAME, "peft")
    assert runs.differing([dropped[module.NAME], arms["peft"]], TRAINING.dtype, TRAINING.layers)


def test_a_peer_that_is_not_there_is_named(monkeypatch):
    def absent(device):
        raise ImportError("unsloth is not installed")

    monkeypatch.setattr(unsloth, "layer_functions", absent)
    rows = {row.arm: row for row in decoder.time_cell(TRAINING, ("unsloth", "patched"), a_run())}
    assert list(rows) == ["frozen", "frozen_again", "patched", "unsloth"]
    assert rows["unsloth"].not_timed == "unsloth is not installed" and math.isnan(rows["unsloth"].memory_bytes)
    frozen, patched = rows["frozen"], rows["patched"]
    assert (patched.timing, patched.memory, patched.adapter_dtype) == ("eager", decoder.KEPT, "float32")
    assert patched.memory_bytes > frozen.memory_bytes > 0
    assert frozen.tokens_per_s == pytest.approx(1e3 * TRAINING.B * TRAINING.S / frozen.ms_p50)


def test_memory_on_a_gpu_is_the_allocator_s_peak_beyond_what_was_there(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    arm = decoder_arms.Arm("peft", "peft", lambda: asked.append("run"), "float32", None, ())
    assert decoder.memory_of(arm, torch.device("cuda")) == (250.0, decoder.PEAK)
    assert asked == ["reset", "run"]


# -- decoding ---------------------------------------------------------------------------------------------------------


class NothingFromTheDevice(TorchDispatchMode):
    """Raises where a number would be copied to or from a GPU, for which a captured step cannot wait."""

    WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            raise RuntimeError(f"it waits for {func}")
        return func(*args, **(kwargs or {}))


def test_a_decoding_step_can_be_captured_and_repeated():
    arms, _ = built(DECODING, "pool")
    assert list(arms) == ["frozen", "frozen_again", "pool"]
    for arm in arms.values():
        first = arm.run()
        assert first.shape == (DECODING.B, 1, decoder_arms.WORDS)
        with NothingFromTheDevice():
            again = arm.run()
        assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="it waits"), NothingFromTheDevice():
        torch.ones(2).sum().item()


def test_the_pool_s_rows_have_their_adapters():
    arms, _ = built(DECODING, "pool")
    base, pool = arms["frozen"].run(), arms["pool"].run()
    assert not any(torch.allclose(a, b) for a, b in zip(base, pool, strict=True)), "every row has an adapter"


def test_a_pool_that_computes_something_else_is_refused(monkeypatch):
    other = decoder_arms.Decoding._merged

    def twice(self, factors):
        return other(self, {name: (a, b, 2 * s, None) for name, (a, b, s, _) in factors.items()})

    monkeypatch.setattr(decoder_arms.Decoding, "_merged", twice)
    with pytest.raises(gate.RedGateError, match="computes something else than the merged model"):
        built(DECODING, "pool")


# -- command and table ------------------------------------------------------------------------------------------------


def command(*options):
    app = typer.Typer()
    app.command()(run.main)
    return CliRunner().invoke(app, ["--op", "decoder", *options])


def test_the_command_times_the_quick_grid(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(gate, "check", lambda op, *others: checked.append(op.name) or 20)
    out, few = tmp_path / "out.csv", ("--arms", "peft,pool", "--rounds", "1", "--seconds", "0", "--layers", "2")
    result = command(*few, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert checked == list(decoder.CALLED)
    rows = record.read(out, decoder.Row)
    arms = {"training": {"frozen", "frozen_again", "peft"}, "decoding": {"frozen", "frozen_again", "pool"}}
    for step, names in arms.items():
        assert {row.arm for row in rows if row.step == step} == names
    assert {row.layers for row in rows} == {2} and {row.rounds for row in rows} == {1}
    assert command("--arms", "merge").exit_code == 2
    app = typer.Typer()
    app.command()(run.main)
    refused = CliRunner().invoke(app, ["--op", "batched_lora", "--layers", "2"])
    assert refused.exit_code == 2 and "is for train_many and decoder" in refused.output.replace("\n", " ")


def test_csv_and_table(tmp_path):
    rows = decoder_rows()
    assert record.read(write(tmp_path / "a.csv", rows, decoder.Row), decoder.Row) == rows
    table = decoder.markdown(rows, "Somewhere.").splitlines()
    assert "2 layers of a Llama of 512 x 1408" in table[0] and len(table) == 4 + len(decoder.cells("cpu"))
    assert table[4].startswith("| training, dropout 0.1 | 2 x 128 | 1.5 | 2.0% | 2.00 | 1.10 | 1.15 | 20,000 | 3.00 / ")
