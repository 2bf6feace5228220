"""Made-up rows of the benchmarks, and a CSV of them."""

import dataclasses
import math

import torch

from benchmarks import bottleneck, decoder, hopper, lora_variants, prefix_attention, prefix_models, record, train_many
from benchmarks.batched_lora import cells, timing


def made_up(arm, M=16, ratio=1.0, dtype="float32", adapter="", p="", direction="forward+backward", **changes):
    numbers = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "gbs", "tflops"), 1.5)
    row = record.Row(
        op="lora_linear", arm=arm, backend="cpu", dtype=dtype, adapter_dtype=adapter, M=M, K=64, N=64, r="16", p=p,
        direction=direction, timing="eager", copies=1, rounds=15, **numbers,
        ratio_p20=ratio, ratio_p50=ratio, ratio_p80=ratio, aa_spread=0.02,
        peak_share=0.5, saved_bytes=100, not_timed="", device="a processor", driver="",
        threads=2, instruction_set="avx2", sm90="", torch="2", triton="3", cuda="", transformers="5", peft="0",
        peft_kernels="0", commit="0123456789abcdef-dirty", date="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def made_up_rows(patched=0.9):
    """Two cells, two base dtypes, all variants; a seam."""
    rows = []
    for op, Ms in (("lora_linear", (1, 16)), ("seam", (1,))):
        for dtype in ("float32", "bfloat16"):
            for M in Ms:
                for direction in ("forward", "forward+backward"):
                    common = {"M": M, "dtype": dtype, "direction": direction, "op": op}
                    rows += [made_up("frozen", **common), made_up("frozen_again", **common)]
                    for adapter, p in {(a, p) for a in (dtype, "float32") for p in ("0", "0.1")}:
                        variant = common | {"adapter": adapter, "p": p}
                        rows.append(made_up("peft", ratio=1.2, **variant))
                        rows.append(made_up("patched", ratio=patched * M**0.25, **variant))
                        rows.append(made_up("op", ratio=0.8, **variant))
    return rows


def write(path, rows, kind=record.Row):
    writer = record.Writer(path, kind)
    writer.write(rows)
    writer.close()
    return path


def mixed_rows(ratio=1.1, share=0.9, not_timed=""):
    """Every cell of batched_lora's CPU grid."""
    origin = record.provenance(torch.device("cpu"))
    times = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "gbs", "tflops"), 1.5)
    return [
        timing.Row(
            **timing.labels(cell, arm, "cpu"), timing="eager", rounds=15, **times,
            ratio_p20=ratio, ratio_p50=ratio, ratio_p80=ratio,
            aa_spread=0.02, added_us=3.5, read_gbs=20.0, read_share=share, not_timed=not_timed, **origin,
        )
        for cell in cells.cells("cpu")
        for arm in ("base", "base_again", "peft", "op", "op alone")
    ]  # fmt: skip


def rows_of(module, arms, **more):
    """Every cell of a module's CPU grid; arms: (name, backend, ratio)."""
    origin, times = record.provenance(torch.device("cpu")), dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), 1.5)
    return [
        module.Row(
            **module.labels(cell, arm, backend), timing="eager", rounds=15, **times,
            ratio_p20=ratio, ratio_p50=ratio, ratio_p80=ratio,
            aa_spread=0.02, not_timed="", **more, **origin,
        )
        for cell in module.cells("cpu")
        for arm, backend, ratio in arms
    ]  # fmt: skip


def trained_rows(ratio=0.5):
    names = ("peft", "peft_again", "alone", "together")
    return rows_of(train_many, [(arm, "cpu", ratio) for arm in names], tokens_per_s=1.5)


def bottleneck_rows(ratio=1.02, eager=1.1):
    ratios = {"ffn": 1.0, "ffn_again": 1.0, "eager": eager, "op": ratio}
    return rows_of(bottleneck, [(arm, "cpu", r) for arm, r in ratios.items()], flop_ratio=1.03)


def prefix_rows(ratio=0.5, cat=1.1):
    ratios = {"none": 1.0, "none_again": 1.0, "peft": cat, "cat": cat}
    arms = [(arm, "torch", r) for arm, r in ratios.items()]
    return rows_of(prefix_attention, [*arms, ("op", "cpu", ratio)], flop_ratio=1.5)


def model_rows(ratio=1.1):
    ratios = {"none": 1.0, "none_again": 1.0, "peft": 1.2, "attached": ratio}
    return rows_of(prefix_models, [(arm, "torch", r) for arm, r in ratios.items()])


