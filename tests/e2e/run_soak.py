"""Run by mpirun, or alone: thousands of random requests, cancelled and preempted at random, on one engine.

    launch/mpirun.sh -n 4 python tests/e2e/run_soak.py -tp 2 -pp 2 --requests 10000

Each request must end as its options allow. After each wave of requests no slot and no block may be held,
and the same seeded prompt must have given the same tokens. Once warm, no rank may grow.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distllm import LLM, RequestOutput, SamplingParams
from distllm.runtime.request import Request
from distllm.runtime.scheduler import Scheduler
from tests.e2e.soak_tasks import EOS, MAX_MODEL_LEN, VOCAB_SIZE, Task, Wave, random_tasks

BLOCK_SIZE, NUM_BLOCKS, KV_HEADS, HEAD_DIM = 4, 200, 2, 16  # fewer blocks than 48 sequences want: preemption
WARM_SHARE = 0.2  # of the requests, before memory counts
# Growth of a warm rank. On a GPU a new combination of arguments may still compile and load a Triton kernel.
LIMITS = {
    "cpu": {"resident_bytes": 3 << 20, "objects": 1000},
    "cuda": {"resident_bytes": 24 << 20, "objects": 6000, "cuda_bytes": 256 << 10},
}
NUM_ROWS = 10  # of the table that is printed


class Soak:
    """Feeds waves to an engine. Every rank draws the same tasks; rank 0 alone aborts and checks."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self._llm = llm
        self._tasks_rng, self._abort_rng = random.Random(seed), random.Random(seed + 1)
        self._next_id = 0
        self._probe: list[int] = []
        self.counts: Counter[str] = Counter()

    def run_wave(self, count: int) -> None:
        tasks = random_tasks(self._tasks_rng, count)
        way = self._tasks_rng.choice([self._stream] * 8 + [self._generate, self._leave_early])
        first_id, self._next_id = self._next_id, self._next_id + count
        wave = way(tasks, first_id)
        if self._llm.is_root:
            self.counts.update(wave.ends.values())
            self._check_nothing_is_held()

    def _arguments(self, tasks: list[Task]) -> tuple[list[list[int]], list[SamplingParams]]:
        return [task.prompt for task in tasks], [task.params for task in tasks]

    def _outputs(self, tasks: list[Task]) -> Iterator[RequestOutput]:
        return self._llm.stream(*self._arguments(tasks), priority=[task.priority for task in tasks])

    def _stream(self, tasks: list[Task], first_id: int) -> Wave:
        wave = Wave(tasks)
        for output in self._outputs(tasks):
            wave.take(int(output.request_id) - first_id, output)
            while self._abort_rng.random() < 0.02:
                number = self._abort_rng.randrange(1, len(tasks) + 1)  # one too many; not the probe
                wave.aborted.add(number)
                self._llm.abort(str(first_id + number))
        if self._llm.is_root:
            wave.check()
            self._check_probe(wave.tokens[0, 0])
        return wave

    def _leave_early(self, tasks: list[Task], first_id: int) -> Wave:
        wave, left_after = Wave(tasks), self._tasks_rng.randrange(2000)
        for count, output in enumerate(self._outputs(tasks)):
            wave.take(int(output.request_id) - first_id, output)
            if count == left_after:
                break
        return wave

    def _generate(self, tasks: list[Task], first_id: int) -> Wave:
        wave = Wave(tasks)
        for number, output in enumerate(self._llm.generate(*self._arguments(tasks))):
            wave.take(number, output)
        if self._llm.is_root:
            wave.check()
            self._check_probe(wave.tokens[0, 0])
        return wave

    def _check_probe(self, tokens: list[int]) -> None:
        """In fp32: in bf16 the size of a batch may decide a near tie."""
        self._probe = self._probe or tokens
        assert self._llm.dtype != torch.float32 or tokens == self._probe, "the batch changed a seeded sample"

    def _check_nothing_is_held(self) -> None:
        coordinator, runner = self._llm._coordinator, self._llm._runners[0]
        scheduler = coordinator._scheduler
        scheduler.check_integrity()
        blocks = scheduler._tables.blocks
        assert blocks.num_used == 0, f"{blocks.num_used} of {blocks.num_blocks} blocks are held"
        assert len(scheduler._running.free_slots) == scheduler.config.max_num_seqs, "slots are held"
        assert not scheduler.has_unfinished and not scheduler.has_outstanding, "requests are held"
        assert not runner._results and not runner._in_flight, "results are held"


