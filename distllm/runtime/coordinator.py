"""Coordinator: rank 0's share beyond running steps. Schedules, broadcasts plans, gives tokens to their
prompts.

Step n is planned, broadcast and launched before the results of step n − pp_size are read: the host works
while the stages do. Knows no layer and no shard.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from distllm.comm.base import Control
from distllm.comm.fatal import set_step
from distllm.errors import RequestError
from distllm.runtime.generation import Generation
from distllm.runtime.model_runner import ModelRunner
from distllm.runtime.plan_codec import encode, encode_end, encode_error, encode_masks
from distllm.runtime.request import Request
from distllm.runtime.scheduler import AcceptedToken, Scheduler
from distllm.runtime.structured.constraint import ConstraintThreads

# What a step consists of on rank 0, in order. In "wait" the host waits for the device, or finds it done.
PARTS = ("schedule", "broadcast", "launch", "wait", "deliver", "masks")

MASK_WAIT_S = 0.005  # until it is looked again whether there is anything to run

Watch = Callable[[str], AbstractContextManager[object]]


class Coordinator:
    def __init__(self, control: Control, scheduler: Scheduler, runner: ModelRunner, pp_size: int) -> None:
        self._control = control
        self._scheduler = scheduler
        self._runner = runner
        self._pp_size = pp_size
        self._constraints = ConstraintThreads()
        self.watch: Watch = nullcontext  # entered around each of PARTS, by name: how profilers see steps
        self._running: dict[str, Generation] = {}  # what run() has in hand, by request id
        self._changed: list[Generation] = []  # of the last step, to be yielded; abort() adds to it

    def admit(self, requests: Sequence[Request]) -> None:
        """Queue these requests, or none: RequestError if one could never fit."""
        try:
            for request in requests:
                self._scheduler.add(request)
        except RequestError:
            for request in requests:
                self._scheduler.abort(request)
            raise

    def run(self, generations: list[Generation]) -> Generator[Generation]:
        """Generate what was admitted, yielding a Generation each time it has new tokens; then release the
        workers. Beam searches run too; they have nothing to yield.

        Closing the iterator early aborts what is left. Rank 0 only, while every other rank is in run_worker.
        """
        owner = {request: generation for generation in generations for request in generation.requests}
        self._running = {generation.request_id: generation for generation in generations}
        try:
            while self._scheduler.has_unfinished:
                self._changed = self._step(owner)
                yield from self._changed  # which may grow meanwhile
        except GeneratorExit:
            for request in owner:
                self._scheduler.abort(request)
            self._finish(owner)
            raise
        self._finish(owner)

    def abort(self, request_id: str) -> None:
        """End all samples of a prompt, wherever they stand; run() yields it once more. An id that is unknown
        or finished is ignored.

        Rank 0 only, between two yields of run(). Not collective: the next plan no longer runs them, and that
        is all that the other ranks need to know.
        """
        generation = self._running.get(request_id)
        if generation is None or generation.finished:
            return
        for request in generation.requests:
            self._scheduler.abort(request)
        self._changed.append(generation)

    def refuse(self, text: str) -> None:
        """Tell the workers that this work was refused, and why."""
        self._control.bcast(encode_error(text))

    def _finish(self, owner: dict[Request, Generation]) -> None:
        self._running, self._changed = {}, []
        while self._scheduler.has_outstanding:
            self._step(owner)
        self._scheduler.check_integrity()
        self._control.bcast(encode_end())

    def _step(self, owner: dict[Request, Generation]) -> list[Generation]:
        """One step; the generations that have new tokens, each once, in order."""
        watch = self.watch
        with watch("schedule"):
            failed = self._take_up_masks(owner, 0)
            plan = self._scheduler.schedule()
        set_step(plan.step)
        # Through a pipeline, tokens reach the first stage in steps without rows as well.
        if self._pp_size > 1 or not plan.is_empty:
            with watch("broadcast"):
                if self._control.size > 1:
                    self._control.bcast(encode(plan))
            with watch("launch"):
                self._runner.run(plan)
        with watch("wait"):
            result = self._runner.result(plan.step - self._pp_size)
        with watch("deliver"):
            for request, start, logprobs in self._scheduler.take_scores(result):
                owner[request].add_prompt_logprobs(start, logprobs)
            changed = failed + self._deliver(self._scheduler.update(result), owner)
        with watch("masks"):
            if plan.awaits_masks:
                changed += self._send_masks(owner)
            elif plan.is_empty and not changed:  # all wait for masks
                changed += self._take_up_masks(owner, MASK_WAIT_S)
        return changed

    def _send_masks(self, owner: dict[Request, Generation]) -> list[Generation]:
        """What the last step may sample: its layers are running meanwhile. Requests that have ended need
        none; those that can have none end, and are given back."""
        failed: list[Generation] = []
        awaiting = self._scheduler.awaiting
        while any(r.num_tokens_in_mask < r.num_output_tokens for r in awaiting if r.finish_reason is None):
            failed += self._take_up_masks(owner, None)
        masks = {r.slot: r.constraint.mask for r in awaiting if r.constraint and r.finish_reason is None}
        if self._control.size > 1:
            self._control.bcast(encode_masks(masks))
        self._runner.sample(masks)
        return failed

    def _take_up_masks(self, owner: dict[Request, Generation], timeout_s: float | None) -> list[Generation]:
        """Requests whose masks have come may run again; those that can have none end, and are given back."""
        failed: list[Generation] = []
        for request in self._constraints.collect(timeout_s):
            if request.constraint is None or request.finish_reason is not None:
                continue
            self._scheduler.resume(request)
            if request.constraint.error is not None:
                self._scheduler.finish(request, "error", request.constraint.error)
                failed.append(owner[request])
        return failed

    def _deliver(self, tokens: Iterable[AcceptedToken], owner: dict[Request, Generation]) -> list[Generation]:
        changed: dict[Generation, None] = {}
        constrained: dict[Request, list[int]] = {}
        for request, token_id, logprobs in tokens:
            generation = owner[request]
            changed[generation] = None
            if token_id is None:
                continue
            stop = generation.add_token(request, token_id, logprobs)
            if stop is not None:
                self._scheduler.finish(request, "stop", stop)
            if request.constraint is not None and request.finish_reason is None:
                constrained.setdefault(request, []).append(token_id)
        self._constraints.advance([each for each in constrained.items() if each[0].finish_reason is None])
        return list(changed)
