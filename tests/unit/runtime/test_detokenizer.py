"""Incremental text against the full decode, for every kind of tokenizer, and stop strings against a plain
search.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from distllm.engine.tokenizers import Tokenizer, load_tokenizer
from distllm.runtime.detokenizer import REPLACEMENT, Detokenizer, StopStrings
from tests.tokenizers import KINDS, byte_level, random_text

FEW, MANY = 400, 10_000


def load(kind: str, folder: Path) -> Tokenizer:
    KINDS[kind](folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def check_increments(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    parts = [detokenizer.add(token_id) for token_id in ids]
    assert not any(part.endswith(REPLACEMENT) for part in parts)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    full = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    assert before + "".join(parts) + detokenizer.flush() == full


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_increments_join_to_the_full_decode(kind: str, count: int, tmp_path: Path) -> None:
    """After another text, within one, and after none, with special tokens strewn in."""
    rng, tokenizer = random.Random(count), load(kind, tmp_path)
    specials = sorted(tokenizer.special_tokens.values())
    for _ in range(count):
        ids = tokenizer.encode_plain(random_text(rng))
        if specials and rng.random() < 0.2:
            ids += [rng.choice(specials), *tokenizer.encode_plain(random_text(rng))]
        prompt = tokenizer.encode(random_text(rng)) if rng.random() < 0.4 else []
        cut = rng.randint(0, len(ids)) if rng.random() < 0.5 else 0
        if not tokenizer.decode(ids[:cut]).endswith(REPLACEMENT):
            prompt, ids = prompt + ids[:cut], ids[cut:]
        check_increments(tokenizer, prompt, ids, skip=rng.random() < 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_at_all(kind: str, tmp_path: Path) -> None:
    """What no text encodes to, ids past the end included: nothing raises, no piece ends in half a
    character.
    """
    rng, tokenizer = random.Random(3), load(kind, tmp_path)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size + 20) for _ in range(rng.randint(1, 12))]
        detokenizer = Detokenizer(tokenizer, [], rng.random() < 0.5)
        assert not any(detokenizer.add(token_id).endswith(REPLACEMENT) for token_id in ids)
        detokenizer.flush()


def test_an_unfinished_character_comes_out_at_the_end(tmp_path: Path) -> None:
    tokenizer = load(byte_level.__name__, tmp_path)
    ids = tokenizer.encode("a🙂")[:-1]
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(detokenizer.add(token_id) for token_id in ids)
    assert text == "a"
    assert text + detokenizer.flush() == tokenizer.decode(ids)


def test_blanks_after_blanks_are_kept(tmp_path: Path) -> None:
    """SentencePiece drops every blank at the start of a text, and so of a window."""
    tokenizer = load("sp_unigram", tmp_path)
    ids = range(tokenizer.vocab_size)
    letter = next(i for i in ids if tokenizer.decode([i, i]) == "cc")
    blank = next(i for i in ids if tokenizer.decode([letter, i, letter]) == "c c")
    for blanks in range(1, 8):
        check_increments(tokenizer, [], [letter, *[blank] * blanks, letter], skip=True)
        check_increments(tokenizer, [letter, *[blank] * 9], [*[blank] * blanks, letter], skip=True)


def test_bytes_that_are_no_text_do_not_repeat_what_was_given_out(tmp_path: Path) -> None:
    tokenizer = load("byte_fallback", tmp_path)
    detokenizer = Detokenizer(tokenizer, [])
    ids = [*tokenizer.encode_plain("ü")[1:], 3 + 0xFF, *tokenizer.encode_plain("ab")[1:]]
    assert "".join(map(detokenizer.add, ids)) == "ü�ab"


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(include: bool) -> None:
    """Text fed in random pieces: cut where the first stop string begins, and never given out past its
    start.
    """
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 20)))
        stop = "".join(rng.choice("ab") for _ in range(rng.randint(1, 4)))
        stops, seen, found = StopStrings([stop], include), "", None
        while found is None and len(seen) < len(text):
            num_new = rng.randint(1, 3)
            piece = text[len(seen) : len(seen) + num_new]
            seen += piece
            found = stops.find(seen, len(piece))
            if found is None:
                rest = text.find(stop)
                assert stops.num_safe(seen) <= (rest if rest >= 0 else len(seen))
        if stop in text:
            at = text.index(stop)
            assert found == (stop, at + len(stop) if include else at)
        else:
            assert found is None


def test_safe_length_holds_back_only_what_may_begin_a_stop() -> None:
    stops = StopStrings(["\n\nQ:", "END"], False)
    assert stops.num_safe("hello") == 5
    assert stops.num_safe("hello\n\n") == 5
    assert stops.num_safe("hello EN") == 6
    assert StopStrings([], False).num_safe("hello") == 5
