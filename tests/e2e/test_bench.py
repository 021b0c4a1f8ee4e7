"""`distllm bench` as a user types it: tables, the file, workloads by name, refusals in one line."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distllm.cli.bench import latency, throughput
from distllm.cli.bench_tables import number
from distllm.ops.bench import workloads
from distllm.ops.bench.latency import LatencyWorkload
from tests.command import check_refused, distllm

ROOT = Path(__file__).parents[2]
LENGTHS = ("--input-len", 9, "--output-len", 4, "--num-iters", 2)


@pytest.fixture(scope="module")
def bare(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json alone."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(tiny / "config.json", folder)
    return folder


def run(tmp_path: Path, *args: object) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints, and the file that it leaves."""
    file = tmp_path / "results.json"
    done = distllm("bench", *args, "-o", file)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    keys = "benchmark command num_ranks options ceilings results ready_s environment date format_version"
    assert set(report) == set(keys.split())
    assert report["benchmark"] == args[0] and str(file) in report["command"]
    assert report["environment"]["torch"] and report["date"].endswith("+00:00")
    return done.stdout, report


def test_latency(bare: Path, tmp_path: Path) -> None:
    sizes = ("--batch-size", 1, "--batch-size", 3, "--load-format", "dummy")
    printed, report = run(tmp_path, "latency", bare, *LENGTHS, *sizes)
    assert "Decode, ms per step" in printed and "Time to the first token" in printed
    decode, first = report["results"]["decode"], report["results"]["first_token"]
    assert [result["batch_size"] for result in decode] == [1, 3]
    assert all(len(result["step_s"]["raw"]) == 2 and result["floor_s"] > 0 for result in decode)
    assert all(0 < result["itl_s"]["median"] <= result["itl_s"]["p99"] for result in decode)
    assert first[0]["input_len"] == 9 and first[0]["ttft_s"]["median"] > 0
    assert "engine ready after" in printed and report["ready_s"] > 0
    assert report["options"]["engine"]["enable_prefix_caching"] is False
    assert report["ceilings"]["read_bytes_per_s"] > 0


def test_profile(bare: Path, tmp_path: Path) -> None:
    """Times that can be had in two ways agree, on a machine without a GPU too."""
    steps = ("--batch-size", 1, "--batch-size", 3, "--input-len", 9, "--num-steps", 5)
    phases = ("--phase", "decode", "--phase", "prefill", "--load-format", "dummy", "--trace", tmp_path)
    printed, report = run(tmp_path, "profile", bare, *steps, *phases)
    results = report["results"]
    assert [result["batch_size"] for result in results["steps"]] == [1, 3]
    assert all(result["gap_s"] is None and len(result["busy_s"]["raw"]) == 5 for result in results["steps"])
    assert {"schedule", "launch", "wait", "coordinator"} <= {time["part"] for time in results["host"]}
    (prompt,) = results["prompts"]
    parts = zip(*(prompt[name]["raw"] for name in ("before_s", "device_s", "after_s")), strict=True)
    assert [sum(times) for times in parts] == pytest.approx(prompt["ttft_s"]["raw"])

    times = {case: kernels_of(report, case) for case in ("decode-1x9", "decode-3x9", "prefill-1x9")}
    for (case, kernels), other in zip(times.items(), [*results["steps"], prompt], strict=True):
        assert sum(time["share_percent"] for time in kernels) == pytest.approx(100), case
        total = sum(time["s_per_step"] for time in kernels)
        assert total == pytest.approx(sum(other["busy_s"]["raw"]) / 5)
        wall = other.get("recorded_step_s", other.get("device_s"))
        assert total <= max(wall["raw"])
        calls = {time["operation"]: time["calls_per_step"] for time in kernels}
        assert (calls["linear attn.qkv"], calls["linear head"]) == (5, 1)  # 5 layers
        assert len(gzip.decompress((tmp_path / f"{case}.json.gz").read_bytes())) > 1000
    for title in ("Consecutive decode steps", "Host of rank 0", "First token while recording", "Kernels, µs"):
        assert title in printed


