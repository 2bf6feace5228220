"""The benchmark of batched_lora_: one batch, many adapters. `python benchmarks/run.py --op batched_lora`."""
