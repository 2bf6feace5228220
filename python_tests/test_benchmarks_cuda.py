"""The benchmark's GPU side, on a CPU: grid, clocks, limits, targets, tables. Nothing here asserts a time."""

import contextlib
import dataclasses

import pytest
import torch
import typer
from benchmark_rows import (
    MADE_UP,
    decoder_rows,
    gpu_decoder_rows,
    gpu_pool_rows,
    gpu_rows,
    made_up_rows,
    mixed_rows,
    write,
)
from typer.testing import CliRunner

from benchmarks import (
    arms,
    cuda_clock,
    cuda_tables,
    decoder,
    hopper,
    limits,
    measure,
    plan,
    prefix_attention,
    record,
    report,
    roofline,
    run,
    runs,
    shapes,
    targets,
)
from benchmarks.batched_lora import timing as mixed

CPU = torch.device("cpu")

# -- grid and plan ----------------------------------------------------------------------------------------------------


def test_the_gpu_grid_fits_into_150_seconds_on_an_h200():
    asked = plan.Plan(run.LEAST_ROUNDS["gpu"], run.SECONDS["gpu"], "cuda", ("eager", "graph"))
    peaks = {torch.bfloat16: roofline.Peak(4.3e12, 7.9e14)}
    cells = shapes.cells("lora_linear", "gpu")
    assert asked.rounds >= 50
    assert 60 < asked.total_seconds(cells, shapes.kinds("cuda"), peaks) < 150
    assert "9 cells" in asked.describe(cells, shapes.kinds("cuda"), peaks)


def test_the_gpu_grid_begins_with_what_matters_most():
    cells = shapes.cells("lora_linear", "gpu")
    assert [(cell.M, cell.N, cell.r) for cell in cells[:3]] == [(8192, 4096, 16), (1, 4096, 16), (16, 4096, 16)]
    assert {(cell.M, cell.N) for cell in cells if cell.r == 16} == {
        (M, N) for M in (1, 16, 512, 8192) for N in (4096, 14336)
    }
    assert {variant.p for variant in cells[0].variants} == {0.0, 0.1}
    assert {variant.factor_dtype for variant in cells[0].variants} == {torch.bfloat16, torch.float32}
    assert {"peft", "compiled", "patched", "op", "peers"} <= set(cells[0].arms)


def test_on_a_gpu_the_reference_is_timed_only_if_asked_for():
    cell = shapes.cells("lora_linear", "gpu")[0]
    assert "reference" not in plan.kinds_of(cell, shapes.kinds("cuda"))
    assert plan.kinds_of(cell, ("reference",)) == ("reference",)
    assert "reference" in shapes.kinds("cpu")


# -- the clocks of a GPU, on a device that only keeps a log -----------------------------------------------------------


@pytest.fixture
def log(monkeypatch):
    """What the clocks ask of torch.cuda, in order. An event's time is the number of entries before it."""
    entries = []

    class Event:
        def __init__(self, enable_timing, external=False):
            assert enable_timing
            self.external = external

        def record(self):
            entries.append("external event" if self.external else "event")
            self.time = len(entries)

        def elapsed_time(self, other):
            return float(other.time - self.time)

    class CUDAGraph:
        def replay(self):
            entries.append("replay")

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            entries.append("wait")

    @contextlib.contextmanager
    def graph(captured, stream):
        entries.append("capture")
        yield
        entries.append("captured")

    properties = type("Properties", (), {"L2_cache_size": 256})
    fakes = {"Event": Event, "CUDAGraph": CUDAGraph, "Stream": Stream, "graph": graph}
    fakes |= {"current_stream": Stream, "stream": lambda stream: contextlib.nullcontext()}
    fakes |= {"get_device_properties": lambda device: properties, "synchronize": lambda: entries.append("synchronize")}
    fakes["set_sync_debug_mode"] = lambda mode: entries.append(f"synchronising: {mode}")
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    whole = torch.sum
    monkeypatch.setattr(torch, "sum", lambda *a, **k: (entries.append(f"flush {a[0].nbytes}"), whole(*a, **k)))
    return entries


def an_arm(log, weight):
    def call(x):
        log.append("forward")
        return x * weight

    return arms.Arm("op", "cuda", None, call, (weight,))