@dataclass(frozen=True)
class Memory:
    """Of one rank, between waves."""

    resident_bytes: int
    objects: int  # of Python, nearly all of them: flat where nothing leaks
    cuda_bytes: int

    @classmethod
    def of_this_rank(cls) -> Memory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc keeps would hide a slow leak
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(pages * 4096, sys.getallocatedblocks(), torch.cuda.memory_allocated())

    def check_growth(self, warm: Memory, limits: dict[str, int], rank: int) -> None:
        for name, limit in limits.items():
            grown = getattr(self, name) - getattr(warm, name)
            assert grown <= limit, f"rank {rank}: {name} grew by {grown} since it was warm, more than {limit}"


def memory_of_ranks(llm: LLM) -> list[Memory]:
    """Collective."""
    mine = json.dumps(asdict(Memory.of_this_rank())).encode()
    return [Memory(**json.loads(data)) for data in llm._control.all_gather_bytes(mine)]


def engine(args: argparse.Namespace, folder: Path) -> LLM:
    """A tiny model with random weights and few KV blocks."""
    num_layers = max(2, args.pp)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_MODEL_LEN, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": EOS, "torch_dtype": args.dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    kv_heads = max(1, KV_HEADS // args.tp)
    block_bytes = (
        2 * -(-num_layers // args.pp) * BLOCK_SIZE * kv_heads * HEAD_DIM * getattr(torch, args.dtype).itemsize
    )
    return LLM(
        str(folder),
        tensor_parallel_size=args.tp,
        pipeline_parallel_size=args.pp,
        load_format="dummy",
        dtype=args.dtype,
        block_size=BLOCK_SIZE,
        max_num_seqs=48,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=NUM_BLOCKS * block_bytes,
        enforce_eager=args.eager,
    )


def count_preemptions(counts: Counter[str]) -> None:
    preempt = Scheduler._preempt

    def counting(self: Scheduler, request: Request) -> None:
        counts["preempted"] += 1
        preempt(self, request)

    Scheduler._preempt = counting  # type: ignore[method-assign]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-tp", type=int, default=1)
    parser.add_argument("-pp", type=int, default=1)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--wave", type=int, default=250, help="requests at a time")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline-s", type=float, default=3600, help="a hang ends with every rank's stack")
    return parser.parse_args()


def run(llm: LLM, args: argparse.Namespace) -> None:
    soak, started = Soak(llm, args.seed), time.perf_counter()
    count_preemptions(soak.counts)
    num_waves = -(-args.requests // args.wave)
    warm: list[Memory] = []
    say(
        llm,
        "requests     steps  aborted  preempted   seconds  MiB resident, on GPU  objects (highest rank)",
    )
    for number in range(1, num_waves + 1):
        soak.run_wave(args.wave)
        if number % -(-num_waves // NUM_ROWS) == 0 or number == num_waves:
            ranks = memory_of_ranks(llm)
            say(llm, row(llm, soak, number * args.wave, time.perf_counter() - started, ranks))
            if number >= WARM_SHARE * num_waves:
                warm = warm or ranks
    for rank, (now, before) in enumerate(zip(ranks, warm, strict=True)):
        now.check_growth(before, LIMITS[llm.device.type], rank)
    say(llm, f"tp {args.tp} pp {args.pp}: passed, samples that ended: {dict(soak.counts)}")


def row(llm: LLM, soak: Soak, num_requests: int, seconds: float, ranks: list[Memory]) -> str:
    steps = llm._coordinator._scheduler.step if llm.is_root else 0
    highest = [
        max(getattr(memory, name) for memory in ranks) for name in ("resident_bytes", "cuda_bytes", "objects")
    ]
    return (
        f"{num_requests:8} {steps:9} {soak.counts['abort']:8} {soak.counts['preempted']:10} {seconds:9.1f} "
        f"{highest[0] / 2**20:10.1f} {highest[1] / 2**20:10.1f} {highest[2]:9}"
    )


def say(llm: LLM, line: str) -> None:
    if llm.is_root:
        print(line, flush=True)


def main() -> None:
    args = parse()
    faulthandler.dump_traceback_later(args.deadline_s, exit=True)
    with tempfile.TemporaryDirectory() as folder, engine(args, Path(folder)) as llm:
        run(llm, args)


if __name__ == "__main__":
    main()
