"""The messages of the control channel as int32 arrays: a step plan, the end of work, an error for all ranks.

Layout: [format, kind, number of words, body …]. Decode rows are written as ranges of slots, so that a steady
batch of any size costs the same. 64-bit values and text travel bit-cast. Knows no tensor and no communicator.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from distllm.errors import DistllmError
from distllm.runtime.plan import BlockUpdate, PrefillRow, RowInit, RowSampling, RowUpdate, StepPlan
from distllm.runtime.sampling.logit_controls import LogitControls

Words = npt.NDArray[np.int32]

FORMAT = 0x444C0004  # "DL", then the version of this layout
_STEP, _END, _ERROR, _DRAFT, _MASKS = 1, 2, 3, 4, 5
_HEADER_WORDS = 3
_SAMPLING = struct.Struct("<qdddd")  # seed, temperature, top_p, min_p, typical_p
_BIAS = struct.Struct("<id")  # token id, what is added: three words
_PENALTIES = struct.Struct("<ddd")  # repetition, presence, frequency


@dataclass(frozen=True)
class End:
    """The work is done: workers return to the user's script."""


@dataclass(frozen=True)
class Error:
    """Every rank raises RequestError(text)."""

    text: str


@dataclass(frozen=True)
class DraftPlan:
    """A step of the draft model: for the ranks that have a share of it."""

    plan: StepPlan


@dataclass(frozen=True)
class Masks:
    """What the last step awaits before it samples: as StepPlan.token_masks."""

    token_masks: dict[int, bytes]


Message = StepPlan | DraftPlan | Masks | End | Error


def encode(plan: StepPlan, *, for_draft: bool = False) -> Words:
    """The plan as one message. Inverse of decode_message."""
    ranges = _slot_ranges(plan.decode_slots)
    words = [*_words(struct.pack("<q", plan.step)), len(plan.new_rows), len(plan.row_updates)]
    words += [len(plan.block_updates), len(plan.block_copies), len(ranges), len(plan.prefills)]
    words.append(int(plan.awaits_masks))
    for init in plan.new_rows:
        words += _encode_row_init(init)
    for row_update in plan.row_updates:
        words += [row_update.slot, row_update.start, row_update.num_computed_tokens]
        words += _list(row_update.token_ids)
    for update in plan.block_updates:
        words += [update.slot, update.start, len(update.block_ids), *update.block_ids]
    for pair in (*plan.block_copies, *ranges):
        words += pair
    for row in plan.prefills:
        words += [row.slot, row.num_tokens, int(row.samples), row.num_scored, row.num_drafts]
    return _message(_DRAFT if for_draft else _STEP, words, *_encode_masks(plan.token_masks))


def encode_masks(masks: dict[int, bytes]) -> Words:
    return _message(_MASKS, [], *_encode_masks(masks))


def encode_end() -> Words:
    return _message(_END, [])


def encode_error(text: str) -> Words:
    data = text.encode()
    return _message(_ERROR, [len(data), *_words(data + bytes(-len(data) % 4))])


def decode_message(array: Words) -> Message:
    """Raises DistllmError for anything that the functions above do not write."""
    assert array.dtype == np.int32 and array.ndim == 1, (
        f"a message is 1-D int32, not {array.ndim}-D {array.dtype}"
    )
    reader = _Reader(array.data)
    kind = reader.check_header()
    if kind not in _DECODERS:
        raise DistllmError(f"control message of unknown kind {kind}")
    message = _DECODERS[kind](reader)
    reader.check_end()
    return message