def test_an_eager_step_is_timed_from_an_idle_device_with_a_cold_l2(log):
    x, weight = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    x.grad = weight.grad = torch.ones(2)
    assert cuda_clock.eager_clock(x, torch.ones(2))(an_arm(log, weight)) == (2.0, 3.0)
    assert log == ["flush 1024", "synchronize", "event", "forward", "event", "event", "synchronize"]
    assert x.grad.tolist() == weight.grad.tolist() == [1.0, 1.0]  # cleared before, so not accumulated into


def test_a_captured_step_has_its_events_inside_and_the_flush_outside(log):
    x, weight = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    arm, step = an_arm(log, weight), cuda_clock.graph_clock(x, torch.ones(2))
    assert step(arm) == (2.0, 3.0)
    warm_up = ["wait", *["forward"] * 3, "synchronising: error", "forward", "synchronising: default", "wait"]
    body = ["external event", "forward", "external event", "external event"]
    replay = ["flush 1024", "replay", "synchronize"]
    assert log == [*warm_up, "capture", *body, "captured", *replay]
    assert x.grad is weight.grad is None
    step(arm)
    assert log[-6:] == replay * 2  # captured once


def test_of_several_layers_in_a_graph_a_step_is_that_of_one(log):
    x, weights = torch.ones(2, requires_grad=True), [torch.ones(2, requires_grad=True) for _ in range(4)]
    first, *behind = (an_arm(log, weight) for weight in weights)
    arm, step = dataclasses.replace(first, behind=tuple(behind)), cuda_clock.graph_clock(x, torch.ones(2))
    assert step(arm) == (5 / 4, 6 / 4)
    body = ["external event", *["forward"] * 4, "external event", "external event"]
    assert log[log.index("capture") + 1 : log.index("captured")] == body


def test_a_graph_of_few_rows_goes_through_layers_with_their_own_weights(monkeypatch):
    monkeypatch.setattr(arms, "copies", lambda size, device: 3)
    cell = shapes.Cell("lora_linear", torch.float32, 4, 32, 48, 4, shapes.variants(torch.float32), ("op", "compiled"))
    made, left_out = arms.build(cell, CPU, ("op", "compiled"))
    assert [(arm.name, len(arm.behind)) for arm in made] == [("frozen", 2), ("frozen_again", 2), ("op", 2), ("op", 2)]
    assert [line.partition(",")[0] for line in left_out] == ["compiled"]
    weights = [layer.parameters[0] for arm in made for layer in (arm, *arm.behind)]
    assert len({weight.data_ptr() for weight in weights}) == 12
    many = arms.build(dataclasses.replace(cell, M=65), CPU, ("op",))[0]
    assert not any(arm.behind for arm in many)


def test_how_many_layers():
    gpu = torch.device("cuda")
    assert [arms.copies(2 * 4096 * N, gpu) for N in (1024, 4096, 14336, 1 << 20)] == [8, 8, 4, 1]
    assert arms.copies(2 * 4096 * 4096, CPU) == 1


def test_an_arm_that_waits_for_the_device_is_never_captured(log):
    def wait(x):
        if log.count("synchronising: error") > log.count("synchronising: default"):
            raise RuntimeError("called a synchronizing CUDA operation")
        return x * 1

    x = torch.ones(2, requires_grad=True)
    arm = arms.Arm("unsloth", "peer", None, wait, ())
    kept, failed = measure.runnable([arm], cuda_clock.graph_clock(x, torch.ones(2)), run.FOREIGN)
    assert (kept, failed) == ([], {arm: "RuntimeError: called a synchronizing CUDA operation"})
    assert "capture" not in log
    assert log[-1] == "synchronising: default"


def test_modules_time_eagerly_with_the_same_clock(log):
    step = runs._eager_clock(CPU)
    assert step(runs.Arm("frozen", "torch", lambda: log.append("run"))) == 2.0
    assert log == ["flush 1024", "synchronize", "event", "run", "event", "synchronize"]


@pytest.mark.parametrize("captures,timing", [(True, "graph"), (False, "eager")])
def test_where_the_base_cannot_be_captured_all_are_timed_eagerly(captures, timing, monkeypatch):
    def clock(device, timing):
        def step(arm):
            if timing == "graph" and not captures:
                raise RuntimeError("called a synchronizing CUDA operation")
            return 1.0

        return step

    def build(cell, device, kinds):
        return [runs.Arm(name, "torch", lambda: torch.ones(1)) for name in ("none", "none_again", "op")], {}

    monkeypatch.setattr(runs, "clock", clock)
    how = runs.Run(torch.device("cuda"), 2, 0.0, {})
    found = runs.timed(build, prefix_attention.cells("quick")[0], (), (), how)
    assert found.timing == timing and [arm.name for arm in found.times] == ["none", "none_again", "op"]
    assert runs.timed(build, prefix_attention.cells("quick")[0], (), (), how, timing="eager").timing == "eager"


