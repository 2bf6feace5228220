"""The benchmark harness: its order, its gate, its CSV, its tables. Nothing here asserts a time."""

import dataclasses
import math
import sys
from collections import Counter

import pytest
import torch
import typer
from benchmark_rows import made_up, made_up_rows, write
from typer.testing import CliRunner

from benchmarks import (
    arms,
    gate,
    measure,
    peers,
    plan,
    record,
    report,
    roofline,
    run,
    shapes,
    tables,
    targets,
)
from benchmarks.peers import isolated
from peft_kernels import registry, testing

CPU = torch.device("cpu")
OP = registry.ops()["lora_linear"]
SMALL = shapes.Cell(
    "lora_linear", torch.float32, 5, 32, 48, 4, shapes.variants(torch.float32), ("peft", "reference", "peers")
)


def a_run(**changes):
    peaks = {torch.float32: roofline.Peak(3e10, 2e11), torch.bfloat16: roofline.Peak(3e10, 8e11)}
    return run.Run(CPU, plan.Plan(3, 0.0), peaks, record.provenance(CPU) | changes)


# -- order and timing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10])
def test_every_arm_takes_every_place_equally_often(count):
    places = Counter((arm, place) for i in range(2 * count) for place, arm in enumerate(measure.order(i, count)))
    assert set(places.values()) == {2}
    assert len(places) == count**2


def test_rounds_interleave_all_arms_and_warm_up_is_not_counted():
    contenders = [arms.Arm(str(i), "torch", None, lambda x: x, ()) for i in range(3)]
    called = []

    def step(arm):
        called.append(arm.name)
        return float(len(called)), float(len(called))

    steps = measure.interleave(contenders, step, rounds=4, seconds=0.0, warmup=2)
    assert all(sorted(called[i : i + 3]) == ["0", "1", "2"] for i in range(0, len(called), 3))
    assert [len(taken) for taken in steps.values()] == [4, 4, 4]
    assert min(first for taken in steps.values() for first, _ in taken) > 6  # the first two rounds are gone


def test_ratios_are_taken_within_a_round():
    assert measure.ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)


# -- one small cell, really run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_rows():
    pytest.importorskip("peft")
    rows, left_out = run.time_cell(SMALL, SMALL.arms, a_run())
    return rows, left_out


def test_a_cell_has_both_frozen_arms_and_every_variant_of_each_contender(small_rows):
    rows, _ = small_rows
    assert Counter((row.arm, row.p) for row in rows if row.direction == "forward") == {
        ("frozen", ""): 1,
        ("frozen_again", ""): 1,
        ("peft", "0"): 1,
        ("peft", "0.1"): 1,
        ("op", "0"): 1,
        ("op", "0.1"): 1,
    }
    assert {row.direction for row in rows} == {"forward", "forward+backward"}
    assert all(row.rounds >= 3 and row.ms_p20 <= row.ms_p50 <= row.ms_p80 for row in rows)
    assert {row.ratio_p50 for row in rows if row.arm == "frozen"} == {1.0}
    forward = {(row.arm, row.p): row.ms_p50 for row in rows if row.direction == "forward"}
    assert all(forward[row.arm, row.p] <= row.ms_p50 for row in rows if row.direction == "forward+backward")


def test_saved_bytes(small_rows):
    saved = {(row.arm, row.p): row.saved_bytes for row in small_rows[0]}
    x, h, seed = 4 * SMALL.M * SMALL.K, 4 * SMALL.M * SMALL.r, 8
    assert saved["frozen", ""] == 0
    assert saved["op", "0"] == x + h
    assert saved["op", "0.1"] == x + h + seed
    assert saved["peft", "0"] == x + h
    assert saved["peft", "0.1"] >= 2 * x + h


def test_absent_peers_are_named(small_rows, monkeypatch):
    assert any(line.startswith("automodel: ") for line in small_rows[1])  # it needs CUDA
    monkeypatch.setattr(isolated, "_installed", lambda name: False)
    peers.find.cache_clear()
    found, missing = peers.find(CPU)
    peers.find.cache_clear()
    assert not found
    assert "unsloth: unsloth is not installed" in missing
    assert "axolotl: axolotl is not installed" in missing


