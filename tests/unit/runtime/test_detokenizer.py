"""Incremental text against the full decode, and stop strings against a plain search."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from distllm.engine.tokenizer import Tokenizer
from distllm.runtime.detokenizer import REPLACEMENT, Detokenizer, StopStrings

ALPHABETS = ["abc xyz.", "äöüßéñ ", "漢字かな", "🙂👩‍👩‍👧‍👦🇩🇪", "שלום עולם", "\x00\x1f\u200b\u2028 "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer so small that most characters are split over tokens."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    library.train_from_iterator(["abc abd ".join(ALPHABETS)], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return Tokenizer(Path(path))


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(0, 30)))


def test_increments_join_to_the_full_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text, prompt = random_text(rng), tokenizer.encode(random_text(rng))
        ids = tokenizer.encode(text)
        detokenizer = Detokenizer(tokenizer, prompt)
        parts = [detokenizer.add(token_id) for token_id in ids]
        assert not any(part.endswith(REPLACEMENT) for part in parts)
        assert "".join(parts) + detokenizer.flush() == text


def test_an_unfinished_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂")[:-1]
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(detokenizer.add(token_id) for token_id in ids)
    assert text == "a"
    assert text + detokenizer.flush() == tokenizer.decode(ids)


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