class _Reader:
    """Takes words off the front of a message; every read checks that they are there."""

    def __init__(self, words: memoryview) -> None:
        self.words, self.position = words, 0

    @property
    def has_more(self) -> bool:
        return self.position < len(self.words)

    def take(self, count: int) -> list[int]:
        return self.take_view(count).tolist()

    def take_view(self, count: int) -> memoryview:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self.words):
            raise DistllmError(
                f"control message is damaged: {count} words wanted at word {start} of {len(self.words)}"
            )
        return self.words[start : self.position]

    def take_list(self) -> tuple[int, ...]:
        return tuple(self.take(*self.take(1)))

    def unpack(self, packed: struct.Struct) -> Any:
        return packed.unpack(_bytes(self.take(packed.size // 4)))

    def check_header(self) -> int:
        """The kind of the message, once format and length are known to be right."""
        version, kind, length = self.take(_HEADER_WORDS)
        if version != FORMAT:
            raise DistllmError(
                f"control message has format {version:#x}, this rank reads {FORMAT:#x}; "
                "every rank must run the same version of distllm"
            )
        if length != len(self.words):
            raise DistllmError(
                f"control message is damaged: {len(self.words)} words came, {length} were sent"
            )
        return kind

    def check_end(self) -> None:
        if self.position != len(self.words):
            raise DistllmError(
                f"control message is damaged: {len(self.words) - self.position} words left over"
            )


def _decode_step(reader: _Reader) -> StepPlan:
    (step,) = struct.unpack("<q", _bytes(reader.take(2)))
    num_new, num_row_updates, num_updates, num_copies, num_ranges, num_prefills, awaits = reader.take(7)
    plan = StepPlan(step, awaits_masks=bool(awaits))
    plan.new_rows = [_decode_row_init(reader) for _ in range(num_new)]
    plan.row_updates = [_decode_row_update(reader) for _ in range(num_row_updates)]
    plan.block_updates = [_decode_block_update(reader) for _ in range(num_updates)]
    plan.block_copies = [_decode_pair(reader) for _ in range(num_copies)]
    for start, count in [_decode_pair(reader) for _ in range(num_ranges)]:
        plan.decode_slots += range(start, start + count)
    plan.prefills = [_decode_prefill(reader) for _ in range(num_prefills)]
    plan.token_masks = _decode_masks(reader) if reader.has_more else {}
    return plan


def _decode_end(reader: _Reader) -> End:
    return End()


def _decode_error(reader: _Reader) -> Error:
    (num_bytes,) = reader.take(1)
    return Error(_bytes(reader.take(-(-num_bytes // 4)))[:num_bytes].decode())


_DECODERS: dict[int, Callable[[_Reader], Message]] = {
    _STEP: _decode_step,
    _DRAFT: lambda reader: DraftPlan(_decode_step(reader)),
    _MASKS: lambda reader: Masks(_decode_masks(reader) if reader.has_more else {}),
    _END: _decode_end,
    _ERROR: _decode_error,
}


def _encode_masks(masks: dict[int, bytes]) -> list[Words]:
    """Nothing where there are none. A mask has thousands of words, which never become Python integers."""
    if not masks:
        return []
    sizes = [word for slot, mask in masks.items() for word in (slot, len(mask) // 4)]
    bits = np.frombuffer(b"".join(masks.values()), dtype=np.int32)
    return [np.array([len(masks), *sizes], dtype=np.int32), bits]


def _decode_masks(reader: _Reader) -> dict[int, bytes]:
    sizes = [_decode_pair(reader) for _ in range(*reader.take(1))]
    return {slot: reader.take_view(num_words).tobytes() for slot, num_words in sizes}


def _encode_row_init(init: RowInit) -> list[int]:
    sampling = init.sampling
    packed = _SAMPLING.pack(
        sampling.seed, sampling.temperature, sampling.top_p, sampling.min_p, sampling.typical_p
    )
    return [
        *(init.slot, init.num_prompt_tokens, init.num_computed_tokens),
        *_list(init.token_ids),
        *_words(packed),
        *(sampling.top_k, sampling.num_logprobs, sampling.min_tokens, sampling.num_prompt_logprobs),
        *_list(sampling.stop_token_ids),
        *([0] if sampling.controls is None else [1, *_encode_controls(sampling.controls)]),
    ]


def _encode_controls(controls: LogitControls) -> list[int]:
    bias = [word for pair in controls.logit_bias for word in _words(_BIAS.pack(*pair))]
    penalties = controls.repetition_penalty, controls.presence_penalty, controls.frequency_penalty
    return [
        *_words(_PENALTIES.pack(*penalties)),
        controls.no_repeat_ngram_size,
        *_list(controls.allowed_token_ids),
        *_list(controls.processors),
        *(len(controls.logit_bias), *bias),
        *(len(controls.bad_words), *(word for words in controls.bad_words for word in _list(words))),
    ]


def _list(values: Sequence[int]) -> list[int]:
    """Their number, then they themselves."""
    return [len(values), *values]


def _decode_row_init(reader: _Reader) -> RowInit:
    slot, num_prompt_tokens, num_computed_tokens = reader.take(3)
    token_ids, sampling = reader.take_list(), _decode_sampling(reader)
    return RowInit(slot, token_ids, num_prompt_tokens, num_computed_tokens, sampling)


def _decode_row_update(reader: _Reader) -> RowUpdate:
    slot, start, num_computed_tokens = reader.take(3)
    return RowUpdate(slot, start, reader.take_list(), num_computed_tokens)


def _decode_sampling(reader: _Reader) -> RowSampling:
    seed, temperature, top_p, min_p, typical_p = reader.unpack(_SAMPLING)
    top_k, num_logprobs, min_tokens, num_prompt_logprobs = reader.take(4)
    stops = reader.take_list()
    controls = _decode_controls(reader) if reader.take(1)[0] else None
    return RowSampling(
        temperature, top_k, top_p, min_p, seed, num_logprobs, min_tokens, stops, typical_p,
        num_prompt_logprobs, controls,
    )  # fmt: skip


def _decode_controls(reader: _Reader) -> LogitControls:
    repetition, presence, frequency = reader.unpack(_PENALTIES)
    (ngram_size,) = reader.take(1)
    allowed, processors = reader.take_list(), reader.take_list()
    bias = tuple(reader.unpack(_BIAS) for _ in range(*reader.take(1)))
    bad_words = tuple(reader.take_list() for _ in range(*reader.take(1)))
    return LogitControls(allowed, bad_words, ngram_size, bias, repetition, presence, frequency, processors)


def _decode_block_update(reader: _Reader) -> BlockUpdate:
    slot, start, count = reader.take(3)
    return BlockUpdate(slot, start, tuple(reader.take(count)))


def _decode_pair(reader: _Reader) -> tuple[int, int]:
    first, second = reader.take(2)
    return first, second


def _decode_prefill(reader: _Reader) -> PrefillRow:
    slot, num_tokens, samples, num_scored, num_drafts = reader.take(5)
    return PrefillRow(slot, num_tokens, bool(samples), num_scored, num_drafts)


def _slot_ranges(slots: Sequence[int]) -> list[tuple[int, int]]:
    """(start, count) of each run of consecutive slots, in order."""
    if slots and slots[-1] - slots[0] == len(slots) - 1:  # they ascend: no gap, as in a steady batch
        return [(slots[0], len(slots))]
    starts = [i for i, slot in enumerate(slots) if i == 0 or slot != slots[i - 1] + 1]
    return [(slots[i], j - i) for i, j in pairwise([*starts, len(slots)])]


def _message(kind: int, body: list[int], *rest: Words) -> Words:
    length = _HEADER_WORDS + len(body) + sum(map(len, rest))
    words = np.array([FORMAT, kind, length, *body], dtype=np.int32)
    return np.concatenate([words, *rest]) if rest else words


def _words(data: bytes) -> list[int]:
    """Bytes, a multiple of four, as int32 words."""
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def _bytes(words: list[int]) -> bytes:
    return struct.pack(f"<{len(words)}i", *words)
