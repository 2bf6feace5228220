"""The library inside other people's models: HF PEFT's layers and transformers' families.

`transformers.py` patches and unpatches, `peft.py` is the layer, `groups.py` the modules that own several projections of
one input, `targets.py` the rows of data that say which, `counts.py` and `report.py` what happened. `rows.py` carries
the adapters of the rows of one call, `named.py` is what else has to know them.

`pooled.py` lets a plain model serve the adapters of a pool, which `checkpoints.py` reads; `runner.py` is that model
compiled or captured, `continuous.py` in transformers' continuous batching. `estimate.py` and `estimate_bottleneck.py`
say what many adapters of a model would cost.

`attach.py` puts the methods of this library on a model and takes them off, `attachments.py` is what a model has of
them, `blocks.py` how its blocks run bottleneck adapters, `prefixes.py` and `attending.py` how its attentions come to
prefixes and what they then compute, `prefix_positions.py` where the tokens' positions start, `own_parameters.py`
BitFit and heads. `adapter_files.py` saves and loads, `adapter_folders.py` reads, `prefix_files.py` knows PEFT's
prefixes and `adapterhub.py` what AdapterHub has saved; `selective.py` is fine-tuning without adapters. `widening.py`
makes bottleneck adapters a part of the products of their block, for inference; `widened.py` is such a block.
"""
