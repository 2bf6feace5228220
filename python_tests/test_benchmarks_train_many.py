"""The benchmark of training many adapters at once: its arms, rows and table. Nothing here asserts a time."""

import dataclasses
import math

import pytest
import torch
from benchmark_rows import trained_rows

from benchmarks import record, report, train_many

pytest.importorskip("peft")

CPU = torch.device("cpu")
SMALL = train_many.Cell(torch.float32, 64, 96, 1, 3, 2, 8, 4)


def a_run():
    return train_many.Run(CPU, 2, 0.0, record.provenance(CPU))


def test_the_grid():
    axes = {(cell.adapters, cell.rows) for cell in train_many.cells("cpu")}
    assert axes == {(adapters, rows) for adapters in train_many.ADAPTERS for rows in train_many.ROWS}


def test_the_arms_train_the_same_in_fp64():
    found = []
    for patched, step in ((False, "one_after_another"), (True, "one_after_another"), (True, "together")):
        problem = train_many.Problem(dataclasses.replace(SMALL, dtype=torch.float64), CPU, patched)
        before = {n: p.detach().clone() for n, p in problem.model.named_parameters() if "lora_B" in n}
        problem.model.set_requires_grad(problem.cell.names)
        for _ in range(2):
            assert getattr(problem, step)() > 0
        found.append({n: p.detach() for n, p in problem.model.named_parameters() if "lora_" in n})
        assert all(not torch.equal(found[-1][n], p) for n, p in before.items())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_cell_has_a_row_for_every_arm():
    rows = train_many.time_cell(SMALL, train_many.ARMS, a_run())
    by_arm = {row.arm: row for row in rows}
    assert list(by_arm) == ["peft", "peft_again", "alone", "together", "peft_mixed"]
    assert "adapter_names" in by_arm["peft_mixed"].not_timed and math.isnan(by_arm["peft_mixed"].ratio_p50)
    together = by_arm["together"]
    assert (together.adapters, together.rows, together.tokens, together.rounds) == (3, 2, 8, 2)
    assert together.tokens_per_s == pytest.approx(1e3 * 48 / together.ms_p50)
    assert by_arm["peft"].ratio_p50 == 1
    said = train_many.described(SMALL, rows, 1)
    assert "not timed: ValueError" in said and "tokens/s" in said


def test_the_table(tmp_path):
    table = report.module_markdown(train_many, trained_rows(), tmp_path / "a.csv")
    assert "| float32 | 16 | 4 x 64 | 1.5 | 2.0% | 0.50 | **0.50** |" in table
    assert "2 Llama layers, d = 1024, r = 16" in table