def test_without_peft_its_arms_are_named_and_ours_is_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # makes the import fail
    arms._peft_missing.cache_clear()
    made, left_out = arms.build(SMALL, CPU, ("peft", "patched", "reference"))
    arms._peft_missing.cache_clear()
    assert Counter(arm.name for arm in made) == {"frozen": 1, "frozen_again": 1, "op": 2}
    assert [line.partition(": PEFT cannot be imported")[0] for line in left_out] == ["peft", "patched"]


def test_peers_get_the_dropout_and_only_the_dtype_of_the_base(monkeypatch):
    met = []
    monkeypatch.setattr(peers, "find", lambda device: ({"some": lambda *given: met.append(given[-2:])}, []))
    made = arms.build(dataclasses.replace(SMALL, variants=shapes.variants(torch.bfloat16)), CPU, ("peers",))[0]
    for arm in made[2:]:
        arm.call(torch.ones(1, 32))
    assert met == [(arms.SCALING, 0.0), (arms.SCALING, 0.1)]


def test_a_contender_that_fails_is_named_and_ours_is_not_forgiven():
    def fail(x):
        raise RuntimeError("no such kernel")

    step = measure.cpu_clock(torch.ones(2, 2), torch.ones(2, 2))
    kept, failed = measure.runnable([arms.Arm("unsloth", "peer", None, fail, ())], step, run.FOREIGN)
    assert kept == []
    assert {arm.name: reason for arm, reason in failed.items()} == {"unsloth": "RuntimeError: no such kernel"}
    row = run.untimed_row(SMALL, "graph", *failed.popitem(), a_run())
    assert (row.not_timed, row.timing, row.rounds) == ("RuntimeError: no such kernel", "graph", 0)
    assert math.isnan(row.ratio_p50)
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure.runnable([arms.Arm("op", "cpu", None, fail, ())], step, run.FOREIGN)


