"""llm-compressor's `oneshot` with its presets, its GPTQ and AWQ, and `model_free_ptq`, which loads no model.

Run by `python -m benchmarks.data_free --peers llm_compressor=PYTHON`, and by `benchmarks.calibrated`.
"""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401 (an import that would fall into the step)

from benchmarks.peers import loaded
from benchmarks.peers.measured import Job, Loaded, Script, run

CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
ROWS: dict[str, dict[str, Any]] = {
    "w8g128": {"scheme": "W8A16"},
    "w4g128": {"scheme": "W4A16"},
    "w4g128_asym": {"scheme": "W4A16_ASYM", "dense": True},
    "w8a8": {"scheme": "W8A8"},
    "w8a8_static": {"scheme": "W8A8", "static": True},
    "w8a8-smoothquant": {"scheme": "W8A8", "smoothing": 0.5},
    "w8a8_static-smoothquant": {"scheme": "W8A8", "static": True, "smoothing": 0.5},
    "fp8a8": {"scheme": "FP8_DYNAMIC"},
    "fp8a8-free": {"scheme": "FP8_DYNAMIC", "model_free": True},
    "fp8a8_tensor_static": {"scheme": "FP8", "calibrated": True},
    "fp8a8_block": {"scheme": "FP8_BLOCK"},
    "mxfp4": {"scheme": "MXFP4A16", "bf16": True},
    "nvfp4": {"scheme": "NVFP4A16", "bf16": True},
    "nvfp4-free": {"scheme": "NVFP4A16", "bf16": True, "model_free": True},
    "fp8a8-kv": {"scheme": "FP8_DYNAMIC", "cache": True},
    **{
        f"w{bits}g{group}-gptq": {"weights": (bits, group, True), "gptq": True}
        for bits, group in ((4, 128), (3, 128), (2, 64))
    },
    "w4g128_asym-awq": {"weights": (4, 128, False), "awq": True},
}
IGNORED = ["lm_head"]


def make(job: Job) -> None:
    if job.settings.get("model_free"):
        with job.steps("load, quantize and save"):
            model_free_ptq(
                str(job.source),
                str(job.out),
                scheme=job.settings["scheme"],
                ignore=[*IGNORED, "model.embed_tokens"],
                device="cpu",
            )
        return
    with job.steps("load"):
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype="auto")
    with job.steps("quantize"):
        oneshot(model=model, recipe=recipe(job.settings), **calibration(job))
    with job.steps("save"):
        model.save_pretrained(job.out, save_compressed=True)


def recipe(settings: dict[str, Any]) -> list[Any]:
    steps: list[Any] = []
    if "smoothing" in settings:
        steps.append(SmoothQuantModifier(smoothing_strength=settings["smoothing"]))
    if settings.get("awq"):
        steps.append(AWQModifier())
    rounding = GPTQModifier if settings.get("gptq") else QuantizationModifier
    return [*steps, rounding(ignore=IGNORED, **groups(settings))]


def groups(settings: dict[str, Any]) -> dict[str, Any]:
    """Which numbers: a preset, or weights of so many bits in groups."""
    if "weights" in settings:
        bits, size, symmetric = settings["weights"]
        weights = QuantizationArgs(
            num_bits=bits, type="int", strategy="group", group_size=size, symmetric=symmetric
        )
        return one_group(QuantizationScheme(targets=["Linear"], weights=weights))
    found: dict[str, Any] = {"targets": "Linear", "scheme": settings["scheme"]}
    if settings.get("static"):
        preset = preset_name_to_scheme(settings["scheme"], ["Linear"])
        inputs = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=True, dynamic=False)
        found = one_group(
            QuantizationScheme(targets=["Linear"], weights=preset.weights, input_activations=inputs)
        )
    if settings.get("cache"):
        found["kv_cache_scheme"] = CACHE
    return found


def one_group(scheme: QuantizationScheme) -> dict[str, Any]:
    return {"config_groups": {"group_0": scheme}}


def calibration(job: Job) -> dict[str, Any]:
    wanted = {"smoothing", "static", "calibrated", "cache", "gptq", "awq"} & job.settings.keys()
    if not wanted or job.calibration is None:
        return {}
    rows, length = job.calibration.shape
    ids = job.calibration.tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length] * rows})
    return {
        "dataset": dataset,
        "num_calibration_samples": rows,
        "max_seq_length": length,
        "shuffle_calibration_samples": False,
    }


def load(job: Job) -> Loaded:
    model = loaded.load(job.out, **{k: job.settings.get(k, False) for k in ("bf16", "dense")})
    return model, None if "smoothing" in job.settings else loaded.weights(model)


if __name__ == "__main__":
    run(Script(ROWS, ("llmcompressor", "compressed-tensors", "transformers", "torch"), make, load))
