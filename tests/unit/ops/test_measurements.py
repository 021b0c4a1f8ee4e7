"""What is timed, and what is made of it: with a clock that only the engine under test moves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distllm import ConfigError, LaunchError
from distllm.comm.local import LocalControl, run_ranks
from distllm.ops.bench import latency, throughput, timing
from distllm.ops.bench.ceilings import measure_ceilings
from distllm.ops.bench.comm import message_sizes, run_comm
from distllm.ops.bench.environment import environment
from distllm.ops.bench.floors import Ceilings, Floors, StageCost

CPU = torch.device("cpu")
FLOORS = Floors([StageCost(40, 20, 10, 2, 4)], Ceilings(10, 100))
PREFILL_S, STEP_S = 7.0, 0.25


class FakeLLM:
    """Prompts take PREFILL_S, each token after the first STEP_S."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []  # (prompts, tokens of each)
        self.spec = SimpleNamespace(vocab_size=50)
        self.config = SimpleNamespace(max_num_batched_tokens=8, max_num_seqs=4)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def generate(self, prompts: Any, params: Any) -> None:
        for _ in self.stream(prompts, params):
            pass

    def stream(self, prompts: Any, params: Any) -> Iterator[Any]:
        assert params.temperature == 0 and params.ignore_eos and not params.detokenize
        self.calls.append((len(prompts), params.max_tokens))
        self.now += PREFILL_S
        for number in range(params.max_tokens):
            self.now += STEP_S if number else 0
            yield from (SimpleNamespace(request_id=str(i)) for i in range(len(prompts)))


def test_decode_step_is_a_difference_in_which_prompts_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = FakeLLM(monkeypatch)
    workload = latency.LatencyWorkload((16,), 10, (3,), num_iters=2, num_iters_warmup=1)
    (result,) = latency.run_decode(llm, workload, FLOORS)
    ramp = 8 + 2 * (3 * 16 // 8)
    assert llm.calls == [(3, ramp + 10), (3, ramp)] * 3 + [(3, 10)]
    assert result.step_s.raw == pytest.approx([STEP_S] * 2)
    assert result.context_len == 16 + ramp + 5
    assert result.floor_s == FLOORS.decode_step_s(3, result.context_len)
    assert result.floor_percent == pytest.approx(100 * result.floor_s / STEP_S)
    assert result.itl_s.median == result.itl_s.p99 == pytest.approx(STEP_S)


def test_first_token_is_the_first_increment(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = FakeLLM(monkeypatch)
    workload = latency.LatencyWorkload((16, 5), num_iters=2, num_iters_warmup=1)
    results = latency.run_first_token(llm, workload, FLOORS)
    assert [result.input_len for result in results] == [16, 5]
    assert all(result.ttft_s.raw == [PREFILL_S] * 2 for result in results)
    assert results[0].floor_percent == pytest.approx(100 * FLOORS.first_token_s(16) / PREFILL_S)


def test_throughput_counts_all_time(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = FakeLLM(monkeypatch)
    result = throughput.run_throughput(llm, throughput.ThroughputWorkload(6, 4, 5, num_iters=2), FLOORS)
    assert llm.calls == [(4, 5), (6, 5), (6, 5)]  # a warm-up of what runs at once, then the runs
    elapsed = PREFILL_S + 4 * STEP_S
    assert result.elapsed_s.raw == pytest.approx([elapsed] * 2)
    rates = (result.requests_per_s, result.output_tokens_per_s, result.total_tokens_per_s)
    assert rates == pytest.approx((6 / elapsed, 6 * 5 / elapsed, 6 * 9 / elapsed))
    assert result.ceiling_output_tokens_per_s == FLOORS.output_tokens_per_s(4, 4, 5)


def test_prompts_are_the_same_every_time() -> None:
    prompts = latency.random_prompts(2, 3, 10)
    assert prompts == latency.random_prompts(2, 3, 10)
    assert [len(prompt) for prompt in prompts] == [3, 3] and prompts[0] != prompts[1]


def test_batches_that_cannot_run_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 9; at most max_num_seqs, 8"):
        latency.LatencyWorkload(batch_sizes=(1, 9)).check_batch_sizes(8)


def test_summary() -> None:
    summary = timing.summarize([3.0, 1.0, 2.0])
    assert (summary.median, summary.lowest, summary.raw) == (2.0, 1.0, [3.0, 1.0, 2.0])
    assert summary.p90 == pytest.approx(2.8) and summary.scaled(0.5).median == 1.0


def test_calls_are_made_in_turn_and_as_often_as_promised() -> None:
    """Every rank must enter as many collectives."""
    made: list[int] = []
    summary = timing.time_calls([lambda: made.append(0), lambda: made.append(1)], CPU)
    assert len(made) == timing.NUM_WARMUPS + timing.NUM_SAMPLES
    assert made[timing.NUM_WARMUPS :] == [0, 1] * (timing.NUM_SAMPLES // 2)
    assert len(summary.raw) == timing.NUM_SAMPLES and summary.lowest >= 0


def test_ceilings_of_this_machine_are_plausible() -> None:
    ceilings = measure_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.read_bytes_per_s < 1e13
    assert 1e8 < ceilings.flop_per_s < 1e15


def test_message_sizes() -> None:
    assert message_sizes(2**14) == [2**10, 2**12, 2**14]
    assert message_sizes(100) == [100]


@pytest.mark.parametrize("size", [2, 3])
def test_comm(size: int) -> None:
    def run(control: LocalControl) -> Any:
        return run_comm(control, 2**12)

    results = run_ranks(size, run)[0]
    found = [(result.operation, result.num_bytes) for result in results]
    assert found == [(name, n) for name in ("all_reduce", "send_recv") for n in (1024, 4096)]
    for result in results:
        factor = 2 * (size - 1) / size if result.operation == "all_reduce" else 1
        assert result.bytes_per_s == pytest.approx(result.num_bytes / result.time_s.median)
        assert result.bus_bytes_per_s == pytest.approx(factor * result.bytes_per_s)


def test_comm_of_one_rank_is_refused() -> None:
    with pytest.raises(LaunchError, match="two ranks or more, 1 was started"):
        run_comm(LocalControl(), 2**12)


def test_environment_is_plain_data() -> None:
    facts = environment()
    assert {"distllm", "commit", "gpu", "cpu", "torch", "triton", "python"} <= facts.keys()
    assert json.loads(json.dumps(facts)) == facts
