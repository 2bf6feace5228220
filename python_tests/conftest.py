"""One fixture and one aloud count: which backend ran how many samples, and why another ran none."""

from collections import Counter

import pytest
import torch

from peft_kernels import backends

_RUN = Counter()
_WHY_NONE = {}


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="I/N: of all tests the I-th and every N-th after it, I from 0")


def pytest_collection_modifyitems(config, items):
    index, count = map(int, config.getoption("--shard").split("/"))
    if not 0 <= index < count:
        raise pytest.UsageError(f"--shard I/N: I must lie in [0, N), got {config.getoption('--shard')}")
    items[:] = items[index::count]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def count_sample():
    """Called with (backend, device) by a test that ran samples; the counts are printed at the end of the run."""

    def count(backend, samples=1, reason=""):
        _RUN[backend] += samples
        if reason:
            _WHY_NONE[backend] = reason

    return count


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
    reasons = {(row["name"], row["device"]): row["reason"] for row in backends.describe()} | _WHY_NONE
    for backend in dict.fromkeys([*reasons, *_RUN]):
        reason = f": {reasons[backend]}" if reasons.get(backend) else ""
        terminalreporter.write_line(f"{backend[0]} on {backend[1]}: {_RUN[backend]} samples run{reason}")
