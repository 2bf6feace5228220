"""dora_linear against the paper's formula written out, mixed batches, and what dora_norm and dora_scale must keep.

Their samples, with opcheck, gradcheck and bad inputs, are in test_ops.py.
"""

import re

import pytest
import torch
from torch.testing import assert_close

import peft_kernels
from peft_kernels import backends
from peft_kernels.ops.lora_linear.dora_samples import norm_problem, norm_samples, scale_problem

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude", "lora_bias")
S = 1.5


def layer(dtype=F64, factors=None, *, rows=(3, 5), K=24, N=18, R=4, biased=True, lora_biased=True):
    """Every tensor of a layer by name; all want gradients."""
    factors = factors or dtype
    tensors = {
        "x": torch.randn(*rows, K),
        "weight": torch.randn(N, K) / K**0.5,
        "bias": torch.randn(N) if biased else None,
        "lora_A": torch.randn(R, K) / K**0.5,
        "lora_B": torch.randn(N, R) / R**0.5,
        "magnitude": torch.rand(N) + 0.5,
        "lora_bias": torch.randn(N) if lora_biased else None,
    }
    own = ("lora_A", "lora_B", "magnitude", "lora_bias")
    return {
        name: None if t is None else t.to(factors if name in own else dtype).requires_grad_()
        for name, t in tensors.items()
    }


def run(tensors, p=0.0, seed=None, norm=None):
    given = [tensors[name] for name in NAMES]
    options = dict(scaling=S, dropout_p=p, seed=seed, norm=norm)
    return peft_kernels.dora_linear(*given[:-1], lora_bias=given[-1], **options)


def dense_norm(t):
    return (t["weight"] + S * t["lora_B"] @ t["lora_A"]).detach().norm(dim=1)


def written_out(t, p=0.0, seed=None):
    """x W^T + b + (g - 1) d W^T + g s (d A^T B^T + b_B), d = drop(x)."""
    d = t["x"]
    if p:
        rows = d.numel() // d.shape[-1]
        mask = peft_kernels.lora_dropout_mask(seed, rows, d.shape[-1], p).view(d.shape)
        d = torch.where(mask, d * (65536 / round((1 - p) * 65536)), 0)
    gain = t["magnitude"] / dense_norm(t)
    low = d @ t["lora_A"].T @ t["lora_B"].T
    if t["lora_bias"] is not None:
        low = low + t["lora_bias"]
    y = t["x"] @ t["weight"].T + (gain - 1) * (d @ t["weight"].T) + gain * S * low
    return y if t["bias"] is None else y + t["bias"]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lora_biased", [False, True])
def test_the_formula_and_every_gradient(p, biased, lora_biased):
    tensors, seed = layer(biased=biased, lora_biased=lora_biased), peft_kernels.new_seed()
    leaves = [t for t in tensors.values() if t is not None]
    y, wanted = run(tensors, p, seed), written_out(tensors, p, seed)
    assert_close(y, wanted)
    dy = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    """The norm is a constant, so it is given."""
    tensors, seed = layer(rows=(4,), K=6, N=5, R=2), peft_kernels.new_seed()
    norm = dense_norm(tensors)
    assert torch.autograd.gradcheck(
        lambda *leaves: run(dict(zip(NAMES, leaves, strict=True)), p, seed, norm), tuple(tensors.values())
    )


@pytest.mark.parametrize("pair,p", [((F32, F32), 0.0), ((F32, F32), 0.1), ((BF16, F32), 0.0)], ids=str)
def test_compiled_without_a_break(pair, p):
    """In bf16 a compiled x - drop(x) is rounded less often, so dropout is compared in fp32."""
    tensors, seed = layer(*pair), peft_kernels.new_seed()
    leaves = list(tensors.values())
    eager = run(tensors, p, seed)
    compiled = torch.compile(run, fullgraph=True)(tensors, p, seed)
    assert_close(compiled, eager)
    dy = torch.randn_like(eager)
    assert_close(torch.autograd.grad(compiled, leaves, dy), torch.autograd.grad(eager, leaves, dy))


def test_a_layer_of_peft_gives_the_same():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(24, 18))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).base_model.model[0]
    x, name = torch.randn(7, 24), "default"
    magnitude = adapted.lora_magnitude_vector[name].weight
    factors = adapted.lora_A[name].weight, adapted.lora_B[name].weight
    base = adapted.get_base_layer()
    y = peft_kernels.dora_linear(x, base.weight, base.bias, *factors, magnitude, scaling=adapted.scaling[name])
    assert_close(y, adapted(x))


