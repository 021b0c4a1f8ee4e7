"""Every bound of SamplingParams: the last value inside is taken, the first outside refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from distllm.errors import RequestError
from distllm.runtime.sampling.sampling_params import SamplingParams

INF, NAN = float("inf"), float("nan")
NUMBERS = (
    "n", "temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "no_repeat_ngram_size", "seed", "max_tokens", "min_tokens", "logprobs",
    "prompt_logprobs",
)  # fmt: skip
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")

BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("n", [1, 64], [0, -1, 65, 1.0]),
    ("temperature", [0, 0.0, 1e-9, 100.0], [-0.1, 100.1, INF, -INF, NAN, 10**400, -(10**400)]),
    ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31, 1.5]),
    ("top_p", [1e-9, 1, 1.0], [0, 0.0, -0.0, -0.1, 1.0001, INF, NAN]),
    ("min_p", [0, 0.0, 1.0], [-0.1, 1.0001, INF, NAN]),
    ("typical_p", [1e-9, 1, 1.0], [0, -0.1, 1.0001, INF, NAN]),
    ("presence_penalty", [-2, 0.0, 2], [-2.01, 2.01, INF, NAN]),
    ("frequency_penalty", [-2, 0.0, 2], [-2.01, 2.01, INF, NAN]),
    ("repetition_penalty", [1e-3, 1, 100], [0, -1, 100.1, INF, NAN]),
    ("no_repeat_ngram_size", [0, 1024], [-1, 1025, 2.0]),
    (
        "logit_bias",
        [None, {}, {0: -100, 2**31 - 1: 100.0}, dict.fromkeys(range(1024), 1)],
        [[], [(1, 2)], {0: 100.1}, {0: NAN}, {0: "1"}, dict.fromkeys(range(10**6), 1)],
    ),
    ("allowed_token_ids", [None, [0], (7,) * 2**18], [[], 7, "7", [7] * (2**18 + 1)]),
    ("bad_words", [None, [], ["x"], ["x" * 256] * 256], ["x", [""], ["x"] * 257, ["x" * 10**7], [5]]),
    ("logits_processors", [None, [], ["mine"]], ["mine", [""], ["x"] * 17, [print]]),
    ("seed", [None, -(2**63), 0, 2**63 - 1], [-(2**63) - 1, 2**63, 0.5]),
    ("max_tokens", [None, 1, 2**31 - 1], [0, -1, 2**31, 1.5]),
    ("min_tokens", [0, 16], [-1, 17, 2**31, 1.5, None]),
    ("logprobs", [None, 0, 20], [-1, 21, 1.5]),
    ("prompt_logprobs", [None, 0, 20], [-1, 21, 1.5]),
    (
        "stop",
        [None, "x", [], ["x"] * 64, ("x" * 1024,)],
        ["", [""], ["x"] * 65, ["x" * 1025], 5, [5], b"x", {"x": 1}],
    ),
    (
        "stop_token_ids",
        [None, [], [0], (2**31 - 1,), [7] * 64],
        [[-1], [2**31], [7] * 65, [1.0], ["1"], [True], 7, "7"],
    ),
    *((flag, [True, False], [None, 0, 1, "yes"]) for flag in FLAGS),
]


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, good, _ in BOUNDS for v in good])
def test_taken(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) is value


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, _, bad in BOUNDS for v in bad])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    text = str(caught.value)
    assert text.startswith(name) and "\n" not in text and len(text) < 200


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, False, "1", [1], b"1", 1j])
def test_what_is_not_a_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} is .*; it must be (a number|an integer)$"):
        SamplingParams(**{name: value})


def test_messages_have_field_value_and_limit() -> None:
    for kwargs, text in [
        ({"temperature": -0.5}, "temperature is -0.5; it must be between 0.0 and 100.0"),
        ({"logprobs": 21}, "logprobs is 21; it must be between 0 and 20"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4; it must be at most max_tokens, 3"),
        ({"stop": ["a", "b" * 1025]}, "stop[1] has 1025 characters; it must have 1 to 1024"),
        ({"stop_token_ids": [1, -2]}, "stop_token_ids[1] is -2; it must be between 0 and 2147483647"),
        (
            {"stop": "a", "detokenize": False},
            "stop needs detokenize=True; it is False: set it or use stop_token_ids",
        ),
    ]:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**kwargs)  # type: ignore[arg-type]
        assert str(caught.value) == text


def test_min_tokens_is_free_without_max_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6


def test_stop_strings_are_always_a_tuple() -> None:
    stops = [SamplingParams(stop=stop).stop_strings for stop in (None, "ab", ["ab", "c"])]
    assert stops == [(), ("ab",), ("ab", "c")]
