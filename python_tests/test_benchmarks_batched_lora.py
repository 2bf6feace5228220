"""The benchmark of batched_lora_: its cells, its contenders, its rows and tables. Nothing here asserts a time."""

import dataclasses
import math

import pytest
import torch
import typer
from benchmark_rows import mixed_rows, write
from typer.testing import CliRunner

from benchmarks import gate, record, run, runs, shapes
from benchmarks.batched_lora import arms, cells, tables, timing
from peft_kernels import backends, registry, testing

CPU = torch.device("cpu")
ORIGIN = record.provenance(CPU)
ENGINES = {"sglang_v2", "sglang_csgmv", "vllm"}
SMALL = cells.Cell(torch.float32, "square", 24, (40, 16), 12, 4, "distinct", "mixed")


def a_run():
    return timing.Run(CPU, 2, 0.0, ORIGIN, 3e10)


def varied(**changes):
    return dataclasses.replace(SMALL, **changes)


# -- cells ------------------------------------------------------------------------------------------------------------


def test_popularity():
    counts = {
        p: torch.bincount(varied(popularity=p, M=64, adapters=16).ids() + 1, minlength=17)[:17].tolist()
        for p in cells.POPULARITIES
    }
    assert counts["identical"] == [0, 64] + [0] * 15
    assert counts["distinct"] == [0] + [4] * 16
    assert counts["half none"][0] == 32 and sum(counts["half none"]) == 64
    assert counts["skewed"][1] == 32 and 0 not in counts["skewed"][2:]
    assert counts["zipf"][0] == 0 and counts["zipf"][1] == max(counts["zipf"])
    for p in cells.POPULARITIES:  # a pool of one, and more adapters than rows
        assert set(varied(popularity=p, M=64, adapters=1).ids().tolist()) <= {0, -1}
        assert varied(popularity=p, M=1, adapters=64).ids().max() < 64
    assert len(set(varied(M=32, adapters=64).ids().tolist())) == 32


@pytest.mark.parametrize("grid", ["cpu", "gpu"])
def test_a_grid_begins_with_the_targets_and_has_every_value_of_every_axis(grid):
    found = cells.cells(grid)
    assert len(found) == len(set(found))
    for cell, target in zip(found, tables.TARGETS, strict=False):
        assert (cell.M, cell.K, cell.N, cell.popularity, cell.r) == (target.M, target.d, (target.d,), "distinct", "16")
        assert cell.ids().unique().numel() == target.M
    axes = ("M", cells.ROWS), ("adapters", cells.ADAPTERS), ("popularity", cells.POPULARITIES), ("r", cells.RANKS)
    for name, values in axes:
        assert {getattr(cell, name) for cell in found} == set(values)
    assert {cell.site.split()[0] for cell in found} == {"square", "qkv", "o", "gate_up", "down"}


def test_the_cpu_grid_fits_into_twenty_minutes():
    assert len(cells.cells("cpu")) * (timing.SECONDS["cpu"] + 5) < 20 * 60
    assert timing.LEAST_ROUNDS["cpu"] >= 15


def test_the_full_grid_is_the_product_of_all_axes():
    found = cells.cells("full", "llama-3-8b")
    assert len(found) == 4 * 6 * 4 * 5 * 4
    assert {(cell.K, cell.N) for cell in found} >= {(4096, (4096, 1024, 1024)), (4096, (14336, 14336))}


# -- contenders -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("popularity", cells.POPULARITIES)
def test_every_contender_computes_the_same(popularity):
    pytest.importorskip("peft")
    cell = varied(popularity=popularity)
    torch.manual_seed(0)
    problem = arms.Problem(cell, CPU)
    expected = problem.base()
    for g, y in enumerate(expected):
        for i, adapter in enumerate(problem.adapter.tolist()):
            if adapter >= 0:
                a, b = problem.factors[adapter][g]
                y[i] += arms.SCALING * b @ (a @ problem.x[i])
    torch.manual_seed(0)
    made, left_out = arms.build(cell, CPU, arms.ARMS)
    computing = [arm for arm in made if arm.name not in ("base", "base_again", "route")]
    assert {"peft", "gather_bmm", "gather_bmm alone", "grouped_mm"} <= {arm.name for arm in computing}
    for arm in computing:  # "... alone" adds to a y that is the base's before the first run
        for y, same in zip(arm.run(), expected, strict=True):
            torch.testing.assert_close(y, same)
    assert left_out.keys() - ENGINES == (set() if popularity == "identical" else {"merged"})