# -- limits -----------------------------------------------------------------------------------------------------------


def test_limits_measure_every_fact_in_the_same_rounds(tmp_path):
    size = limits.Sizes(1 << 12, (8, 2), 64, 64, torch.float32)
    rows = limits.measure(CPU, size, 3)
    products = ["gemm", *(f"gemm K+{extra}" for extra in (1, 4, 8, 16, 64)), "gemm beta=1", "shrink", "expand"]
    assert [row.fact for row in rows] == ["copy", *products, *products, "launch 1", "launch"]
    assert {row.rounds for row in rows} == {3}
    assert {row.unit for row in rows} == {"GB/s", "TFLOP/s", "us"}
    assert [row.shape for row in rows if row.fact == "gemm K+16"] == ["8 x 80 x 64", "2 x 80 x 64"]
    assert rows[0].value == pytest.approx(2 * 4096 / rows[0].ms_p50 * 1e-6)
    written = write(tmp_path / "limits.csv", rows, limits.Row).read_text()
    assert written.startswith("fact,shape,dtype,value,unit,ms_p20,ms_p50,ms_p80,against,")
    assert all(name in written for name in record.provenance(CPU))


def test_limits_compare_a_shape_with_itself_and_divide_launches():
    size = limits.sizes(CPU)
    named = {
        name: limits.Fact(name, "s", None, 2e9, unit, against)
        for name, unit, against in (
            ("gemm", "TFLOP/s", ""), ("gemm K+16", "TFLOP/s", "gemm"),
            ("launch 1", "us", ""), ("launch", "us", "launch 1"),
        )
    }  # fmt: skip
    taken = dict(zip(named.values(), ([1.0], [1.5], [0.01], [0.108]), strict=True))
    rows = {row.fact: row for row in limits.rows_of(taken, size, record.provenance(CPU))}
    assert rows["gemm"].value == pytest.approx(2.0)
    assert rows["gemm K+16"].ratio_p50 == 1.5
    assert rows["launch 1"].value == pytest.approx(10.0)
    assert rows["launch"].value == pytest.approx(2.0)


