"""Plans survive the wire unchanged; damaged messages are refused; a steady step is small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.errors import DistllmError
from distllm.runtime.plan import BlockUpdate, PrefillRow, RowInit, RowSampling, RowUpdate, StepPlan
from distllm.runtime.plan_codec import (
    DraftPlan,
    End,
    Error,
    Masks,
    decode_message,
    encode,
    encode_end,
    encode_error,
    encode_masks,
)
from distllm.runtime.sampling.logit_controls import LogitControls

ids = st.integers(0, 2**31 - 1)
tuples_of_ids = st.lists(ids, max_size=9).map(tuple)
floats = st.floats(allow_nan=False)
controls = st.builds(
    LogitControls,
    allowed_token_ids=tuples_of_ids,
    bad_words=st.lists(tuples_of_ids, max_size=3).map(tuple),
    no_repeat_ngram_size=ids,
    logit_bias=st.lists(st.tuples(ids, floats), max_size=3).map(tuple),
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    processors=tuples_of_ids,
)
samplings = st.builds(
    RowSampling,
    temperature=floats,
    top_k=ids,
    top_p=floats,
    min_p=floats,
    seed=st.integers(-(2**63), 2**63 - 1),
    num_logprobs=st.integers(-1, 20),
    num_prompt_logprobs=st.integers(-1, 20),
    min_tokens=ids,
    stop_token_ids=tuples_of_ids,
    typical_p=floats,
    controls=st.none() | controls,
)
plans = st.builds(
    StepPlan,
    step=st.integers(0, 2**62),
    decode_slots=st.sets(ids | st.integers(0, 9)).map(sorted),
    prefills=st.lists(st.builds(PrefillRow, ids, st.integers(1, 3), st.booleans(), ids, ids)),
    new_rows=st.lists(st.builds(RowInit, ids, tuples_of_ids, ids, ids, samplings), max_size=4),
    row_updates=st.lists(st.builds(RowUpdate, ids, ids, tuples_of_ids, ids), max_size=4),
    block_updates=st.lists(st.builds(BlockUpdate, ids, ids, tuples_of_ids), max_size=4),
    block_copies=st.lists(st.tuples(ids, ids), max_size=4),
    token_masks=st.dictionaries(
        ids, st.integers(1, 3).map(lambda words: bytes(range(4 * words))), max_size=3
    ),
)


@settings(derandomize=True, database=None, deadline=None)
@given(plans)
def test_round_trip(plan: StepPlan) -> None:
    message = encode(plan)
    assert message.dtype == np.int32 and message.ndim == 1
    assert decode_message(message) == plan


@settings(derandomize=True, database=None, deadline=None)
@given(st.text())
def test_round_trip_of_errors(text: str) -> None:
    assert decode_message(encode_error(text)) == Error(text)


@pytest.mark.parametrize("masks", [{}, {3: bytes(range(8)), 0: bytes(12)}])
def test_round_trip_of_masks(masks: dict[int, bytes]) -> None:
    assert decode_message(encode_masks(masks)) == Masks(masks)
    assert decode_message(encode(StepPlan(4), for_draft=True)) == DraftPlan(StepPlan(4))


def test_round_trip_of_end() -> None:
    assert decode_message(encode_end()) == End()


@pytest.mark.parametrize("count", [1, 256, 4096])
def test_steady_decode_costs_56_bytes(count: int) -> None:
    assert encode(StepPlan(10**12, list(range(count)))).nbytes == 56


def test_a_gap_in_the_slots_costs_8_bytes_and_a_new_block_16() -> None:
    slots = [*range(100), *range(120, 256)]
    updates = [BlockUpdate(slot, 7, (slot + 1,)) for slot in range(16)]
    assert encode(StepPlan(1, slots)).nbytes == 56 + 8
    assert encode(StepPlan(1, slots, block_updates=updates)).nbytes == 56 + 8 + 16 * 16


def test_masks_cost_what_they_hold() -> None:
    masks = {slot: bytes(4000) for slot in range(64)}
    assert encode(StepPlan(1, list(range(64)), token_masks=masks)).nbytes == 56 + 4 * (2 * 64 + 1) + 64 * 4000


def test_a_cut_mask_is_refused() -> None:
    message = encode(StepPlan(1, [3], token_masks={3: bytes(range(40))}))
    for length in range(15, len(message)):
        cut = message[:length].copy()
        cut[2] = length
        with pytest.raises(DistllmError, match="words wanted at word"):
            decode_message(cut)


def test_the_batch_is_decodes_then_prefills() -> None:
    plan = StepPlan(1, [2, 5], [PrefillRow(9, 4, False), PrefillRow(0, 3, True)])
    assert (plan.num_rows, plan.num_tokens, plan.slots) == (4, 9, [2, 5, 9, 0])
    assert plan.cu_seqlens == [0, 1, 2, 6, 9]
    assert plan.sampled_slots == [2, 5, 0] and plan.sampled_places == [(0, 0), (1, 0), (3, 0)]


def test_drafts_and_the_token_before_them_sample() -> None:
    plan = StepPlan(1, [2], [PrefillRow(4, 3, True, num_drafts=2), PrefillRow(1, 5, False)])
    assert plan.sampled_slots == [2, 4, 4, 4]
    assert plan.sampled_places == [(0, 0), (1, 2), (1, 1), (1, 0)]


def test_an_empty_plan_has_no_rows() -> None:
    plan = StepPlan(1)
    assert (plan.num_rows, plan.num_tokens, plan.cu_seqlens, plan.sampled_places) == (0, 0, [0], [])


def test_every_truncation_is_refused() -> None:
    update, init = BlockUpdate(3, 0, (4, 5)), RowInit(3, (7, 8, 9), 3, 0, RowSampling(stop_token_ids=(1, 2)))
    row = RowUpdate(4, 9, (6, 7), 8)
    message = encode(StepPlan(1, [0, 1, 2, 3], [PrefillRow(9, 5, False)], [init], [row], [update], [(1, 2)]))
    for length in range(len(message)):
        with pytest.raises(DistllmError, match="control message is damaged"):
            decode_message(message[:length])
        if length >= 3:  # even if the header agrees
            cut = message[:length].copy()
            cut[2] = length
            with pytest.raises(DistllmError, match="words wanted at word"):
                decode_message(cut)


def test_left_over_words_are_refused() -> None:
    message = np.append(encode_end(), np.int32(0))
    message[2] += 1
    with pytest.raises(DistllmError, match="1 words left over"):
        decode_message(message)


def test_another_format_is_refused_and_says_what_to_do() -> None:
    message = encode_end()
    message[0] += 1
    with pytest.raises(DistllmError, match="every rank must run the same version of distllm"):
        decode_message(message)


def test_an_unknown_kind_is_refused() -> None:
    message = encode_end()
    message[1] = 9
    with pytest.raises(DistllmError, match="unknown kind 9"):
        decode_message(message)


def test_negative_counts_are_refused() -> None:
    message = encode_error("abc")
    message[3] = -8
    with pytest.raises(DistllmError, match="-2 words wanted"):
        decode_message(message)