def plain_engine(module, device):
    """A serving engine's kernels, in plain PyTorch: they say what a Batch means."""

    def make(batch):
        def add(x, base):
            y = base()
            for row, slot in enumerate(batch.slots.tolist()):
                r = int(batch.ranks[slot])
                for s, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:], strict=False)):
                    h = batch.lora_A[slot, s * r : (s + 1) * r] @ x[row]
                    y[row, start:end] += (slot >= 0) * batch.scalings[slot] * (batch.lora_B[slot, start:end, :r] @ h)
            return y

        return add

    return dict.fromkeys(module.NAMES, make)


@torch.no_grad()
@pytest.mark.parametrize("popularity", ["distinct", "half none"])
def test_serving_engines_get_the_same_batch(popularity, monkeypatch):
    monkeypatch.setattr(arms, "_serving", plain_engine)
    cell = varied(popularity=popularity, dtype=torch.bfloat16)
    torch.manual_seed(0)
    made, left_out = arms.build(cell, CPU, ("sglang_v2", "vllm", "op"))
    names = [arm.name for arm in made[2:]]
    assert names == ["sglang_v2", "sglang_v2 alone", "vllm", "vllm alone", "op", "op alone"] and not left_out
    whole = [arm for arm in made if arm.name in arms.COMPUTING]
    assert not runs.differing(whole, cell.dtype)
    monkeypatch.setattr(arms, "SCALING", 3.0)
    torch.manual_seed(0)
    other = [arm for arm in arms.build(cell, CPU, ("vllm",))[0] if arm.name == "vllm"]
    assert runs.differing([*other, whole[-1]], cell.dtype)


def test_serving_engines_that_are_not_here_are_named():
    _, left_out = arms.build(SMALL, CPU, tuple(ENGINES))
    assert left_out.keys() == ENGINES
    assert all("not installed" in why or "CUDA" in why or "16 bits" in why for why in left_out.values())


def test_of_an_engine_that_computes_something_else_nothing_is_timed(monkeypatch):
    cell = varied(dtype=torch.bfloat16)
    monkeypatch.setattr(arms, "_serving", lambda module, device: dict.fromkeys(ENGINES, lambda batch: lambda x, y: y()))
    rows = {row.arm: row for row in timing.time_cell(cell, ("vllm", "op"), a_run())}
    assert {"base", "base_again", "op", "op alone", "vllm", "vllm alone"} == rows.keys()
    for name in ("vllm", "vllm alone"):
        assert "computes something else than op" in rows[name].not_timed and math.isnan(rows[name].added_us)
    assert not rows["op"].not_timed


def test_a_step_goes_through_several_layers(monkeypatch):
    monkeypatch.setattr(arms, "copies", lambda cell, device: 3)
    made, _ = arms.build(SMALL, CPU, ("op",))
    assert [arm.name for arm in made] == ["base", "base_again", "op", "op alone"]
    first, _, third = made[2].run()
    assert [y.shape for y in first] == [(12, 40), (12, 16)] and not torch.equal(first[0], third[0])
    rows = {row.arm: row for row in timing.time_cell(SMALL, ("op", "route"), a_run())}
    assert {row.copies for row in rows.values()} == {3}
    added = 1e3 * (rows["op"].ms_p50 - rows["op"].ms_p50 / rows["op"].ratio_p50)
    assert rows["op"].added_us == pytest.approx(added) and math.isnan(rows["route"].added_us)


def test_how_many_layers_a_step_on_a_gpu_goes_through():
    gpu, found = torch.device("cuda"), cells.cells("gpu")
    by_site = {cell.site.split()[0]: arms.copies(cell, gpu) for cell in found}
    assert by_site == {"square": 8, "qkv": 8, "o": 8, "gate_up": 2, "down": 4}
    assert {arms.copies(cell, CPU) for cell in found} == {1}


def test_ours_is_what_the_reference_says():
    problem = arms.Problem(SMALL, CPU)
    op = registry.ops()["batched_lora_"]
    names = ("y", "x", "route", "pages_in", "pages_out", "table", "scaling", "down_bias")
    sample = dict(zip(names, (problem.base(), *problem.arguments()), strict=True))
    for backend in backends.linked("batched_lora_", "cpu"):
        testing.assert_matches_oracle(op, sample, *testing.operators(backend, op))