def test_the_command_writes_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "sizes", lambda device: limits.Sizes(1 << 12, (2,), 64, 64, torch.float32))
    app = typer.Typer()
    app.command()(run.main)
    out = tmp_path / "limits.csv"
    result = CliRunner().invoke(app, ["--op", "limits", "--rounds", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) == 1 + 12


# -- targets, tables, report ------------------------------------------------------------------------------------------


def test_the_gpu_targets_are_met_missed_or_not_measured():
    assert [verdict[0] for verdict in targets.cuda_verdicts([])] == [None] * 5
    assert [verdict[0] for verdict in targets.cuda_verdicts(gpu_rows())] == [True, True, True, True, True]
    rows = gpu_rows(forward=1.6, saved_beyond=4, sm90=1.06)
    outcomes = [(met, measured) for met, *_, measured in targets.cuda_verdicts(rows)]
    assert outcomes == [(True, "1.100"), (False, "1.600"), (False, "1.060"), (False, "1.060"), (False, "4")]
    without = [row for row in gpu_rows() if row.backend != hopper.BACKEND]
    assert [verdict[0] for verdict in targets.cuda_verdicts(without)] == [True, True, None, None, True]
    failed = [dataclasses.replace(row, not_timed="it waits") for row in gpu_rows()]
    assert [verdict[0] for verdict in targets.cuda_verdicts(failed)] == [None] * 5
    one_row_less = [row for row in gpu_rows() if row.M != 16]
    assert targets.cuda_verdicts(one_row_less)[1][0] is None
    other_backend = [dataclasses.replace(row, backend="triton") for row in gpu_rows()]
    assert [verdict[0] for verdict in targets.cuda_verdicts(other_backend)] == [None] * 5


def test_targets_of_pools_on_a_gpu():
    assert [verdict[0] for verdict in targets.pool_verdicts([])] == [None] * 3
    found = [(met, measured) for met, *_, measured in targets.pool_verdicts(gpu_pool_rows())]
    assert found == [(True, "4.00"), (True, "1.33"), (True, "0.50")]
    assert [verdict[0] for verdict in targets.pool_verdicts(gpu_pool_rows(9.3, 10))] == [False, False, False]
    eager = [dataclasses.replace(row, timing="eager") for row in gpu_pool_rows()]
    assert [verdict[0] for verdict in targets.pool_verdicts(eager)] == [None] * 3
    alone = [row for row in gpu_pool_rows() if row.arm != "sglang_v2"]
    assert [verdict[0] for verdict in targets.pool_verdicts(alone)] == [True, True, None]


def test_the_target_of_decoding_on_a_gpu():
    assert [verdict[0] for verdict in targets.decoding_verdicts([])] == [None]
    assert targets.decoding_verdicts(gpu_decoder_rows())[0][2:] == ("1.18", "1.100")
    assert targets.decoding_verdicts(gpu_decoder_rows(1.2))[0][0] is False
    assert targets.decoding_verdicts(decoder_rows())[0][0] is None  # of a CPU


def test_the_gpu_table_has_a_column_per_contender_and_hides_nothing():
    table = cuda_tables.view(gpu_rows(), "forward+backward", "graph")
    header, _, *lines = table.splitlines()
    assert (
        header == "| M | K x N | r | adapter | frozen, us | A/A | PEFT | compiled | cuda | cuda_sm90 | ours, of peak |"
    )
    assert len(lines) == 6
    assert lines[1].startswith(
        "| 8192 | 4096 x 4096 | 16 | dropout 0.1 | 1500.0 | 2.0% | 2.00 | not timed | 1.10 | 1.04 |"
    )
    assert "compiled" not in cuda_tables.view(gpu_rows(), "forward+backward", "eager")
    assert cuda_tables.view(made_up_rows(), "forward", "graph") == ""
    reasons = cuda_tables.not_timed(gpu_rows())
    assert len(reasons) == 1
    assert reasons[0].startswith("compiled, graph, at M=8192 N=4096 p=0; ")
    assert reasons[0].endswith(": it waits")


MARKERS = "before\n" + "".join(
    f"<!-- benchmark:{name}:begin -->\nold\n<!-- benchmark:{name}:end -->\n"
    for name in ("lora_linear", "lora_linear:cuda", "batched_lora", "train_many", "bottleneck_adapter",
                 "prefix_attention", "prefix_models", "lora_variants")
) + "after\n"  # fmt: skip


def test_report_writes_the_readme_and_check_sees_it_differ(tmp_path):
    csv = write(tmp_path / "lora_linear_cpu.csv", made_up_rows())
    readme = tmp_path / "README.md"
    readme.write_text(MARKERS)
    app = typer.Typer()
    app.command()(report.main)

    def invoke(*options):
        return CliRunner().invoke(app, ["--results", str(tmp_path), "--readme", str(readme), *options])

    assert invoke("--check").exit_code == 1
    assert "old" in readme.read_text()
    assert invoke().exit_code == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| no dropout | forward+backward | 4 | 1.20 | **1.27** | 2 | 1.20 | **1.80** | 0.98; 1.06 |" in text
    assert "a processor, 2 threads, avx2 kernels, torch 2" in text
    assert "0123456789ab-dirty" in text
    assert csv.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "Not measured yet; on a machine with a GPU" in text
    assert text.count("Not measured yet; on a machine that does nothing else") == 6
    assert text.count("| not measured yet |") == 9
    assert invoke("--check").exit_code == 0
    write(csv, made_up_rows(patched=0.8))
    assert invoke("--check").exit_code == 1
    assert invoke().exit_code == 0
    write(tmp_path / "lora_linear_cuda.csv", gpu_rows())
    write(tmp_path / "batched_lora_cuda.csv", gpu_pool_rows(), mixed.Row)
    write(tmp_path / "decoder_cuda.csv", gpu_decoder_rows(), decoder.Row)
    write(tmp_path / "batched_lora_cpu.csv", mixed_rows(), mixed.Row)
    for module, kind in report.MODULES[1:]:
        write(tmp_path / f"{module.NAME}_cpu.csv", MADE_UP[module.NAME](), kind)
    assert invoke("--check").exit_code == 1
    assert "not measured" not in invoke().output
    assert "CUDA 13.0, Triton 3.6" in readme.read_text()
    assert "| square | 4096 x 4096 | 64 | 64 distinct | 16 | 1500.0 | 2.0% | 8.0 | 8.0 | 4.0 |" in readme.read_text()
    assert "| decoding, 16 adapters | 64 x 1 |" in readme.read_text()
    assert "not measured" not in readme.read_text().lower()
    assert invoke("--check").exit_code == 0
