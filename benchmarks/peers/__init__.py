"""One script per quantizer, each run in a process and a Python of its own by `benchmarks.data_free`.

A script turns a source folder into a quantized folder once, as one row of its table says, and writes one
JSON object: what that took, and how good the folder is. `measured` is what they share; only it, torch,
transformers and the quantizer itself are imported, because the other Pythons do not have quantkit.
"""
