"""Host time of a steady decode step: what rank 0 does beside running the model, and the workers' decode.

    python benchmarks/bench_scheduler.py

No device and no ranks: sampled ids are random numbers. All requests decode, nobody enters or leaves, one in
sixteen takes a block. Medians over the steps of a run; the best of several runs: other work only adds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from time import perf_counter_ns

from distllm.runtime.generation import Generation
from distllm.runtime.plan import RowSampling, StepResult
from distllm.runtime.plan_codec import decode_message, encode
from distllm.runtime.request import Request
from distllm.runtime.sampling.sampling_params import SamplingParams
from distllm.runtime.scheduler import AcceptedToken, Scheduler, SchedulerConfig

BATCH_SIZES = (1, 32, 256)
PARTS = ("schedule", "encode", "update", "add_token", "decode")  # the last is the workers'
NUM_STEPS, NUM_WARM_UP, NUM_RUNS = 300, 20, 7
BLOCK_SIZE, VOCAB_SIZE, EOS = 16, 128_000, 128_001

Owner = dict[Request, Generation]


def make_requests(count: int, rng: random.Random) -> Owner:
    """Prompts of 128 to 256 tokens, so that blocks fill up in different steps; ids only, no text."""
    owner: Owner = {}
    for index in range(count):
        prompt = tuple(rng.choices(range(VOCAB_SIZE), k=rng.randint(128, 256)))
        request = Request(str(index), prompt, 2 * NUM_STEPS, RowSampling(), frozenset([EOS]))
        owner[request] = Generation(str(index), None, SamplingParams(detokenize=False), [request], None)
    return owner


def make_scheduler(owner: Owner) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=len(owner),
        max_num_batched_tokens=256 * len(owner),
        max_model_len=1024,
        block_size=BLOCK_SIZE,
        num_blocks=1024 // BLOCK_SIZE * len(owner),
        enable_prefix_caching=True,
        depth=1,
    )
    scheduler = Scheduler(config)
    for request in owner:
        scheduler.add(request)
    return scheduler


def deliver(tokens: Sequence[AcceptedToken], owner: Owner) -> list[Generation]:
    """As the coordinator does, where no stop string ends a request."""
    changed: dict[Generation, None] = {}
    for request, token_id, logprobs in tokens:
        generation = owner[request]
        assert token_id is not None, "no processor can fail here"
        assert generation.add_token(request, token_id, logprobs) is None
        changed[generation] = None
    return list(changed)


def time_step(scheduler: Scheduler, owner: Owner, last: StepResult) -> list[int]:
    """Nanoseconds of each of PARTS in one step; last: the result of the step before."""
    times = [perf_counter_ns()]
    plan = scheduler.schedule()
    times.append(perf_counter_ns())
    message = encode(plan)
    times.append(perf_counter_ns())
    tokens = list(scheduler.update(last))
    times.append(perf_counter_ns())
    deliver(tokens, owner)
    times.append(perf_counter_ns())
    decode_message(message)
    times.append(perf_counter_ns())
    return [after - before for before, after in pairwise(times)]


def bench(batch_size: int) -> list[float]:
    """Median µs of each of PARTS over one run."""
    rng = random.Random(0)
    owner = make_requests(batch_size, rng)
    scheduler = make_scheduler(owner)
    results = [StepResult(-1, [])]
    results += [StepResult(n, rng.choices(range(VOCAB_SIZE), k=batch_size)) for n in range(NUM_STEPS)]
    steps = [time_step(scheduler, owner, result) for result in results]
    return [median(part) / 1000 for part in zip(*steps[NUM_WARM_UP:], strict=True)]


def main() -> None:
    print("µs per step    " + "".join(f"{part:>10}" for part in (*PARTS[:4], "= rank 0", "decode")))
    for batch_size in BATCH_SIZES:
        *coordinator, decode = min((bench(batch_size) for _ in range(NUM_RUNS)), key=sum)
        figures = (*coordinator, sum(coordinator), decode)
        print(f"batch {batch_size:>6}   " + "".join(f"{figure:10.1f}" for figure in figures))


if __name__ == "__main__":
    main()
