"""Small adapter pools, calls of batched_lora_ on them, and equality of bits."""

import pytest
import torch

from peft_kernels import Site, SiteAdapter, backends, registry, testing

OP = registry.ops()["batched_lora_"]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BACKENDS = [pytest.param(name, id=name) for name in backends.linked("batched_lora_", "cpu")]
needs_cpu = pytest.mark.skipif("cpu" not in backends.linked("batched_lora_", "cpu"), reason="no CPU kernels here")
POOL_LISTS = "pages_out", "table", "scaling", "down_bias"
SITES = {"q": Site(40, 24), "v": Site(40, 33), "down": Site(24, 40)}


def factors(K, N, r, dtype=F32, biased=False, gained=False, f="identity", down_biased=False):
    bias, gain = torch.randn(N).to(dtype) if biased else None, 1 + torch.randn(N) / 4
    without = torch.randn(r, K).to(dtype), torch.randn(N, r).to(dtype), 0.5, bias
    if not gained and not down_biased and f == "identity":
        return without
    gain, down_bias = gain.to(dtype) if gained else None, torch.randn(r).to(dtype) if down_biased else None
    return SiteAdapter(*without, gain, f, down_bias)


def adapter(sites=SITES, ranks=(3, 9, 0), **more):
    """An adapter with a rank for each site; 0: it does not touch the site."""
    return {n: factors(s.K, s.N, r, **more) for (n, s), r in zip(sites.items(), ranks, strict=True) if r}


def arguments(pool, sites, ids, x, y):
    """What the op takes for some sites of one x."""
    tables = [pool.tables(site) for site in sites]
    ids = torch.as_tensor(ids, dtype=torch.int32)  # of which some may be out of range
    routed = torch.ops.peft_kernels.batched_lora_route.default(ids, pool.slots)
    lists = ([getattr(t, name) for t in tables] for name in POOL_LISTS)
    return dict(zip(("y", "x", "route", "pages_in"), (y, x, routed, tables[0].pages_in), strict=True)) | dict(
        zip(POOL_LISTS, lists, strict=True)
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


def partly_over(x, y, rows, cols):
    """(x, y) as they share one buffer, where y begins `rows` and `cols` after x; what both cover holds y's numbers."""
    (M, K), N = x.shape, y.shape[1]
    buffer = x.new_zeros(M + rows, max(K, cols + N))
    buffer[:M, :K] = x
    shared = buffer[rows:, cols : cols + N]
    shared.copy_(y)
    return buffer[:M, :K], shared
