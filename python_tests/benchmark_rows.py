"""Made-up rows of the benchmarks, and a CSV of them."""

import dataclasses

import torch

from benchmarks import bottleneck, prefix_attention, record, train_many
from benchmarks.batched_lora import cells, timing


def made_up(arm, M=16, ratio=1.0, dtype="float32", adapter="", p="", direction="forward+backward", **changes):
    numbers = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "gbs", "tflops"), 1.5)
    row = record.Row(
        op="lora_linear", arm=arm, backend="cpu", dtype=dtype, adapter_dtype=adapter, M=M, K=64, N=64, r="16", p=p,
        direction=direction, timing="eager", rounds=15, **numbers, ratio_p20=ratio, ratio_p50=ratio, ratio_p80=ratio,
        aa_spread=0.02, peak_share=0.5, saved_bytes=100, not_timed="", device="a processor", driver="",
        threads=2, torch="2", triton="3", cuda="", transformers="5", peft="0",
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
            **timing.labels(cell, arm, "cpu"), rounds=15, **times, ratio_p20=ratio, ratio_p50=ratio, ratio_p80=ratio,
            aa_spread=0.02, read_gbs=20.0, read_share=share, not_timed=not_timed, **origin,
        )
        for cell in cells.cells("cpu")
        for arm in ("base", "base_again", "peft", "op", "op alone")
    ]  # fmt: skip


def trained_rows(ratio=0.5):
    """Every cell of train_many's CPU grid."""
    origin = record.provenance(torch.device("cpu"))
    times = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "tokens_per_s"), 1.5)
    return [
        train_many.Row(
            **train_many.labels(cell, arm, "cpu"), rounds=15, **times, ratio_p20=ratio, ratio_p50=ratio,
            ratio_p80=ratio, aa_spread=0.02, not_timed="", **origin,
        )
        for cell in train_many.cells("cpu")
        for arm in ("peft", "peft_again", "alone", "together")
    ]  # fmt: skip


def bottleneck_rows(ratio=1.02, eager=1.1):
    """Every cell of bottleneck_adapter's CPU grid."""
    origin = record.provenance(torch.device("cpu"))
    times = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), 1.5)
    return [
        bottleneck.Row(
            **bottleneck.labels(cell, arm, "cpu"), rounds=15, **times, ratio_p20=r, ratio_p50=r, ratio_p80=r,
            aa_spread=0.02, flop_ratio=1.03, not_timed="", **origin,
        )
        for cell in bottleneck.cells("cpu")
        for arm, r in (("ffn", 1.0), ("ffn_again", 1.0), ("eager", eager), ("op", ratio))
    ]  # fmt: skip


def prefix_rows(ratio=0.5, cat=1.1):
    """Every cell of prefix_attention's CPU grid."""
    origin = record.provenance(torch.device("cpu"))
    times = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), 1.5)
    return [
        prefix_attention.Row(
            **prefix_attention.labels(cell, arm, backend), rounds=15, **times, ratio_p20=r, ratio_p50=r, ratio_p80=r,
            aa_spread=0.02, flop_ratio=1.5, not_timed="", **origin,
        )
        for cell in prefix_attention.cells("cpu")
        for arm, backend, r in (
            ("none", "torch", 1.0), ("none_again", "torch", 1.0), ("peft", "torch", cat), ("cat", "torch", cat),
            ("op", "cpu", ratio),
        )
    ]  # fmt: skip
