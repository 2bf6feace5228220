"""The library inside other people's models: HF PEFT's layers and transformers' families.

`transformers.py` patches and unpatches, `peft.py` is the layer, `groups.py` the modules that own several projections of
one input, `targets.py` the rows of data that say which, `counts.py` and `report.py` what happened. `rows.py` carries
the adapters of the rows of one call, `named.py` is what else has to know them.

`pooled.py` lets a plain model serve the adapters of a pool, which `checkpoints.py` reads; `runner.py` is that model
compiled or captured, `continuous.py` in transformers' continuous batching. `estimate.py` says what many adapters of a
model would cost.

`widening.py` makes bottleneck adapters a part of the products of their block, for inference; `widened.py` is such a
block.
"""
