"""Problems that the kernels for sm_90 take, by op: run on the emulator (emulated_*_sm90_samples.py) and on a GPU
(test_cuda_sm90.py).
"""

import torch

_EVERYTHING = dict(biased=True, lora_biased=True)
LINEAR = {
    "dropout": dict(rows=(136,), K=72, N=(264,), ranks=((8,),), p=0.1, **_EVERYTHING),
    "stacked": dict(rows=(2, 68), K=136, N=(40,), ranks=((3, 16),), **_EVERYTHING),
    "group": dict(rows=(150,), K=72, N=(136, 24, 40), ranks=((5,), (), (16, 1)), biased=True),
    "group-dropout": dict(rows=(150,), K=72, N=(136, 40), ranks=((5,), (3,)), p=0.1),
}
_KINDS = dict(biased=True, gained=True, down_biased=True, activations=("gelu", "identity", "tanh"))
POOLED = {
    "group": dict(rows=37, K=1032, N=(264, 40), ranks=((8, 2), (0, 9), (20, 0), (24, 1)), **_KINDS),
    "row": dict(rows=1, K=1096, N=(2312,), ranks=((16,),), ids=[0]),
    "distinct": dict(rows=9, K=520, N=(264,), ranks=((12,),) * 9, ids=list(range(9))),
}
BOTTLENECKS = {
    "serial": dict(rows=(16,), K=136, N=None, E=24, scale="channel", gated=True, p=0.1),
    "parallel": dict(rows=(5,), K=1032, N=136, E=64, activation="gelu", scale="scalar", p=0.1, dropout_on="output"),
    "row": dict(rows=(1,), K=520, N=1096, E=8, activation="silu", biased=False),
}


def with_adapters(ranks):
    """The members whose y the GEMM with adapters makes."""
    return [g for g, group in enumerate(ranks) if group]


def assert_all_gemms_differ(one, other, ranks):
    """Of lora_linear, the bits of all that the GEMM with adapters makes, and of nothing else: it rounds once where the
    kernels that it replaces round twice."""
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {f"y[{g}]" for g in with_adapters(ranks)} | {"grad x[0]"}
