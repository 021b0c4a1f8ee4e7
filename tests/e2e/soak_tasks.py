"""What the soak asks of an engine, random but for the seed, and what may come back. Knows no engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from distllm import CompletionOutput, RequestOutput, SamplingParams

VOCAB_SIZE, EOS, MAX_MODEL_LEN = 97, 2, 96


@dataclass(frozen=True)
class Task:
    prompt: list[int]
    params: SamplingParams
    priority: int = 0

    @property
    def max_tokens(self) -> int:
        room = MAX_MODEL_LEN - len(self.prompt)
        return room if self.params.max_tokens is None else min(room, self.params.max_tokens)

    @property
    def stops(self) -> set[int]:
        return {*(self.params.stop_token_ids or ()), *(() if self.params.ignore_eos else (EOS,))}

    def check(self, tokens: list[int], end: str | None, aborted: bool) -> None:
        """That a sample of this task may look like this."""
        assert all(0 <= token < VOCAB_SIZE for token in tokens), tokens
        assert not self.stops.intersection(tokens[:-1]), f"{tokens} goes on after one of {self.stops}"
        if end == "stop":
            assert tokens[-1] in self.stops and len(tokens) > self.params.min_tokens, (tokens, self)
        elif end == "length":
            assert len(tokens) == self.max_tokens, (tokens, self)
        else:
            assert end == "abort" and aborted and len(tokens) <= self.max_tokens, (end, self)


PROBE = Task([5, 6, 7] * 5, SamplingParams(temperature=0.9, seed=1, max_tokens=12, ignore_eos=True))


def random_params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice([rng.randint(1, 40)] * 19 + [None])
    return SamplingParams(
        n=rng.choice([1] * 8 + [2, 3]),
        temperature=rng.choice([0, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        seed=rng.choice([None, rng.randrange(2**40)]),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens or 8)]),
        stop_token_ids=rng.choice([None, rng.sample(range(VOCAB_SIZE), 3)]),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, None, None, 0, 3]),
    )


def random_tasks(rng: random.Random, count: int) -> list[Task]:
    """The probe first. Many prompts begin alike, with one of six texts, the same in every wave."""
    texts = [random.Random(seed).choices(range(VOCAB_SIZE), k=40) for seed in range(6)]
    tasks = [PROBE]
    while len(tasks) < count:
        prefix = rng.choice(texts)[: rng.choice([0, rng.randint(0, 40)])]
        prompt = prefix + rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 20))
        tasks.append(Task(prompt, random_params(rng), rng.choice([0, 0, 0, -1, 2])))
    return tasks


@dataclass
class Wave:
    """What came of a batch of tasks, by number of task and sample."""

    tasks: list[Task]
    aborted: set[int] = field(default_factory=set)
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    ends: dict[tuple[int, int], str] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)

    def take(self, number: int, output: RequestOutput) -> None:
        assert number not in self.finished, "an output after the last one"
        for part in output.outputs:
            self._take_sample(number, part)
        if output.finished:
            self.finished.add(number)

    def _take_sample(self, number: int, part: CompletionOutput) -> None:
        assert (number, part.index) not in self.ends, "a sample goes on after its end"
        assert part.logprobs is None or len(part.logprobs) == len(part.token_ids)
        self.tokens.setdefault((number, part.index), []).extend(part.token_ids)
        if part.finish_reason is not None:
            self.ends[number, part.index] = part.finish_reason

    def check(self) -> None:
        assert self.finished == set(range(len(self.tasks))), "a request did not end"
        assert len(self.ends) == sum(task.params.n for task in self.tasks), "a sample did not end"
        for key, end in self.ends.items():
            self.tasks[key[0]].check(self.tokens[key], end, key[0] in self.aborted)