def test_a_given_norm_is_used():
    tensors = layer()
    norm = peft_kernels.dora_norm(tensors["weight"], tensors["lora_A"], tensors["lora_B"], S)
    assert torch.equal(run(tensors), run(tensors, norm=norm)) and not norm.requires_grad
    assert_close(run(tensors | {"bias": None}, norm=2 * norm), run(tensors | {"bias": None}) / 2)


def test_a_mixed_batch():
    """Each row as its own adapter's layer has it, with -1 as the layer alone; and the gradients of all magnitudes."""
    arguments = scale_problem("cpu", F64, F64, rows=(3, 7), N=10, biased=True, residual=True, adapters=4)
    z, magnitude, norm, bias, residual, ids = arguments.values()
    leaves = [t.requires_grad_() for t in (z, magnitude, bias, residual)]
    y = peft_kernels.dora_scale(**arguments)
    gain = torch.stack([magnitude[i] / norm[i] if i >= 0 else torch.ones_like(norm[0]) for i in ids.flatten().tolist()])
    wanted = residual + bias + gain.view(z.shape) * z
    assert_close(y, wanted)
    assert {-1, 0, 1, 2, 3} == set(ids.flatten().tolist())
    dy = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy))


@pytest.mark.parametrize("backend", backends.linked("dora_scale", "cpu"))
@pytest.mark.parametrize("outside", [-2, 3])
def test_ids_out_of_range_are_refused_in_words(backend, outside):
    namespace = getattr(torch.ops, f"peft_kernels_{backend}")
    arguments = scale_problem("cpu", F32, F32, adapters=3)
    arguments["ids"][5] = outside
    z, magnitude, norm, *_, ids = arguments.values()
    text = re.escape(f"ids must be -1 or lie in [0, 3), got {outside} (1 of 12 rows)")
    with pytest.raises((ValueError, RuntimeError), match=f"dora_scale: {text}"):
        namespace.dora_scale.default(*arguments.values())
    with pytest.raises((ValueError, RuntimeError), match=f"dora_scale_backward: {text}"):
        namespace.dora_scale_backward.default(z, z, magnitude, norm, ids, [True] * 3)


@pytest.mark.parametrize("backend", backends.linked("dora_scale", "cpu"))
@pytest.mark.parametrize(
    "text,changes",
    [
        ("needs must have 3 entries, got 2", {"needs": [True] * 2}),
        ("z must be given for the gradient of magnitude", {"z": None}),
        ("magnitude must be given for gradients of z or magnitude", {"magnitude": None}),
        ("z must have shape [12, 48], as dy, got [11, 48]", {"z": torch.zeros(11, 48)}),
        ("z must have dtype float32, as dy, got bfloat16", {"z": torch.zeros(12, 48, dtype=BF16)}),
        ("norm must have shape [out_features=48], got [47]", {"norm": torch.ones(47)}),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(",")[0],
)
def test_bad_input_of_the_backward_is_refused_in_words(backend, text, changes):
    z, magnitude, norm, *_, ids = scale_problem("cpu", F32, F32).values()
    arguments = {"dy": z, "z": z, "magnitude": magnitude, "norm": norm, "ids": ids, "needs": [True] * 3} | changes
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(f"dora_scale_backward: {text}")):
        getattr(torch.ops, f"peft_kernels_{backend}").dora_scale_backward.default(*arguments.values())


@pytest.mark.parametrize("backend", backends.linked("dora_scale", "cpu"))
@pytest.mark.parametrize("adapters", [0, 3])
def test_each_gradient_alone_is_the_same(backend, adapters):
    backward = getattr(torch.ops, f"peft_kernels_{backend}").dora_scale_backward.default
    z, magnitude, norm, *_, ids = scale_problem("cpu", BF16, F32, rows=(40,), adapters=adapters).values()
    together = backward(z, z, magnitude, norm, ids, [True] * 3)
    for i in range(3):
        given = z if i == 1 else None, None if i == 2 else magnitude
        alone = backward(z, *given, norm, ids, [j == i for j in range(3)])
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("backend", backends.linked("dora_norm", "cpu"))
def test_a_norm_of_next_to_nothing_is_not_negative(backend):
    weight, lora_A, lora_B, scaling = norm_problem("cpu", F32, F32, N=64, K=50, R=5).values()
    weight = -scaling * (lora_B @ lora_A)
    norm = getattr(torch.ops, f"peft_kernels_{backend}").dora_norm.default(weight, lora_A, lora_B, scaling)
    assert (norm >= 0).all() and norm.max() < weight.norm(dim=1).max() / 100
    if backend == "cpu":
        assert (norm == 0).any(), "no difference fell below 0, so this tested nothing"


