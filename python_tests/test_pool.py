"""AdapterPool: slots, memory, pins and replacement, threads; every refusal leaves no trace."""

import itertools
import math
import threading

import pytest
import torch
from pools import BACKENDS, BF16, F16, SITES, adapter, factors, needs_cpu, run, same

from peft_kernels import AdapterPool, Site, SiteAdapter
from peft_kernels.ops.common.activations import ACTIVATIONS

# -- the pool's life --------------------------------------------------------------------------------------------------


def test_slots_names_and_ids():
    pool = AdapterPool(SITES, adapters=2)
    first, second = pool.add("a", adapter()), pool.add("b.1", adapter())
    assert pool.names() == ["a", "b.1"] and len(pool) == 2 and pool.slot("b.1") == second != first
    ids = pool.ids(["b.1", None, "a"])
    assert ids.dtype is torch.int32 and ids.tolist() == [second, -1, first]
    pool.remove("a")
    assert pool.names() == ["b.1"] and len(pool) == 1
    for call in (pool.slot, pool.remove, lambda name: pool.ids([name]), lambda name: pool.pin(name).__enter__()):
        with pytest.raises(KeyError, match="no adapter 'a' in this pool"):
            call("a")
    with pytest.raises(KeyError, match=r"no adapter 'a' in this pool; it has 'b\.1'"):
        pool.remove("a")
    with pytest.raises(KeyError, match=r"no adapter 'b\.2' in this pool; did you mean 'b\.1'"):
        pool.remove("b.2")
    assert repr(pool).startswith(f"AdapterPool(1 of at most 2, {len(SITES)} sites, torch.float32 on cpu, ")
    with pytest.raises(KeyError, match="no site 'qq' in this pool; did you mean 'q'"):
        pool.tables("qq")


def test_memory_is_true_ranks_and_is_used_again():
    pool = AdapterPool(SITES, adapters=4)
    empty = pool.nbytes
    pool.add("a", adapter(ranks=(9, 0, 0)))
    assert pool.nbytes == empty + 4 * 2 * 8 * (40 + 24) + 4 * 2 * pool.slots  # two pages each, and one more column each
    pool.remove("a")
    grown, growths = pool.nbytes, pool.growths
    for i in range(50):
        pool.add(f"b{i}", adapter(ranks=(9, 0, 0)))
        pool.remove(f"b{i}")
    assert (pool.nbytes, pool.growths) == (grown, growths)
    pool.add("c", adapter(ranks=(9, 1, 1)))
    assert pool.growths > growths


