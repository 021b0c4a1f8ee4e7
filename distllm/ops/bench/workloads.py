"""Workloads by name, the cells of benchmarks/README.md: what a name puts in place of a command's defaults.

Plain data, read while options are parsed; needs no torch. Models are the shapes of benchmarks/shapes/ with
random weights, found from the root of a checkout.
"""

from __future__ import annotations

from typing import Any

Options = dict[str, Any]


def _model(shape: str, tp_size: int = 1) -> Options:
    """As the peers were measured: bf16, at most 256 sequences, a window of 4096."""
    return {
        "model": f"benchmarks/shapes/{shape}",
        "load_format": "dummy",
        "dtype": "bfloat16",
        "tensor_parallel_size": tp_size,
        "max_num_seqs": 256,
        "max_model_len": 4096,
    }


def _decode(*batch_sizes: int) -> Options:
    return {"input_len": (128,), "output_len": 128, "batch_size": batch_sizes}


def _first_token(*input_lens: int) -> Options:
    return {"input_len": input_lens, "output_len": 32, "batch_size": (1,)}


def _offline(num_prompts: int, input_len: int, output_len: int) -> Options:
    return {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}


LATENCY: dict[str, Options] = {
    "1b-decode": _model("llama-1b") | _decode(1, 8, 32, 64, 128, 256),
    "8b-decode": _model("llama-8b") | _decode(1, 8, 32, 64, 128, 256),
    "8b-decode-tp2": _model("llama-8b", 2) | _decode(1, 8, 64, 256),
    "70b-decode-tp4": _model("llama-70b", 4) | _decode(1, 8, 64, 256),
    "8b-ttft": _model("llama-8b") | _first_token(128, 1024, 3800),
    "8b-ttft-tp2": _model("llama-8b", 2) | _first_token(1024, 3800),
    "70b-ttft-tp4": _model("llama-70b", 4) | _first_token(1024, 3800),
}

THROUGHPUT: dict[str, Options] = {
    "8b-offline-512-256": _model("llama-8b") | _offline(512, 512, 256),
    "8b-offline-128-128": _model("llama-8b") | _offline(1024, 128, 128),
    "8b-offline-1024-128": _model("llama-8b") | _offline(256, 1024, 128),
    "8b-offline-512-256-tp2": _model("llama-8b", 2) | _offline(512, 512, 256),
    "70b-offline-512-256-tp4": _model("llama-70b", 4) | _offline(512, 512, 256),
}
