"""A job for fault tests: tp 2 × pp 2 ranks exchange what a decode exchanges, step by step, without a model.

Usage: decode_loop.py STEPS [FAULT RANK STEP], FAULT one of raise, refuse, exit, wait; RANK -1 is all of them.
Rank 0 prints `step n` as it goes.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from distllm.comm import fatal
from distllm.comm.base import Channels, Control
from distllm.comm.connect import open_channels, open_control
from distllm.errors import RequestError
from distllm.parallel.layout import RankLayout

NUM_LAYERS, HIDDEN_SIZE, BATCH = 4, 256, 8


def run_step(step: int, control: Control, channels: Channels, layout: RankLayout) -> None:
    plan = np.full(40, step, dtype=np.int32) if control.rank == 0 else None
    assert control.bcast(plan)[0] == step
    hidden = torch.ones(BATCH, HIDDEN_SIZE)
    if not layout.is_first_stage:
        channels.pipe.recv(hidden, layout.pp_rank - 1)
    for _ in range(NUM_LAYERS):
        channels.tp.all_reduce(hidden).div_(layout.tp_size)
    tokens = torch.full((BATCH,), step)
    if not layout.is_last_stage:
        channels.pipe.send(hidden, layout.pp_rank + 1)
        channels.tokens.recv(tokens, layout.pp_size - 1)
    else:
        channels.tokens.send(tokens, 0)
    assert hidden.eq(1).all() and tokens.eq(step).all()


def inject(fault: str, control: Control) -> None:
    """Do to this rank what the test asked for."""
    if fault == "raise":
        raise RuntimeError("injected failure")
    if fault == "refuse":
        raise RequestError("injected refusal")
    if fault == "exit":
        sys.exit(3)
    if fault == "wait":  # every rank but this one asks for work, without limit, and this one leaves
        sys.exit("left while others wait") if control.rank == 0 else control.bcast(None, idle=True)


def main() -> None:
    num_steps = int(sys.argv[1])
    fault, fault_rank, fault_step = (
        (*sys.argv[2:3], *map(int, sys.argv[3:])) if sys.argv[2:] else ("", -1, -1)
    )
    fatal.install()
    control = open_control(world_size_wanted=4)
    fatal.install(control)
    layout = RankLayout(tp_size=2, pp_size=2, rank=control.rank)
    channels = open_channels(control, layout)
    for step in range(num_steps):
        fatal.set_step(step)
        if step == fault_step and fault_rank in (control.rank, -1):
            inject(fault, control)
        run_step(step, control, channels, layout)
        if control.rank == 0 and step % 10 == 0:
            print(f"step {step}", flush=True)
        time.sleep(0.005)
    channels.close()
    control.close()


main()
