"""The loop of every rank but 0: take the next message from control, run it, until the work is done."""

from __future__ import annotations

from distllm.comm.base import Control
from distllm.comm.fatal import set_step
from distllm.errors import RequestError
from distllm.runtime.model_runner import ModelRunner
from distllm.runtime.plan_codec import DraftPlan, End, Error, Masks, decode_message


def run_worker(control: Control, runner: ModelRunner, draft_runner: ModelRunner | None = None) -> None:
    """Run rank 0's plans, and those for the draft model if this rank has a share of it, until it says that
    the work is done; waiting for the next one costs no core.

    Collective: every rank but 0, while rank 0 is in Coordinator. Raises RequestError with rank 0's text if it
    refused the work.
    """
    while True:
        message = decode_message(control.bcast(None, idle=True))
        if isinstance(message, End):
            return
        if isinstance(message, Error):
            raise RequestError(message.text)
        if isinstance(message, DraftPlan):
            if draft_runner is not None:
                draft_runner.run(message.plan)
            continue
        if isinstance(message, Masks):
            runner.sample(message.token_masks)
            continue
        set_step(message.step)
        runner.run(message)
