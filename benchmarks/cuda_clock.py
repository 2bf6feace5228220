"""Clocks of a CUDA device: of eager steps, and of steps replayed from CUDA graphs.

Before each step, outside what is timed, the L2 is emptied of what the arm uses. An eager step starts on an idle
device, so the Python before its first kernel counts. A captured step has its events inside the graph: neither the
launch of the graph nor what replay() does for random generators is timed, only the kernels and the gaps between them.
"""

import contextlib
import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.arms import Arm
from benchmarks.measure import Step, clear_gradients

Mark = Callable[[], None]
WARM_UP = 3  # runs before a capture: what is compiled or tuned on the first calls must not happen inside it


def l2_flush(device: torch.device) -> Callable[[], Tensor]:
    """Reads four times the L2's size. Writing would leave dirty lines, which the next step would pay for."""
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
    total = torch.empty((), device=device)
    return lambda: torch.sum(buffer, dim=0, out=total)


def _since_first(events: list[torch.cuda.Event]) -> tuple[float, ...]:
    return tuple(events[0].elapsed_time(event) for event in events[1:])


def eager(body: Callable[[Mark], object]) -> tuple[float, ...]:
    """Runs `body`; the ms from its first mark to each later one."""
    events = []

    def mark():
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    body(mark)
    torch.cuda.synchronize()
    return _since_first(events)


@contextlib.contextmanager
def _synchronising_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Graph:
    """A body in a CUDA graph; a call replays it and gives the ms from its first mark to each later one.

    Raises what the body raises where it waits for the device. That is found before the capture: one that fails
    half-way leaves PyTorch's random generator and allocator unusable for the arms that follow.
    """

    def __init__(self, body: Callable[[Mark], object], stream: torch.cuda.Stream):
        self._events = []
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                body(lambda: None)
            with _synchronising_is_an_error():
                body(lambda: None)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, stream=stream):
            body(self._mark)

    def _mark(self) -> None:
        # external: recorded anew by every replay, instead of ordering the nodes of the graph
        self._events.append(torch.cuda.Event(enable_timing=True, external=True))
        self._events[-1].record()

    def __call__(self) -> tuple[float, ...]:
        self._graph.replay()
        torch.cuda.synchronize()
        return _since_first(self._events)


def eager_clock(x: Tensor, dy: Tensor) -> Callable[[Arm], Step]:
    """Times a training step of an arm as users run it."""
    flush = l2_flush(x.device)

    def step(arm: Arm) -> Step:
        def body(mark):
            mark()
            y = arm.call(x)
            mark()
            y.backward(dy)
            mark()

        clear_gradients(arm, x)
        flush()
        torch.cuda.synchronize()
        return eager(body)

    return step


def graph_clock(x: Tensor, dy: Tensor) -> Callable[[Arm], Step]:
    """Times a training step of an arm from a graph, which is captured when the arm is first met.

    Of an arm with layers behind it, that of one of them: all forwards, then all backwards, in one graph.
    """
    flush = l2_flush(x.device)
    stream = torch.cuda.Stream(x.device)
    gc.collect()  # autograd nodes of eager steps, held by a cycle, would bring their own stream into the capture
    graphs: dict[Arm, Graph] = {}

    def capture(arm: Arm) -> Graph:
        layers = (arm, *arm.behind)
        wanted = [[t for t in (x, *layer.parameters) if t.requires_grad] for layer in layers]

        def body(mark):
            mark()
            ys = [layer.call(x) for layer in layers]
            mark()
            # not backward(): gradients that outlive the capture would be accumulated into by the next one
            for y, leaves in zip(ys, wanted, strict=True):
                torch.autograd.grad(y, leaves, dy)
            mark()

        for layer in layers:
            clear_gradients(layer, x)
        return Graph(body, stream)

    def step(arm: Arm) -> Step:
        if arm not in graphs:
            graphs[arm] = capture(arm)
        flush()
        return tuple(ms / (1 + len(arm.behind)) for ms in graphs[arm]())

    return step
