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


def pytest_sessionfinish(session):
    """A worker of pytest-xdist, where that is used, hands its counts to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["samples"] = [(*place, count) for place, count in _RUN.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for *place, count in getattr(node, "workeroutput", {}).get("samples", []):
        _RUN[tuple(place)] += count


def pytest_terminal_summary(terminalreporter):
    if not _RUN:
        return
    for row in backends.describe():
        name = f"{row['name']} on {row['device']}"
        reason = f": {row['reason']}" if row["reason"] else ""
        terminalreporter.write_line(f"{name}: {_RUN[row['name'], row['device']]} samples run{reason}")