def test_a_bias_and_a_gain_fit_beside_any_rank():
    pool, x, before = AdapterPool({"q": Site(40, 24)}), torch.randn(2, 40), torch.randn(2, 24)
    for r, biased, gained in itertools.product((1, 6, 7, 8, 9, 16), (False, True), (False, True)):
        tensors = factors(40, 24, r, biased=biased, gained=gained)
        slot = pool.add("a", {"q": tensors}, replace=True)
        (y,) = run("reference", pool, ("q",), [slot, -1], x, [before])
        a, b, scaling, bias, gain, *_ = SiteAdapter(*tensors)
        expected = (gain if gained else 1) * (before[0] + scaling * (x[0] @ a.mT @ b.mT))
        torch.testing.assert_close(y[0], expected + (scaling * bias if biased else 0))
        assert same(y[1], before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dora_is_a_gain_and_a_bias(backend):
    """PEFT: magnitude (x W^T + s x A^T B^T) / ||W + s B A|| + b, where b is the layer's own bias."""
    x, W, b, magnitude = torch.randn(5, 40), torch.randn(24, 40), torch.randn(24), 4 + torch.rand(24)
    A, B, s, _ = factors(40, 24, 3)
    gain = magnitude / (W + s * B @ A).norm(dim=1)
    pool = AdapterPool(SITES)
    slot = pool.add("dora", {"q": SiteAdapter(A, B, s, (1 - gain) * b / s, gain)})
    (y,) = run(backend, pool, ("q",), [slot] * 5, x, [x @ W.mT + b])
    torch.testing.assert_close(y, gain * (x @ W.mT + s * x @ A.mT @ B.mT) + b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gain_of_zero_leaves_the_bias(backend):
    pool = AdapterPool(SITES)
    a, b, s, bias = factors(40, 24, 3, biased=True)
    slot = pool.add("a", {"q": SiteAdapter(a, b, s, bias, torch.zeros(24))})
    (y,) = run(backend, pool, ("q",), [slot, -1], torch.randn(2, 40), [torch.randn(2, 24)])
    assert same(y[0], s * bias)


def test_a_gain_is_kept_as_its_distance_from_one():
    pool, gain = AdapterPool(SITES, dtype=BF16), 1 + torch.linspace(-0.01, 0.01, 24)
    slot = pool.add("a", {"q": SiteAdapter(*factors(40, 24, 3)[:2], gain=gain)})
    tables = pool.tables("q")
    assert same(tables.pages_out.flatten(0, 1)[tables.table[slot, 2]], (gain - 1).to(BF16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bottleneck_beside_lora_in_one_batch(backend):
    pool, x, y = AdapterPool(SITES), torch.randn(3, 40), torch.randn(3, 24)
    lora = factors(40, 24, 9)
    slot = pool.add("lora", {"q": lora})
    alone = run(backend, pool, ("q",), [slot], x[:1], [y[:1]])[0]
    adapters = {f: factors(40, 24, 11, f=f, biased=True, down_biased=True) for f in ACTIVATIONS}
    for f, entry in adapters.items():
        other = pool.add(f, {"q": entry})
        (out,) = run(backend, pool, ("q",), [slot, other, -1], x, [y])
        a, b, s, bias, _, _, down_bias = entry
        torch.testing.assert_close(out[1], y[1] + s * (ACTIVATIONS[f](x[1] @ a.mT + down_bias) @ b.mT + bias))
        assert same(out[0], alone[0]) and same(out[2], y[2])  # though the site has down biases by now
    assert pool.tables("q").down_bias.shape == (pool.slots, 16)


def test_room_for_down_biases_is_made_once():
    pool = AdapterPool(SITES, adapters=4)
    pool.add("a", adapter())
    assert pool.tables("q").down_bias.shape == (0,)
    pool.reserve(4, 9, ("q", "v"), down_bias=True)
    growths = pool.growths
    pool.add("b", adapter(ranks=(9, 9, 0), f="relu", down_biased=True))
    slot = pool.add("c", adapter(ranks=(8, 8, 0)))
    assert pool.growths == growths and pool.tables("down").down_bias.shape == (0,)
    assert not pool.tables("q").down_bias[slot, :8].any()
    biases = pool.tables("q").down_bias.clone()
    pool.add("d", adapter(ranks=(33, 1, 0)))
    assert same(pool.tables("q").down_bias[:, :16], biases) and pool.growths > growths


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_may_leave_out_every_site_of_a_width(backend):
    pool, y = AdapterPool(SITES), [torch.randn(3, 24), torch.randn(3, 33)]
    slot = pool.add("a", {"v": factors(40, 33, 3)})  # there is no page of width 24
    out = run(backend, pool, ("q", "v"), [slot] * 3, torch.randn(3, 40), y)
    assert same(out[0], y[0]) and not same(out[1], y[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_replacement_keeps_what_is_pinned(backend):
    pool = AdapterPool(SITES, adapters=2)
    pool.add("other", adapter())
    pool.add("a", adapter(ranks=(20, 5, 0)))
    x, y = torch.randn(3, 40), [torch.zeros(3, 24)]
    with pool.pin("a") as slot:
        with pool.pin("a"):
            before = run(backend, pool, ("q",), [slot] * 3, x, y)
        newer = pool.add("a", adapter(ranks=(2, 2, 2)), replace=True)  # full: the spare slot takes it
        assert newer != slot and pool.slot("a") == newer and len(pool) == 2
        with pytest.raises(RuntimeError, match="every free slot holds an old version that is still pinned"):
            pool.add("a", adapter(), replace=True)
        pool.remove("other")
        pool.add("another", adapter(ranks=(40, 40, 40)))  # grows everything
        assert same(run(backend, pool, ("q",), [slot] * 3, x, y)[0], before[0])
        assert not same(run(backend, pool, ("q",), [newer] * 3, x, y)[0], before[0])
    assert same(run(backend, pool, ("q",), [slot] * 3, x, y)[0], y[0])
    with pool.pin("a") as slot:
        pool.remove("a")
        assert run(backend, pool, ("q",), [slot] * 3, x, y)[0].any() and "a" not in pool.names()
    assert not run(backend, pool, ("q",), [slot] * 3, x, y)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_may_be_on_or_off_at_any_time(backend):
    x, y = torch.randn(3, 40), [torch.zeros(3, 24)]
    for first in (True, False):
        with torch.inference_mode(first):
            pool = AdapterPool(SITES, adapters=4)
            pool.add("a", {"q": factors(40, 24, 3)})
        with torch.inference_mode(not first):
            slot = pool.add("b", {"q": factors(40, 24, 20)})  # grows
            out = run(backend, pool, ("q",), [slot] * 3, x, y)[0]
        a, b, *rest = factors(40, 24, 60)
        pool.add("c", {"q": (a.requires_grad_(), b.requires_grad_(), *rest)})
        pool.remove("a")
        assert same(run(backend, pool, ("q",), [slot] * 3, x, y)[0], out) and out.any()


def test_an_exception_ends_a_pin():
    pool = AdapterPool(SITES, adapters=1)
    pool.add("a", adapter())
    for _ in range(20):  # were the pins kept, the old versions would fill the pool
        with pytest.raises(ZeroDivisionError), pool.pin("a"):
            pool.add("a", adapter(), replace=True)
            raise ZeroDivisionError
    assert len(pool._free) == 1 and not any(pool._pins.values())


@needs_cpu
def test_eight_threads_on_a_pool_that_changes():
    pool = AdapterPool(SITES, adapters=24)
    names = [f"a{i}" for i in range(10)]
    for i, name in enumerate(names):
        pool.add(name, adapter(ranks=(1 + 3 * i, 16, 0)))
    x, y = torch.randn(10, 40), [torch.zeros(10, 24), torch.zeros(10, 33)]
    alone = [run("cpu", pool, ("q", "v"), pool.ids([n] * 10), x, y) for n in names]
    wrong, stop = [], threading.Event()

    def serve(seed):
        random = torch.Generator().manual_seed(seed)
        for _ in range(100):
            chosen = torch.randint(10, (10,), generator=random).tolist()
            out = run("cpu", pool, ("q", "v"), pool.ids([names[c] for c in chosen]), x, y)
            for row, c in enumerate(chosen):
                if not all(same(got[row], alone[c][g][row]) for g, got in enumerate(out)):
                    wrong.append((seed, row))

    def churn():
        i = 0
        while not stop.is_set():
            pool.add(f"churn{i % 9}", adapter(ranks=(1 + i % 64, 5, 9)), replace=True)
            if i % 3 == 0:
                pool.remove(f"churn{i % 9}")
            i += 1

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
    writer = threading.Thread(target=churn)
    for thread in (writer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    writer.join()
    assert not wrong


# -- refusals ---------------------------------------------------------------------------------------------------------


def changed(site="q", **changes):
    """An adapter with one part of one site made wrong."""

    def make():
        tensors = adapter(biased=True, gained=True, f="gelu", down_biased=True)
        parts = dict(zip(("a", "b", "scaling", "bias", "gain", "f", "down_bias"), tensors[site], strict=True))
        return tensors | {site: SiteAdapter(*(parts | {n: change(parts[n]) for n, change in changes.items()}).values())}

    return make


def spoiled(value):
    def change(tensor):
        tensor.view(-1)[1:4] = value
        return tensor

    return change


REFUSED = [
    ("nan", changed(a=spoiled(math.nan)), ValueError, "lora_A of site 'q' has 3 values of 120 that are not finite"),
    ("inf", changed("v", b=spoiled(math.inf)), ValueError, "lora_B of site 'v' has 3 values of 297 that are not"),
    ("bias-nan", changed(bias=spoiled(math.nan)), ValueError, "lora_bias of site 'q' has 3 values of 24"),
    ("overflow", changed(a=spoiled(1e6)), ValueError, "not finite in float16; allow_nonfinite=True takes them"),
    ("features", changed(a=lambda a: a[:, 1:]), ValueError, "must have shape [r, in_features=40], got [3, 39]"),
    ("rank-0", changed(a=lambda a: a[:0]), ValueError, "must have a rank r from 1 to 64, got 0"),
    (
        "rank-65",
        changed(a=lambda a: a.new_zeros(65, 40)),
        ValueError,
        "from 1 to 64, got 65; a pool that is made with max_rank=65 takes it",
    ),
    ("ranks", changed(b=lambda b: b[:, 1:]), ValueError, "must have shape [out_features=24, r=3], got [24, 2]"),
    ("bias-shape", changed(bias=lambda b: b[1:]), ValueError, "must have shape [out_features=24], got [23]"),
    ("gain-nan", changed(gain=spoiled(math.nan)), ValueError, "gain of site 'q' has 3 values of 24 that are not"),
    ("gain-overflow", changed(gain=spoiled(1e6)), ValueError, "gain of site 'q' has 3 values of 24 that are not"),
    ("gain-shape", changed(gain=lambda g: g[1:]), ValueError, "must have shape [out_features=24], got [23]"),
    ("gain-number", changed(gain=lambda g: 1.5), TypeError, "gain of site 'q' must be a Tensor, got float"),
    ("down-bias-nan", changed(down_bias=spoiled(math.nan)), ValueError, "down_bias of site 'q' has 2 values of 3"),
    ("down-bias-shape", changed(down_bias=lambda a: a[1:]), ValueError, "must have shape [r=3], got [2]"),
    (
        "activation",
        changed(f=lambda f: "mish"),
        ValueError,
        "activation of site 'q' must be one of identity, relu, gelu",
    ),
    ("activation-none", changed(f=lambda f: None), ValueError, "silu, tanh, sigmoid, leaky_relu, got None"),
    ("integers", changed(a=lambda a: a.int()), TypeError, "must be a dense tensor of floats, got strided int32"),
    ("sparse", changed(a=lambda a: a.to_sparse()), TypeError, "must be a dense tensor of floats"),
    ("meta", changed(b=lambda b: b.to("meta")), TypeError, "must be a dense tensor of floats, got meta"),
    ("no-tensor", changed(b=lambda b: b.tolist()), TypeError, "lora_B of site 'q' must be a Tensor, got list"),
    ("scaling-nan", changed(scaling=lambda s: math.nan), ValueError, "scaling of site 'q' must be finite"),
    ("scaling-large", changed(scaling=lambda s: 1e39), ValueError, "must be finite in float32, got 1e+39"),
    ("scaling-text", changed(scaling=lambda s: "16"), TypeError, "scaling of site 'q' must be a number, got str"),
    ("site", lambda: {"vv": factors(40, 33, 2)}, ValueError, "no site 'vv' in this model; did you mean 'v'?"),
    ("nothing", dict, ValueError, "must touch at least one site, got none"),
    (
        "pair",
        lambda: {"q": factors(40, 24, 2)[:2]},
        TypeError,
        "must have a SiteAdapter or a tuple (lora_A, lora_B, scaling, lora_bias) or with a gain behind, got tuple of 2",
    ),
    ("dora", lambda: {"q.lora_magnitude_vector": ()}, ValueError, "it goes into the gain of its site's"),
    ("embedding", lambda: {"wte.lora_embedding_A": ()}, ValueError, "lora_embedding_A and _B are not sites"),
    ("whole-module", lambda: {"modules_to_save.head": ()}, ValueError, "modules_to_save is not supported"),
]


def state(pool):
    tables = [t.clone() for site in SITES for t in pool.tables(site)]
    return pool.names(), pool.nbytes, pool.growths, list(pool._free), tables


def unchanged(pool, before):
    after = state(pool)
    return after[:-1] == before[:-1] and all(torch.equal(*pair) for pair in zip(after[-1], before[-1], strict=True))


@pytest.mark.parametrize("make,error,text", [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
@pytest.mark.parametrize("replace", [False, True])
def test_a_refused_adapter_leaves_no_trace(make, error, text, replace):
    pool = AdapterPool(SITES, adapters=3, dtype=F16, max_rank=64)
    pool.add("a", adapter())
    before = state(pool)
    with pytest.raises(error) as caught:
        pool.add("a" if replace else "b", make(), replace=replace)
    assert str(caught.value).startswith("AdapterPool: ") and text in str(caught.value)
    assert unchanged(pool, before)


@pytest.mark.parametrize("name", ["", ".a", "a/b", "a..b", "../a", "a b", "x" * 65, "ü", "a\n", "__base__", 3])
def test_names_that_are_refused(name):
    with pytest.raises((ValueError, TypeError), match=r"AdapterPool: (a name must|the name '__base__' is reserved)"):
        AdapterPool(SITES).add(name, adapter())


def test_a_taken_name_and_a_full_pool_are_refused():
    pool = AdapterPool(SITES, adapters=1)
    pool.add("a", adapter())
    before = state(pool)
    with pytest.raises(ValueError, match="there is an adapter 'a'; replace=True makes a new version of it"):
        pool.add("a", adapter())
    with pytest.raises(RuntimeError, match="full: it has 1 of at most 1; remove one"):
        pool.add("b", adapter())
    assert unchanged(pool, before)
    pool.add("a", adapter(), replace=True)


def test_failing_half_way_gives_everything_back(monkeypatch):
    pool = AdapterPool(SITES, adapters=2)
    pool.add("a", adapter(ranks=(1, 1, 1)))
    slots, held = len(pool._free), {w: len(s._free) - len(s.pages) for w, s in pool._stores.items()}
    publish, calls = type(pool._tables["q"]).publish, []

    def fail(table, *row):
        calls.append(row)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        publish(table, *row)

    monkeypatch.setattr(type(pool._tables["q"]), "publish", fail)
    with pytest.raises(MemoryError):
        pool.add("b", adapter(ranks=(30, 30, 30)))
    assert pool.names() == ["a"] and len(pool._free) == slots
    assert {w: len(s._free) - len(s.pages) for w, s in pool._stores.items()} == held
    assert all(int(pool.tables(site).table[:, 0].count_nonzero()) == 1 for site in SITES)


@pytest.mark.parametrize("changes,error,text", [
    (dict(sites={}), ValueError, "at least one site"), (dict(adapters=0), ValueError, "adapters must be 1 or more"),
    (dict(max_rank=0), ValueError, "max_rank must be 1"), (dict(dtype=torch.int8), TypeError, "dtype must be float32"),
    (dict(sites={"q": Site(0, 4)}), ValueError, "site 'q' must have K and N of 1 or more"),
])  # fmt: skip
def test_a_pool_that_makes_no_sense_is_refused(changes, error, text):
    with pytest.raises(error, match=text):
        AdapterPool(**({"sites": SITES} | changes))