def kernels_of(report: dict[str, Any], case: str) -> list[dict[str, Any]]:
    return [time for time in report["results"]["kernel_times"] if time["case"] == case]


def test_throughput_of_real_weights(tiny: Path, tmp_path: Path) -> None:
    printed, report = run(tmp_path, "throughput", tiny, *LENGTHS, "--num-prompts", 5)
    assert "Throughput" in printed
    (result,) = report["results"]["throughput"]
    assert result["output_tokens_per_s"] == pytest.approx(4 * result["requests_per_s"])
    assert result["total_tokens_per_s"] == pytest.approx(13 * result["requests_per_s"])
    assert len(result["elapsed_s"]["raw"]) == 2


def test_kernels(bare: Path, tmp_path: Path) -> None:
    sizes = ("-tp", 2, "--batch-size", 2, "--context-len", 20, "--input-len", 17)
    printed, report = run(tmp_path, "kernels", bare, *sizes)
    operations = {result["operation"] for result in report["results"]["kernels"]}
    assert {"paged_attention", "rms_norm", "linear attn.qkv", "sample_tokens"} <= operations
    assert all(operation in printed for operation in operations)


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no model": (("latency",), "Missing argument 'MODEL'"),
    "unknown workload": (("throughput", "--workload", "8b-decode"), "'8b-decode' is not one of"),
    "length": (("latency", "demo", "--input-len", 0), "0 is not in the range x>=1"),
    "batch": (("latency", "demo", "--batch-size", 300), "batch_size is 300"),
    "window": (("throughput", "demo", "--max-model-len", 99), "max_model_len is 99; this workload"),
    "traces": (("profile", "demo", "--trace", "/nowhere"), "'/nowhere' does not exist"),
    "folder": (("comm", "-o", "/nowhere/results.json"), "the folder /nowhere does not exist"),
    "one rank": (("comm",), "two ranks or more"),
    "format": (("latency", "demo", "--load-format", "pt"), "'pt' is not one of 'auto', 'dummy'"),
    "dtype": (("kernels", "demo", "--dtype", "fp8"), "'fp8' is not one of"),
    "layout": (("kernels", ROOT / "benchmarks/shapes/llama-8b", "-tp", 3), "tp 3 does not fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    args, words = REFUSED[case]
    check_refused(distllm("bench", *args), words)


def test_weights_that_are_not_there(bare: Path) -> None:
    check_refused(distllm("bench", "throughput", bare), "no weights")


def test_a_workload_gives_defaults_and_the_command_line_counts() -> None:
    args = ["--workload", "8b-decode-tp2", "--batch-size", "2", "--dtype", "float32"]
    params = latency.make_context("latency", args).params
    assert params["model"] == "benchmarks/shapes/llama-8b"
    assert (params["batch_size"], params["dtype"]) == ((2,), "float32")
    assert (params["input_len"], params["tensor_parallel_size"]) == ((128,), 2)
    assert (params["load_format"], params["max_model_len"]) == ("dummy", 4096)


@pytest.mark.parametrize("name", workloads.LATENCY)
def test_latency_workloads_fit(name: str) -> None:
    params = latency.make_context("latency", ["--workload", name]).params
    workload = LatencyWorkload(params["input_len"], params["output_len"], params["batch_size"])
    workload.check_batch_sizes(params["max_num_seqs"])
    assert workload.max_seq_len(params["max_num_batched_tokens"]) <= params["max_model_len"]
    assert (ROOT / params["model"] / "config.json").is_file()


@pytest.mark.parametrize("name", workloads.THROUGHPUT)
def test_throughput_workloads_fit(name: str) -> None:
    params = throughput.make_context("throughput", ["--workload", name]).params
    assert params["input_len"] + params["output_len"] <= params["max_model_len"]
    assert f"{params['input_len']}-{params['output_len']}" in name
    assert (ROOT / params["model"] / "config.json").is_file()


def test_numbers_have_no_exponent() -> None:
    assert [number(value) for value in (0.12345, 12.345, 999.44, 12345.6)] == [
        "0.1235",
        "12.35",
        "999.4",
        "12,346",
    ]
