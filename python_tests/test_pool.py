"""AdapterPool and batched_lora_ together: random batches over a pool that changes, each row bit-equal to the row alone;
isolation of NaN, evicted slots and unused pages; pins and replacement; threads; every refusal leaves no trace."""

import math
import threading

import pytest
import torch

from peft_kernels import AdapterPool, Site, backends, registry, testing
from peft_kernels.ops.batched_lora import route

OP = registry.ops()["batched_lora_"]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BACKENDS = [pytest.param(name, id=name) for name in backends.linked("batched_lora_", "cpu")]
needs_cpu = pytest.mark.skipif("cpu" not in backends.linked("batched_lora_", "cpu"), reason="no CPU kernels here")
SITES = {"q": Site(40, 24), "v": Site(40, 33), "down": Site(24, 40)}


def factors(K, N, r, dtype=F32, biased=False):
    return torch.randn(r, K).to(dtype), torch.randn(N, r).to(dtype), 0.5, torch.randn(N).to(dtype) if biased else None


def adapter(sites=SITES, ranks=(3, 9, 0), **more):
    """An adapter with a rank for each site; 0: it does not touch the site."""
    return {n: factors(s.K, s.N, r, **more) for (n, s), r in zip(sites.items(), ranks, strict=True) if r}


def arguments(pool, sites, ids, x, y):
    """What the op takes for some sites of one x."""
    tables = [pool.tables(site) for site in sites]
    routed = route.reference(torch.as_tensor(ids, dtype=torch.int32), pool.slots)
    lists = ([getattr(t, name) for t in tables] for name in ("pages_out", "table", "scaling"))
    return dict(zip(("y", "x", "route", "pages_in"), (y, x, routed, tables[0].pages_in), strict=True)) | dict(
        zip(("pages_out", "table", "scaling"), lists, strict=True)
    )


def run(backend, pool, sites, ids, x, y):
    """y after the op; the y given keeps what it held."""
    out = OP.evaluate(*testing.operators(backend, OP), arguments(pool, sites, ids, x, y), [])
    return [out[f"y[{g}]"] for g in range(len(y))]


