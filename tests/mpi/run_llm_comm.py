"""Two engines in one job: each half of the world passes its communicator to LLM, and prints its tokens."""

from __future__ import annotations

from mpi4py import MPI

from distllm import LLM, SamplingParams

world = MPI.COMM_WORLD
half = world.Split(world.rank // 2, world.rank)
with LLM("demo", tensor_parallel_size=2, comm=half) as llm:
    outputs = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert (outputs == []) == (half.rank != 0)
    for output in outputs:
        print("tokens", *output.outputs[0].token_ids, flush=True)
assert half.allreduce(1) == 2, "the caller's communicator stays open"