def variant_rows(ratio=1.2, recomputed=2e3):
    kept = {"base": (1.0, 0.0), "base_again": (1.0, 0.0), "peft": (2.0, 4e3), "patched": (ratio, 3e3)}
    arms = (kept | {"recomputed": (ratio, recomputed)}).items()
    return [
        row for arm, (r, size) in arms for row in rows_of(lora_variants, [(arm, "cpu", r)], saved_bytes=size)
        if arm != "recomputed" or row.variant == "mlp"
    ]  # fmt: skip


def decoder_rows(ratio=1.1, decoding=1.15):
    """Of every arm, whichever step it is for; on a GPU all would stand in one CSV."""
    arms = {"frozen": 1.0, "frozen_again": 1.0, "peft": 2.0, "patched": ratio, "pool": decoding}
    more = {"adapter_dtype": "float32", "tokens_per_s": 2e4, "memory_bytes": 3e9, "memory": decoder.PEAK}
    return rows_of(decoder, [(arm, "cpu", r) for arm, r in arms.items()], **more)


MADE_UP = {
    "bottleneck_adapter": bottleneck_rows,
    "prefix_attention": prefix_rows,
    "prefix_models": model_rows,
    "train_many": trained_rows,
    "lora_variants": variant_rows,
    "decoder": decoder_rows,
}


def gpu_rows(forward=1.4, saved_beyond=0, sm90=1.04):
    """The cells of the GPU's targets, both timings; compiled PEFT could not be captured."""
    common = {
        "dtype": "bfloat16", "K": 4096, "N": 4096, "device": "a GPU", "driver": "580", "cuda": "13.0", "triton": "3.6"
    }  # fmt: skip
    rows = []
    for M in (8192, 1, 16):
        for how in ("eager", "graph"):
            for direction in ("forward", "forward+backward"):
                place = common | {"M": M, "timing": how, "direction": direction}
                rows += [made_up("frozen", **place), made_up("frozen_again", **place)]
                for p in ("0", "0.1"):
                    variant = place | {"adapter": "bfloat16", "p": p}
                    kept = 2 * M * 4096 + 4 * M * 16 + 8 * (p == "0.1") + saved_beyond
                    ours = {"backend": "cuda", "saved_bytes": kept}
                    rows.append(made_up("peft", ratio=2.0, **variant))
                    rows.append(made_up("op", ratio=1.1 if M > 16 else forward, **variant, **ours))
                    rows.append(made_up("op", ratio=sm90, **variant, backend=hopper.BACKEND, saved_bytes=kept))
            for p in ("0", "0.1"):
                failed = {"timing": how, "p": p, "not_timed": "it waits", "rounds": 0}
                numbers = dict.fromkeys(("ms_p50", "ratio_p50"), math.nan)
                failed |= numbers | {"adapter": "bfloat16", "M": M, "backend": "inductor"}
                rows += [made_up("compiled", **common | failed)] if how == "graph" else []
    return rows


def gpu_pool_rows(added=4.0, sglang=8.0):
    """batched_lora's cells that have a target on a GPU."""
    place = {"dtype": "bfloat16", "timing": "graph", "site": "square", "M": 64, "K": 4096, "N": "4096"}
    arms_of = {"base": ("torch", math.nan), "base_again": ("torch", math.nan), "sglang_v2": ("peer", sglang)}
    return [
        dataclasses.replace(
            mixed_rows()[0],
            **place,
            arm=arm,
            backend=backend,
            adapters=n,
            present=n,
            added_us=us / (3 if n == 1 else 1),
        )
        for n in (64, 1)
        for arm, (backend, us) in [*arms_of.items(), ("op", ("cuda", 2 * added)), ("op", (hopper.BACKEND, added))]
    ]


def gpu_decoder_rows(ratio=1.1):
    """The decoding step that has a target, and the training step."""
    training = [dataclasses.replace(row, device="a GPU") for row in decoder_rows() if row.step == "training"][:5]
    first = [row for row in decoder_rows(decoding=ratio) if row.step == "decoding"][:5]
    place = {"dtype": "bfloat16", "timing": "graph", "hidden": 4096, "B": 64, "adapters": 16, "memory_bytes": 0.0}
    return training + [
        dataclasses.replace(row, **place, backend=backend, ratio_p50=row.ratio_p50 + 1 * (backend == "cuda"))
        for row in first
        for backend in {"frozen": ["torch"], "frozen_again": ["torch"], "pool": ["cuda", hopper.BACKEND]}.get(
            row.arm, []
        )
    ]
