"""What is refused before it reaches the scheduler, and what a request is made of."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distllm.errors import RequestError
from distllm.runtime.admission import Admission
from distllm.runtime.sampling.sampling_params import SamplingParams


def admission(**overrides: Any) -> Admission:
    options = {"tokenizer": None, "vocab_size": 50, "max_model_len": 20, "eos_token_ids": (2, 3), "seed": 0}
    return Admission(**(options | overrides))


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([], None, "list of prompts is empty"),
        ([[]], None, "prompt is empty"),
        ("", None, "prompt is empty"),
        ("text", None, "no tokenizer.json, tokenizer.model or"),
        ([1, 50], None, "token id 50; the vocabulary is 0 … 49"),
        ([1, -1], None, "token id -1"),
        ([[1, True]], None, "holds True; token ids are integers"),
        ([[1.5]], None, "holds 1.5"),
        ([[1], None], None, "prompt 1: a prompt is a NoneType"),
        (5, None, "prompts is a int"),
        ([1] * 20, None, "20 tokens; max_model_len is 20"),
        ([[1], [2]], [SamplingParams()], "1 entries for 2 prompts"),
        ([1], SamplingParams(stop_token_ids=[77]), "stop_token_ids holds token id 77"),
        ([1], SamplingParams(stop="x"), "stop strings need a tokenizer"),
        ([1], SamplingParams(bad_words=["x"]), "bad_words need a tokenizer"),
        ([1], SamplingParams(logit_bias={50: 1}), "logit_bias holds token id 50"),
        ([1], SamplingParams(allowed_token_ids=[1, 50]), "allowed_token_ids holds token id 50"),
        ([1], SamplingParams(logits_processors=["x"]), "holds 'x'; the LLM was given: none"),
    ],
)
def test_refused(prompts: Any, params: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        admission().admit_all(prompts, params or SamplingParams())


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        ({"prompt_token_ids": [4]}, [(4,)]),
        ([{"prompt_token_ids": [4]}, [5]], [(4,), (5,)]),
    ],
)
def test_forms_of_prompts(prompts: Any, expected: list[tuple[int, ...]]) -> None:
    generations = admission().admit_all(prompts, SamplingParams())
    assert [generation.requests[0].prompt_token_ids for generation in generations] == expected


def only_request(params: SamplingParams, **overrides: Any) -> Any:
    return admission(**overrides).admit_all([1, 2, 3], params)[0].requests[0]


def test_limits_are_made_definite() -> None:
    assert only_request(SamplingParams(max_tokens=None)).max_tokens == 17
    assert only_request(SamplingParams(max_tokens=100)).max_tokens == 17
    assert only_request(SamplingParams(max_tokens=5)).max_tokens == 5


def test_eos_and_stop_tokens() -> None:
    assert only_request(SamplingParams()).stop_token_ids == {2, 3}
    assert only_request(SamplingParams(stop_token_ids=[7])).stop_token_ids == {2, 3, 7}
    assert only_request(SamplingParams(ignore_eos=True, stop_token_ids=[7])).stop_token_ids == {7}
    assert only_request(SamplingParams(min_tokens=1, ignore_eos=True)).sampling.stop_token_ids == (2, 3)
    assert only_request(SamplingParams()).sampling.stop_token_ids == ()


def test_sampling_row() -> None:
    row = only_request(SamplingParams(temperature=1e-6, top_k=-1, seed=2**63 - 1, n=2)).sampling
    assert (row.temperature, row.top_k, row.seed, row.num_logprobs) == (0.0, 0, 2**63 - 1, -1)
    second = admission().admit_all([1], SamplingParams(seed=2**63 - 1, n=2))[0].requests[1]
    assert second.sampling.seed == -(2**63), "seeds wrap in 64 bits"
    assert second.fork_from is not None and second.index == 1


class Words:
    """A token for each of these texts."""

    texts = ("bad", " bad", "word", " very", "very", " long")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        parts = re.findall("|".join(sorted(map(re.escape, self.texts), key=len, reverse=True)), text)
        return [self.texts.index(part) for part in parts]


def test_bad_words_with_and_without_a_space_before() -> None:
    controls = only_request(
        SamplingParams(bad_words=["bad", " word", "very long"]), tokenizer=Words()
    ).sampling.controls
    assert controls.bad_words == ((0,), (1,), (2,), (4, 5), (3, 5))


def test_controls_that_change_nothing_are_none() -> None:
    assert only_request(SamplingParams(logit_bias={}, bad_words=[])).sampling.controls is None
    row = only_request(SamplingParams(temperature=0, typical_p=0.5)).sampling
    assert row.typical_p == 1.0 and row.is_plain
    assert not only_request(SamplingParams(typical_p=0.5)).sampling.is_plain
    assert not only_request(SamplingParams(frequency_penalty=0.1)).sampling.is_plain


def test_seeds_are_drawn_in_order_from_the_engine_seed() -> None:
    def seeds(engine_seed: int) -> list[int]:
        source = admission(seed=engine_seed)
        return [source.admit_all([1], SamplingParams())[0].requests[0].sampling.seed for _ in range(4)]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 8
