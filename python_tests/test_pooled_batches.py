"""batched_lora_ on a pool: random batches while the pool changes, each row bit-equal to the row alone; NaN, evicted
slots and unused pages stay where they are; autograd is told; numbers that make no sense are refused."""

import contextlib
import math

import pytest
import torch
from pools import BACKENDS, BF16, F16, F32, OP, POOL_LISTS, SITES, adapter, arguments, needs_cpu, partly_over, run, same
from torch.autograd import forward_ad

from peft_kernels import AdapterPool, Site, testing
from peft_kernels.ops.batched_lora import route
from peft_kernels.ops.batched_lora.pooled_samples import PAIRS, problem
from peft_kernels.ops.common.activations import NAMES
from peft_kernels.ops.common.in_place import call_in_place


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
        tensors = adapter(self.sites, ranks, biased=self.below(3) == 0, gained=self.below(3) == 0,
                          f=self.pick(*["identity"] * 5, *NAMES), down_biased=self.below(4) == 0)  # fmt: skip
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
        rest = [whole[name] for name in ("pages_in", *POOL_LISTS)]
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


def with_activation(number):
    def plant(arguments):
        for table in arguments["table"]:
            table[:, 3] = number
        return {}

    return plant


MUTANTS = {  # by the sample that has to catch it
    "relu": ("f is ignored", with_activation(0)),
    "gelu": ("gelu's tanh form for gelu", with_activation(NAMES.index("gelu_tanh"))),
    "gelu_tanh": ("gelu for its tanh form", with_activation(NAMES.index("gelu"))),
    "leaky_relu": ("relu for leaky_relu", with_activation(NAMES.index("relu"))),
    "down-bias": ("a is forgotten", lambda a: {"down_bias": [t.new_empty(0) for t in a["down_bias"]]}),
    "mixed": ("a of another slot", lambda a: {"down_bias": [t.roll(1, 0) for t in a["down_bias"]]}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("id", MUTANTS)
def test_the_oracle_catches_what_is_planted(id, backend):
    (sample,) = (s for s in OP.samples() if s.id == id)
    forward = testing.operators(backend, OP)[0]
    names = list(sample.make("cpu", F32, F32))

    def planted(*values):
        arguments = dict(zip(names, values, strict=True))
        arguments["table"] = [table.clone() for table in arguments["table"]]
        forward(*(arguments | MUTANTS[id][1](arguments)).values())

    testing.assert_matches_oracle(OP, sample.make("cpu", F32, F32), forward, None)
    with pytest.raises(AssertionError):
        testing.assert_matches_oracle(OP, sample.make("cpu", F32, F32), planted, None)


def in_place(forward, arguments, places):
    """y where x is y[0]; `places` lays a matrix out."""
    x, others = places(arguments["x"]), [places(y) for y in arguments["y"][1:]]
    forward(*(arguments | {"x": x, "y": [x, *others]}).values())
    return [x, *others]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x_may_be_y(backend, pair):
    """An adapter behind a layer reads the layer's output: all of x before any y is written, of whichever slice."""
    forward = testing.operators(backend, OP)[0]
    layouts = (torch.clone, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]])
    for rows, K in ((37, 67), (1, 1100)):
        sizes = dict(N=(K, 131, K), ranks=((5, 20, 9), (0, 3, 1), (16, 0, 8)), activations=("gelu", "identity"))
        arguments = problem("cpu", *pair, rows=rows, K=K, ids=[i % 3 for i in range(rows)], **sizes)
        arguments["y"][0] = arguments["x"].clone()
        wanted = [y.clone() for y in arguments["y"]]
        forward(*(arguments | {"y": wanted}).values())
        for layout in layouts:
            for got, want in zip(in_place(forward, arguments, layout), wanted, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("shift", [(0, 8), (0, 3), (1, 0), (5, 16)], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x_may_lie_partly_over_y(backend, pair, shift):
    forward = testing.operators(backend, OP)[0]
    for rows in (37, 150):
        sizes = dict(N=(72, 24), ranks=((5, 3), (0, 20), (9, 1)), activations=("gelu", "identity"))
        arguments = problem("cpu", *pair, rows=rows, K=64, ids=[i % 3 for i in range(rows)], **sizes)
        results = []
        for together in (False, True):
            (x, y), (apart, _) = (partly_over(arguments["x"], arguments["y"][0], *shift) for _ in range(2))
            got = [y, arguments["y"][1].clone()]
            forward(*(arguments | {"x": x if together else apart, "y": got}).values())
            results.append(got)
        assert all(torch.equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_may_be_y_in_a_compiled_graph(backend):
    forward = testing.operators(backend, OP)[0]
    arguments = problem("cpu", F32, F32, rows=19, K=48, activations=("gelu", "identity"), down_biased=True)
    rest, weight = list(arguments.values())[2:], torch.randn(48, 48)

    def model(x):
        y = x @ weight
        forward([y], y, *rest)
        before = y.relu()
        view = y.view(-1, 48)
        forward([view], view, *rest)
        return before, y

    x = torch.randn(19, 48)
    for got, want in zip(torch.compile(model, fullgraph=True)(x), model(x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("part", ["lora_B", "gain", "down_bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_adapter_stays_in_its_rows(backend, part):
    pool = AdapterPool(SITES)
    good = pool.add("good", adapter())
    x, y, ids = torch.randn(9, 40), [torch.randn(9, 24)], [good] * 9
    clean = run(backend, pool, ("q",), ids, x, y)[0]
    tensors = adapter(gained=True, f="relu", down_biased=True)
    getattr(tensors["q"], part).fill_(math.inf if part == "lora_B" else math.nan)
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


def called(op, arguments):
    call_in_place(op, *arguments)


def directly(op, arguments):
    op(*arguments)


@pytest.mark.parametrize("call", [directly, called])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_needs_a_gradient_is_refused(backend, call):
    """By the operator itself, so that nothing which calls it loses one in silence."""
    forward, refusal = testing.operators(backend, OP)[0], "batched_lora_: writes into y and has no gradient; batched_"
    arguments = problem("cpu", F32, F32, N=(48, 24), ranks=((4, 3),) * 2, down_biased=True)
    leaves = [*arguments["y"], arguments["x"], arguments["pages_in"], *arguments["pages_out"], *arguments["scaling"]]
    before = [y.clone() for y in arguments["y"]]
    for leaf in [*leaves, *arguments["down_bias"]]:
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match=refusal):
            call(forward, arguments.values())
        leaf.requires_grad_(False)
    for i, name in ((1, "y"), (0, "pages_out"), (None, "x"), (None, "pages_in")):
        with forward_ad.dual_level(), torch.no_grad():
            primal = arguments[name] if i is None else arguments[name][i]
            dual = forward_ad.make_dual(primal, torch.ones_like(primal))
            dual = dual if i is None else [dual if j == i else t for j, t in enumerate(arguments[name])]
            with pytest.raises(NotImplementedError, match="batched_lora_: no forward-mode derivative"):
                call(forward, (arguments | {name: dual}).values())
    assert all(torch.equal(*pair) for pair in zip(arguments["y"], before, strict=True))


@pytest.mark.parametrize("call", [directly, called])
@pytest.mark.parametrize("guard", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_is_told(backend, guard, call):
    """Else a backward would read the sum where it saved y."""
    for g in range(2):
        arguments = problem("cpu", F32, F32, N=(48, 24), ranks=((4, 3),) * 2)
        y, expected = arguments["y"][g], [y.clone() for y in arguments["y"]]
        testing.operators(backend, OP)[0](expected, *list(arguments.values())[1:])
        loss, before = (torch.ones_like(y, requires_grad=True) * y).sum(), y._version
        with guard():
            call(testing.operators(backend, OP)[0], arguments.values())
        assert y._version > before and torch.equal(y, expected[g])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("call", [directly, called])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_inference_mode_nothing_has_a_version(backend, call):
    with torch.inference_mode():
        arguments = problem("cpu", F32, F32)
        before = arguments["y"][0].clone()
        call(testing.operators(backend, OP)[0], arguments.values())
    assert not torch.equal(arguments["y"][0], before)


@needs_cpu
def test_numbers_inside_route_and_table_are_checked():
    pool = AdapterPool(SITES, adapters=3)
    slot = pool.add("a", adapter())
    for name, index, value, text in [
        ("route", 3, 4, "route must be made for 5 rows and 4 adapters, got 4 and 4"),
        ("route", 13, 9, "route names row 9 twice or out of range"),
        ("table", (slot, 0), 100, "table[0] must have ranks from 0 to"),
        ("table", (slot, 1), 10**6, "table[0] must have bias rows from -1"),
        ("table", (slot, 2), 10**6, "table[0] must have gain rows from -1"),
        ("table", (slot, 3), 8, "table[0] must have activations from 0 to 7, got 8"),
        ("table", (slot, 3), -1, "table[0] must have activations from 0 to 7, got -1"),
        ("table", (slot, 4), -1, "table[0] must name pages from 0"),
    ]:
        call = arguments(pool, ("q",), [slot] * 5, torch.randn(5, 40), [torch.zeros(5, 24)])
        call["table"] = [call["table"][0].clone()]
        (call["table"][0] if name == "table" else call["route"])[index] = value
        with pytest.raises(RuntimeError) as caught:
            testing.operators("cpu", OP)[0](*call.values())
        assert text in str(caught.value)
        assert not call["y"][0].any()