def test_gathers_that_would_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(arms, "MOST_GATHERED", 1000)
    made, left_out = arms.build(SMALL, CPU, ("gather_bmm",))
    assert [arm.name for arm in made] == ["base", "base_again"]
    assert "would gather" in left_out["gather_bmm"]


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_cell_has_a_row_for_every_contender(monkeypatch):
    pytest.importorskip("peft")

    def broken(problem):
        def fail():
            raise RuntimeError("no such kernel")

        return [arms.Arm("grouped_mm", "torch", fail, problem.base_cost())]

    monkeypatch.setitem(arms._MAKERS, "grouped_mm", broken)
    rows = {row.arm: row for row in timing.time_cell(SMALL, arms.ARMS, a_run())}
    assert {"base", "base_again", "peft", "gather_bmm", "gather_bmm alone", "grouped_mm", "merged"} <= rows.keys()
    assert rows["grouped_mm"].not_timed == "RuntimeError: no such kernel" and math.isnan(rows["grouped_mm"].ratio_p50)
    assert rows["merged"].not_timed == "no one weight serves rows of several adapters"
    assert rows["base"].ratio_p50 == 1.0 and rows["base"].rounds == 2
    assert (rows["peft"].N, rows["peft"].present, rows["peft"].adapters) == ("40+16", 4, 4)
    assert rows["peft"].gbs / rows["peft"].read_share == pytest.approx(30)


def test_a_failure_of_ours_is_not_forgiven(monkeypatch):
    def broken(problem):
        return [arms.Arm("op", "cpu", lambda: 1 / 0, problem.base_cost())]

    monkeypatch.setitem(arms._MAKERS, "op", broken)
    with pytest.raises(ZeroDivisionError):
        timing.time_cell(SMALL, ("op",), a_run())


def test_the_command_times_the_quick_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "check", lambda *arguments: 24)
    monkeypatch.setattr(runs, "last_cache", lambda: 1 << 20)
    app = typer.Typer()
    app.command()(run.main)
    options = ["--op", "batched_lora", "--arms", "gather_bmm,op", "--rounds", "1", "--seconds", "0"]
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "out.csv")])
    assert result.exit_code == 0, result.output
    rows = record.read(tmp_path / "out.csv", timing.Row)
    assert {row.popularity for row in rows} == set(cells.POPULARITIES)
    assert f"written: {tmp_path / 'out.csv'}" in result.output.replace("\n", "")


@pytest.mark.parametrize("options,text", [
    (["--arms", "op,patched"], "patched"), (["--op", "lora_linear", "--arms", "gather_bmm"], "gather_bmm"),
])  # fmt: skip
def test_arms_of_the_other_op_are_refused(options, text):
    app = typer.Typer()
    app.command()(run.main)
    result = CliRunner().invoke(app, ["--op", "batched_lora", *options])
    assert result.exit_code == 2 and text in result.output


def test_a_red_gate_refuses_the_run(monkeypatch, tmp_path):
    def red(*arguments):
        raise gate.RedGateError("backend cpu fails sample 'ones'")

    monkeypatch.setattr(gate, "check", red)
    app = typer.Typer()
    app.command()(run.main)
    result = CliRunner().invoke(app, ["--op", "batched_lora", "--out", str(tmp_path / "out.csv")])
    assert result.exit_code == 2 and "sample 'ones'" in result.output
    assert not (tmp_path / "out.csv").exists()


# -- tables -----------------------------------------------------------------------------------------------------------


def test_targets_are_met_missed_or_not_measured():
    assert [met for met, _ in tables.verdicts(mixed_rows())] == [True] * 4
    missed = tables.verdicts(mixed_rows(ratio=1.2, share=0.8))
    assert [met for met, _ in missed] == [False] * 4
    assert missed[0][1].endswith("time over the base layer, float32: 1.200 against 1.15")
    assert missed[3][1].endswith("share of the read rate, bfloat16: 80% against 85%")
    assert all(text.endswith("not measured") for _, text in tables.verdicts([]))
    untimed = mixed_rows(not_timed="broken")
    assert not any(met for met, _ in tables.verdicts(untimed))


def test_tables_have_every_cell_once():
    rows = mixed_rows()
    distinct, rest = tables.distinct_table(rows), tables.cell_table(rows)
    assert distinct.splitlines()[0] == "| dtype | M | base, ms | 1 adapter | 4 adapters | 16 adapters | 64 adapters |"
    assert "| float32 | 2048 | 1.5 | 1.10 / 1.10 |" in distinct
    entries = distinct.count(" / ")
    assert entries + len(rest.splitlines()) - 2 == len(cells.cells("cpu"))
    assert "qkv of qwen3-0.6b | 1024 x 2048+1024+1024 | 64 | 16 distinct | 16 |" in rest
    assert tables.markdown(rows, "Somewhere.").startswith("Time of a projection")


def test_csv_round_trip(tmp_path):
    rows = mixed_rows()
    assert record.read(write(tmp_path / "a.csv", rows, timing.Row), timing.Row) == rows
    with pytest.raises(ValueError, match="columns must be op,"):
        record.read(tmp_path / "a.csv")


def test_the_grids_have_the_names_of_the_command():
    for grid in shapes.GRIDS:
        assert cells.cells(grid, "qwen3-0.6b")
        assert grid in timing.LEAST_ROUNDS and grid in timing.SECONDS
