"""One fixture and one aloud count: which backend ran how many samples, and why another ran none."""

from collections import Counter

import pytest
import torch

from peft_kernels import backends

_RUN = Counter()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def count_sample():
    """Called by a test that ran one sample on a backend; the counts are printed at the end of the run."""
    return lambda backend: _RUN.update([backend])


def pytest_terminal_summary(terminalreporter):
    if not _RUN:
        return
    for row in backends.describe():
        name = f"{row['name']} on {row['device']}"
        reason = f": {row['reason']}" if row["reason"] else ""
        terminalreporter.write_line(f"{name}: {_RUN[row['name'], row['device']]} samples run{reason}")
