"""How the tests of a GPU call an operator: captured in a graph, on another stream, where nothing may wait."""

from contextlib import contextmanager

import torch


def same(one, other):
    return all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


def captured(run):
    """A graph of `run`, and what it returned in there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a library sets up at its first call must not be captured
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def assert_replays(run, change):
    """A graph of `run` gives what it gives now, and after `change()`, which writes other inputs, what it gives then."""
    graph, result = captured(run)
    graph.replay()
    before = {name: out.clone() for name, out in result.items()}
    assert same(before, run())
    change()
    graph.replay()
    assert same(result, run()) and not same(result, before)


def on_another_stream(run, x):
    """What `run` returns on a stream where x is written late."""
    right = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.zero_()
        torch.cuda._sleep(50_000_000)  # work on a wrong stream would see the zeros
        x.copy_(right)
        got = run()
    torch.cuda.current_stream().wait_stream(stream)
    return got


def other_inputs(held):
    held["x"].neg_()
    held["seed"].fill_(1234)


@contextmanager
def nothing_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
