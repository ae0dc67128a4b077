"""One script per quantizer, each run in a process and a Python of its own by `benchmarks.data_free` or
`benchmarks.calibrated`.

A script turns a source folder into a quantized folder once, as one row of its table says, and writes one
JSON object: what that took, and how good the folder is. `measured` is what they share; only it, torch,
transformers and the quantizer itself are imported, because the other Pythons do not have quantkit.

Virtual environments, each with `torch==2.13.0 transformers==5.23.0 accelerate` from the same source as
quantkit's own, and then
    bitsandbytes     bitsandbytes==0.50.2
    hqq              --no-deps hqq==0.2.8.post1 einops termcolor
    llm_compressor   --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0
                     loguru nvidia-ml-py pillow datasets
    gptqmodel        gptqmodel==7.6.0 optimum
    autoround        auto-round==0.16.1 compressed-tensors==0.20.0 loguru
"""