def test_a_peer_is_imported_without_its_framework(tmp_path, monkeypatch):
    package = tmp_path / "some_framework" / "kernels"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit('the framework started')")
    (package / "lora.py").write_text("from absent_package.parts import part\nfrom .other import value\n")
    (package / "other.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)
    module = isolated.import_isolated("some_framework.kernels.lora", {"absent_package.parts": {"part": 2}})
    assert (module.part, module.value) == (2, 3)
    assert sys.modules == before
    with pytest.raises(ImportError, match="absent_package"):
        isolated.import_isolated("some_framework.kernels.lora", {})
    with pytest.raises(ImportError, match="no_such_compiler is not installed"):
        isolated.import_isolated("some_framework.kernels.lora", {}, required=("no_such_compiler",))
    assert sys.modules == before


# -- the gate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def red(monkeypatch):
    """A reference backend whose forward is wrong by a tenth."""
    right = testing.operators

    def wrong(backend, op):
        forward, backward = right(backend, op)

        def scaled(*arguments):
            y, h = forward(*arguments)
            return [1.1 * t for t in y], h

        return scaled, backward

    monkeypatch.setattr(gate.testing, "operators", wrong)


PAIRS = {(torch.float32, torch.float32)}


def test_the_gate_runs_the_samples_of_the_dtypes_that_are_timed():
    few = dataclasses.replace(OP, samples=lambda: OP.samples()[:3])
    expected = sum(pair in PAIRS for sample in few.samples() for pair in sample.dtypes)
    assert gate.check(few, ["reference"], PAIRS, CPU) == expected > 0


def test_a_red_gate_names_backend_and_sample(red):
    first = OP.samples()[0].id
    with pytest.raises(gate.RedGateError, match=f"backend reference fails sample '{first}' of lora_linear"):
        gate.check(OP, ["reference"], PAIRS, CPU)


def test_a_run_on_a_red_gate_is_refused(red, tmp_path):
    app = typer.Typer()
    app.command()(run.main)
    result = CliRunner().invoke(app, ["--arms", "reference", "--out", str(tmp_path / "out.csv")])
    assert result.exit_code == 2
    assert "refused" in result.output
    assert OP.samples()[0].id in result.output
    assert not (tmp_path / "out.csv").exists()


def test_unknown_arms_are_refused():
    app = typer.Typer()
    app.command()(run.main)
    result = CliRunner().invoke(app, ["--arms", "peft,nobody"])
    assert result.exit_code == 2
    assert "nobody" in result.output


# -- plan and shapes --------------------------------------------------------------------------------------------------


def test_the_cpu_grid_fits_into_twenty_minutes_on_two_cores():
    asked = plan.Plan(run.LEAST_ROUNDS["cpu"], run.SECONDS["cpu"])
    total = asked.total_seconds(shapes.cells("lora_linear", "cpu"), shapes.ARMS, a_run().peaks)
    assert asked.rounds >= 15
    assert total < 20 * 60


def test_the_cpu_grid_is_the_one_of_the_targets():
    cells = [cell for cell in shapes.cells("lora_linear", "cpu") if cell.op == "lora_linear"]
    assert len({(cell.dtype, cell.M, cell.K, cell.N) for cell in cells}) == len(cells) == 16
    assert sum(cell.M >= 16 for cell in cells) == 12
    assert all({"peft", "patched"} <= set(cell.arms) for cell in cells)
    assert {len(cell.variants) for cell in cells if cell.dtype is torch.bfloat16} == {4}


def test_model_shapes():
    llama = next(model for model in shapes.MODELS if model.name == "llama-3-8b")
    assert llama.projections()["k,v"] == (4096, 1024)
    cells = shapes.cells("lora_linear", "full", "llama-3-8b")
    assert {(cell.K, cell.N) for cell in cells if cell.op == "lora_linear"} == set(llama.projections().values())
    assert max(cell.M for cell in cells) == 8192


# -- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_round_trip(tmp_path):
    rows = made_up_rows()
    assert record.read(write(tmp_path / "a.csv", rows)) == rows


def test_csv_columns_say_where_a_number_is_from(tmp_path):
    path = write(tmp_path / "a.csv", [])
    assert path.read_text().startswith("op,arm,backend,dtype,adapter_dtype,M,K,N,r,p,direction,timing,copies,rounds,")
    origin = "device,driver,threads,instruction_set,sm90,torch,triton,cuda,transformers,peft,peft_kernels,commit,date"
    assert path.read_text().strip().endswith(f"saved_bytes,not_timed,{origin}")
    assert origin.split(",") == list(record.provenance(CPU))
    assert record.provenance(CPU)["instruction_set"] in ("default", "avx2", "avx512", "avx512_bf16")
    path.write_text("op,arm\n")
    with pytest.raises(ValueError, match="columns must be"):
        record.read(path)


def test_a_row_says_whether_the_kernels_of_sm90_were_on(monkeypatch):
    monkeypatch.delenv("PEFT_KERNELS_SM90", raising=False)
    assert record.provenance(CPU)["sm90"] == ""
    monkeypatch.setenv("PEFT_KERNELS_SM90", "1")
    assert record.provenance(CPU)["sm90"] == "1"


def test_a_tree_without_git_is_named_by_pk_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("PK_REVISION", "1234567")
    assert record.commit() == "1234567"
    monkeypatch.delenv("PK_REVISION")
    assert record.commit() == "unknown"


def test_a_csv_from_before_there_were_graphs_is_eager(tmp_path):
    path = tmp_path / "a.csv"
    row = made_up("frozen")
    later = ("timing", "copies", "not_timed", "driver", "triton", "cuda", "sm90")
    earlier = [name for name in record.FIELDS if name not in later]
    path.write_text(",".join(earlier) + "\n" + ",".join(str(getattr(row, name)) for name in earlier) + "\n")
    assert record.read(path) == [dataclasses.replace(row, triton="")]


# -- report -----------------------------------------------------------------------------------------------------------


def test_geometric_means_over_all_cells_and_from_16_rows():
    assert math.isclose(tables.geometric_mean([0.5, 2.0, 8.0]), 2.0)
    every, count, wide, wide_count = tables.means(made_up_rows(), "patched", (False, "0"))
    assert (count, wide_count) == (4, 2)
    assert math.isclose(wide, 1.8)
    assert math.isclose(every, 0.9 * 2**0.5)


def test_verdicts_say_what_is_missed_and_by_how_much():
    outcome = dict(reversed(verdict) for verdict in targets.verdicts(made_up_rows()))
    assert outcome["no dropout, 4 cells: 1.273 against 0.98, missed by 0.293"] is False
    slower = next(text for text in outcome if text.startswith("no cell slower"))
    assert not outcome[slower]
    assert "float32 M=16 K=64, no dropout: 1.800 against 1.200" in slower
    assert "M=1 " not in slower
    assert all(met for met, _ in targets.verdicts(made_up_rows(patched=0.4)))


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="benchmark:lora_linear:begin"):
        report.replaced("no markers", "tables")
