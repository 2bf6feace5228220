"""The library inside other people's models: HF PEFT's layers and transformers' families.

`transformers.py` patches and unpatches, `peft.py` is the layer, `groups.py` the modules that own several projections of
one input, `targets.py` the rows of data that say which, `counts.py` and `report.py` what happened.
"""