def same(a, b):
    """Equal bits; any NaN equals any other."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(bits(t.nan_to_num(7.0)) for t in (a, b)))


def bits(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


class Traffic:
    """Random batches on a changing pool, beside what each row of X makes of each slot when it is alone."""

    X = 24  # rows that batches are drawn from

    def __init__(self, K, N, dtype, pool_dtype, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.sites = {f"s{g}": Site(K, n) for g, n in enumerate(N)}
        self.pool = AdapterPool(self.sites, adapters=12, dtype=pool_dtype, max_rank=64)
        self.x = torch.randn(self.X, K, generator=self.random).to(dtype)
        self.y = [torch.randn(self.X, n, generator=self.random).to(dtype) for n in N]
        self.alone = [y.repeat(self.pool.slots + 1, 1, 1) for y in self.y]  # [slot or -1, row of X, n]
        self.forward = testing.operators("cpu", OP)[0]
        self.routes = [route.reference(torch.tensor([s], dtype=torch.int32), self.pool.slots)
                       for s in range(self.pool.slots)]  # fmt: skip
        self.versions = 0
        poison = {site: (torch.full((64, K), math.nan), torch.full((s.N, 64), math.nan), 1.0, None)
                  for site, s in self.sites.items()}  # fmt: skip
        self.pool.add("poison", poison, allow_nonfinite=True)
        self.pool.remove("poison")  # its pages stay full of NaN until others take them

    def pick(self, *values):
        return values[self.below(len(values))]

    def below(self, n):
        return int(torch.randint(n, (), generator=self.random))

    def change(self):
        """Adds, replaces or removes one adapter, and runs each row of X alone on a new one."""
        pool, name = self.pool, f"a{self.below(16)}"
        if (name in pool.names() and self.below(3) == 0) or (len(pool) == pool.adapters and name not in pool.names()):
            victim = name if name in pool.names() else pool.names()[self.below(len(pool))]
            slot = pool.slot(victim)
            pool.remove(victim)
            for alone, y in zip(self.alone, self.y, strict=True):
                alone[slot] = y  # an evicted slot adds nothing
            return
        ranks = [self.pick(0, 1, 2, 4, 7, 8, 9, 16, 33, 64) for _ in self.sites]
        tensors = adapter(self.sites, ranks, biased=self.below(3) == 0)
        if not tensors:
            return
        broken = self.below(20) == 0  # NaN in one element of one factor
        if broken:
            next(iter(tensors.values()))[0][0, 1] = math.nan
        before = pool.slot(name) if name in pool.names() else None
        slot = pool.add(name, tensors, replace=True, allow_nonfinite=broken)
        for alone, y in zip(self.alone, self.y, strict=True):
            if before is not None:
                alone[before] = y
        self.versions += 1
        self.run_alone(slot)

    def run_alone(self, slot):
        whole = arguments(self.pool, self.sites, [slot] * self.X, self.x, self.y)
        if self.versions % 4 == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # on a busy machine the reference's many small products wait for a second thread
            try:
                testing.assert_matches_oracle(OP, whole, self.forward, None)
            finally:
                torch.set_num_threads(threads)
        rest = [whole[name] for name in ("pages_in", "pages_out", "table", "scaling")]
        for alone, y in zip(self.alone, self.y, strict=True):
            alone[slot] = y
        for i in range(self.X):
            self.forward([a[slot, i : i + 1] for a in self.alone], self.x[i : i + 1], self.routes[slot], *rest)

    def batch(self):
        """One batch of rows of X, with slots of one kind of popularity; every row as it was alone."""
        M, slots = self.pick(1, 2, 5, 16, 17, 33, 40), self.pool.slots
        rows = torch.randint(self.X, (M,), generator=self.random)
        kind = self.pick("identical", "distinct", "uniform", "zipf", "none")
        if kind == "identical":
            ids = torch.full((M,), self.below(slots))
        elif kind == "distinct":
            ids = torch.randperm(slots, generator=self.random).repeat(-(-M // slots))[:M]
        elif kind == "uniform":
            ids = torch.randint(-3, slots + 3, (M,), generator=self.random)  # out of range: as none
        else:
            weight = 1 / torch.arange(1, slots + 1) ** 1.5
            ids = torch.multinomial(weight, M, replacement=True, generator=self.random)
            if kind == "none":
                ids[torch.rand(M, generator=self.random) < 0.5] = -1
        out = run("cpu", self.pool, self.sites, ids, self.x[rows], [y[rows] for y in self.y])
        ids = torch.where((ids >= 0) & (ids < slots), ids, slots)
        for got, alone in zip(out, self.alone, strict=True):
            assert same(got, alone[ids, rows]), (kind, M)


@needs_cpu
@pytest.mark.parametrize("dtype,pool_dtype,K,N,batches", [
    pytest.param(F32, F32, 40, (24, 33), 4000, id="fp32"),
    pytest.param(BF16, BF16, 40, (24, 33), 3000, id="bf16"),
    pytest.param(BF16, F32, 19, (70,), 1000, id="bf16-fp32"),
    pytest.param(F16, F16, 19, (70,), 1000, id="fp16"),
    pytest.param(F32, F32, 1030, (530,), 500, id="chunks-fp32"),
    pytest.param(BF16, BF16, 1030, (530,), 500, id="chunks-bf16"),
])  # fmt: skip
def test_random_batches_on_a_changing_pool(dtype, pool_dtype, K, N, batches):
    traffic = Traffic(K, N, dtype, pool_dtype, seed=batches + K)
    for i in range(batches):
        if i % 10 == 0:
            traffic.change()
        traffic.batch()
    assert traffic.versions > batches / 20


# -- isolation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_rows_get_identical_bits(backend):
    pool = AdapterPool(SITES, adapters=4, dtype=BF16)
    slots = [pool.add(f"a{i}", adapter(ranks=(8, 17, 1))) for i in range(3)]
    x = torch.randn(1, 40).to(BF16).expand(45, -1)
    ids = torch.tensor([slots[i * i % 3] for i in range(45)])
    for out in run(backend, pool, ("q", "v"), ids, x, [torch.ones(45, n, dtype=BF16) for n in (24, 33)]):
        for slot in slots:
            rows = out[ids == slot]
            assert same(rows, rows[:1].expand_as(rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_adapter_stays_in_its_rows(backend):
    pool = AdapterPool(SITES)
    good = pool.add("good", adapter())
    x, y, ids = torch.randn(9, 40), [torch.randn(9, 24)], [good] * 9
    clean = run(backend, pool, ("q",), ids, x, y)[0]
    tensors = adapter()
    tensors["q"][1].fill_(math.inf)
    bad = pool.add("bad", tensors, allow_nonfinite=True)
    ids[2] = ids[7] = bad
    dirty = run(backend, pool, ("q",), ids, x, y)[0]
    for row in range(9):
        assert not dirty[row].isfinite().any() if row in (2, 7) else same(dirty[row], clean[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_evicted_slots_and_foreign_ids_add_nothing(backend):
    pool = AdapterPool(SITES, adapters=3)
    slot = pool.add("gone", adapter())
    kept = pool.add("kept", adapter())
    x, y = torch.randn(5, 40), [torch.randn(5, 24)]
    ids = [slot, kept, pool.slots, -2, 2**31 - 1]
    before = run(backend, pool, ("q",), ids, x, y)[0]
    pool.remove("gone")
    after = run(backend, pool, ("q",), ids, x, y)[0]
    assert same(after[1], before[1]) and not same(before[0], y[0][0])
    assert same(after[[0, 2, 3, 4]], y[0][[0, 2, 3, 4]])


@needs_cpu
def test_numbers_inside_route_and_table_are_checked():
    pool = AdapterPool(SITES, adapters=3)
    slot = pool.add("a", adapter())
    for name, index, value, text in [
        ("route", 3, 4, "route must be made for 5 rows and 4 adapters, got 4 and 4"),
        ("route", 13, 9, "route names row 9 twice or out of range"),
        ("table", (slot, 0), 100, "table[0] must have ranks from 0 to"),
        ("table", (slot, 1), 10**6, "table[0] must have bias rows from -1"),
        ("table", (slot, 2), -1, "table[0] must name pages from 0"),
    ]:
        call = arguments(pool, ("q",), [slot] * 5, torch.randn(5, 40), [torch.zeros(5, 24)])
        call["table"] = [call["table"][0].clone()]
        (call["table"][0] if name == "table" else call["route"])[index] = value
        with pytest.raises(RuntimeError) as caught:
            testing.operators("cpu", OP)[0](*call.values())
        assert text in str(caught.value)
        assert not call["y"][0].any()


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


def test_a_bias_fits_beside_any_rank():
    pool, x = AdapterPool({"q": Site(40, 24)}), torch.randn(2, 40)
    for r in (1, 7, 8, 9, 16):
        a, b, scaling, bias = tensors = factors(40, 24, r, biased=True)
        slot = pool.add("a", {"q": tensors}, replace=True)
        (y,) = run("reference", pool, ("q",), [slot, -1], x, [torch.zeros(2, 24)])
        torch.testing.assert_close(y[0], scaling * (x[0] @ a.mT @ b.mT + bias))


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
        tensors = adapter(biased=True)
        parts = dict(zip(("a", "b", "scaling", "bias"), tensors[site], strict=True))
        return tensors | {site: tuple((parts | {n: change(parts[n]) for n, change in changes.items()}).values())}

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
    ("rank-65", changed(a=lambda a: a.new_zeros(65, 40)), ValueError, "must have a rank r from 1 to 64, got 65"),
    ("ranks", changed(b=lambda b: b[:, 1:]), ValueError, "must have shape [out_features=24, r=3], got [24, 2]"),
    ("bias-shape", changed(bias=lambda b: b[1:]), ValueError, "must have shape [out_features=24], got [23]"),
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
        "must have a tuple (lora_A, lora_B, scaling, lora_bias)",
    ),
    ("dora", lambda: {"q.lora_magnitude_vector": ()}, ValueError, "DoRA is not supported"),
    ("embedding", lambda: {"wte.lora_embedding_A": ()}, ValueError, "LoRA on an embedding is not supported"),
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
    with pytest.raises(RuntimeError, match="full: it has all of its 1 adapters"):
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