@pytest.mark.parametrize("backend", backends.linked("dora_norm", "cpu"))
def test_of_a_small_difference_the_error_is_that_of_its_terms(backend):
    """A bound on the square, where the root has not yet magnified what was lost."""
    arguments = next(s for s in norm_samples() if s.id == "cancelling").make("cpu", F32, F32)
    norm = getattr(torch.ops, f"peft_kernels_{backend}").dora_norm.default(*arguments.values())
    weight, a, b = (arguments[name].double() for name in ("weight", "lora_A", "lora_B"))
    exact = (weight + arguments["scaling"] * (b @ a)).square().sum(1)
    most = (weight.abs() + abs(arguments["scaling"]) * (b.abs() @ a.abs())).square().sum(1)
    bound = (a.shape[1] + 2 * a.shape[0]) * torch.finfo(F32).eps * most  # sums of K, of R and of R terms
    assert ((norm.double().square() - exact).abs() <= bound).all()
    assert (bound < exact).all(), "0 would do"


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32)], ids=str)
def test_nan_stays_in_its_column_and_in_its_row(pair):
    with torch.no_grad():
        tensors = layer(*pair, rows=(20,))
        tensors["weight"][3, 5] = torch.nan
        tensors["magnitude"][7] = torch.nan
        tensors["x"][11, 2] = torch.nan
        nan = run(tensors).isnan()
    assert nan[11].all() and nan[:, [3, 7]].all()
    assert nan.sum() == 18 + 2 * 19  # one row of 18 columns, two columns of the 19 other rows


def saved_by(tensors, p):
    """What is kept for the backward beside the layer's own tensors: (dtype, shape)."""
    own = {t.data_ptr() for t in tensors.values() if t is not None}
    kept = {}

    def pack(t):
        if t.data_ptr() not in own and t.dim() > 0:
            kept[t.data_ptr()] = (t.dtype, tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(tensors, p, peft_kernels.new_seed())
    return sorted(kept.values(), key=str)


def test_what_is_kept_for_the_backward():
    """z in x's dtype, h in fp32, the norms; with dropout drop(x) too. No mask, nothing of the weight's size."""
    tensors = layer(BF16, F32, rows=(10,), biased=False, lora_biased=False)
    tensors["weight"].requires_grad_(False)
    always = [(BF16, (10, 18)), (F32, (10, 4)), (F32, (18,))]
    assert saved_by(tensors, 0.0) == sorted(always, key=str)
    assert saved_by(tensors, 0.1) == sorted([*always, (BF16, (10, 24))], key=str)
    tensors["magnitude"].requires_grad_(False)
    assert saved_by(tensors, 0.0) == sorted(always[1:], key=str)  # z was the gradient of m's


def test_autocast_casts_activations_and_leaves_the_adapter():
    tensors = layer(F32)
    low = {name: t if name in ("lora_A", "lora_B", "magnitude", "lora_bias") else t.to(BF16)
           for name, t in tensors.items()}  # fmt: skip
    norm = peft_kernels.dora_norm(tensors["weight"], tensors["lora_A"], tensors["lora_B"], S)
    for p, seed in ((0.0, None), (0.3, peft_kernels.new_seed())):
        with torch.autocast("cpu", BF16):
            y = run(tensors, p, seed)
        assert y.dtype is BF16
        if not p:
            assert torch.equal(y, run(low, norm=norm))


def test_a_seed_or_a_probability_that_does_not_fit_is_refused_in_words():
    tensors = layer(F32)
    with pytest.raises(ValueError, match="dora_linear: seed must be given where dropout_p > 0"):
        run(tensors, 0.1)
    with pytest.raises(ValueError, match=re.escape("dora_linear: dropout_p must lie in [0, 1), got 1")):
        run(tensors, 1.0)
    for x, text in ((torch.tensor(1.0), "x must have shape [..., in_features]"), (torch.randn(3, 0), "x must have at")):
        with pytest.raises(ValueError, match=re.escape(f"lora_linear: {text}")):
            run(tensors | {"x": x}, 0.1, peft_kernels.new_seed())
    with pytest.raises(ValueError, match=re.escape("lora_linear: weight[0] must have shape")):
        run(tensors | {"x": torch.randn(3, 23)})
    with pytest.raises(ValueError, match=re.escape("dora_scale: magnitude must have shape [18], as norm, got [17]")):
        run(tensors | {"magnitude": torch.ones(17)})
