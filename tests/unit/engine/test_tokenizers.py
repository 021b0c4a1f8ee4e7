"""Every kind of tokenizer against another reading of the same file: transformers, sentencepiece itself, a
brute-force byte-pair merge. Then what is wrong with a folder, one clear line each.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distllm.engine.tokenizers import Tokenizer, load_tokenizer
from distllm.engine.tokenizers.decoders import bytes_of_pieces
from distllm.errors import CheckpointError, RequestError
from tests.tokenizers import KINDS, LOSSLESS, random_text, rank_lines, train_pieces, write_json


def load(kind: str, folder: Path) -> Tokenizer:
    KINDS[kind](folder)
    return loaded(folder)


def loaded(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def texts(count: int = 200) -> list[str]:
    rng = random.Random(11)
    return [random_text(rng) for _ in range(count)]


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_text_comes_back(kind: str, tmp_path: Path) -> None:
    tokenizer = load(kind, tmp_path)
    for text in texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode_plain(text)) == text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_texts_are_what_their_tokens_write(kind: str, tmp_path: Path) -> None:
    """Inside a text: some put a blank before the first word, and take it away again."""
    tokenizer = load(kind, tmp_path)
    for text in texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        written = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
        decoded = tokenizer.decode(ids)
        if kind in ("unigram", "sp_unigram") and decoded not in (written, written[1:]):
            assert "\u2047" in decoded or "<unk>" in decoded  # what is no token has no bytes
            continue
        assert decoded in (written, written.removeprefix(" ")), text
    assert not any(map(tokenizer.token_bytes, tokenizer.special_tokens.values()))
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_every_byte_is_some_token(tmp_path: Path) -> None:
    for kind in sorted(LOSSLESS):
        (tmp_path / kind).mkdir()
        tokenizer = load(kind, tmp_path / kind)
        assert {bytes([byte]) for byte in range(128)} <= set(
            map(tokenizer.token_bytes, range(tokenizer.vocab_size))
        )


def test_a_decoder_that_does_more_is_refused() -> None:
    from tokenizers import decoders

    with pytest.raises(RequestError, match="the decoder of this one is WordPiece"):
        bytes_of_pieces(decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]))


def test_plain_text_spells_no_special_token(tmp_path: Path) -> None:
    for kind, special in [("byte_level", "<|end|>"), ("sp_bpe", "</s>"), ("glm4", "<|user|>")]:
        (tmp_path / kind).mkdir()
        tokenizer = load(kind, tmp_path / kind)
        token_id, text = tokenizer.special_tokens[special], f"a{special}b"
        assert token_id in tokenizer.encode(text)
        assert token_id not in tokenizer.encode_plain(text)
        assert tokenizer.decode(tokenizer.encode_plain(text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == "ab"
        assert special in tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram"])
def test_tokenizer_json_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load(kind, tmp_path)
    reference: Any = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in texts():
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("kind", ["sp_bpe", "sp_bpe_no_prefix", "sp_unigram"])
def test_pieces_are_those_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = load(kind, tmp_path)
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in texts():
        assert tokenizer.encode(text) == [reference.bos_id(), *reference.EncodeAsIds(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == reference.Decode(reference.EncodeAsIds(text))


def merge_brute_force(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """Byte-pair merging as it is defined: join the neighbours of lowest rank until none are in the table."""
    parts = [word[at : at + 1] for at in range(len(word))]
    while True:
        joined = [(ranks.get(a + b, len(ranks)), at) for at, (a, b) in enumerate(pairwise(parts))]
        if not joined or min(joined)[0] == len(ranks):
            return [ranks[part] for part in parts]
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ranks_against_brute_force(tmp_path: Path) -> None:
    import regex

    tokenizer = load("glm4", tmp_path)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in rank_lines().splitlines()}
    words = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for text in [*texts(), "the 12345 cats'LL sit\r\n\n  !? x"]:
        expected = [i for word in words.findall(text) for i in merge_brute_force(ranks, word.encode())]
        assert tokenizer.encode_plain(text) == expected
        assert tokenizer.encode(text) == [len(ranks) + 2, len(ranks) + 4, *expected]


def test_qwen_appends_chatml_and_composes_characters(tmp_path: Path) -> None:
    tokenizer = load("qwen", tmp_path)
    num_ranks = len(rank_lines().splitlines())
    assert tokenizer.special_tokens["<|im_end|>"] == num_ranks + 2
    assert tokenizer.vocab_size == num_ranks + 208  # as 151643 and 151851
    assert tokenizer.stop_token_ids == {num_ranks, num_ranks + 2}
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


@pytest.mark.parametrize("version", [2, 3])
def test_chatglm_appends_its_specials(version: int, tmp_path: Path) -> None:
    """chatglm3-6b has 64789 pieces before them: [gMASK] 64790, sop 64792, roles 64794 … 64797."""
    train_pieces(tmp_path / "tokenizer.model")
    num_pieces = loaded(tmp_path).vocab_size
    source = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": f"THUDM/chatglm{version}-6b"}
    write_json(tmp_path / "tokenizer_config.json", source)
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode("ab")[:2] == [num_pieces + 1, num_pieces + 3]
    assert tokenizer.vocab_size == num_pieces + (9 if version == 3 else 5)
    assert tokenizer.stop_token_ids == ({num_pieces + 6, num_pieces + 8} if version == 3 else set())
    assert len(tokenizer.encode("[gMASK]")) > 3, "a special token in a text is letters"


def test_added_tokens_beside_pieces(tmp_path: Path) -> None:
    """Old fine-tunes list them in added_tokens.json alone; which are special, tokenizer_config.json says."""
    train_pieces(tmp_path / "tokenizer.model")
    end, tool = loaded(tmp_path).vocab_size, loaded(tmp_path).vocab_size + 1
    write_json(tmp_path / "added_tokens.json", {"<tool>": tool, "<|im_end|>": end})
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}})
    tokenizer = loaded(tmp_path)
    ids = tokenizer.encode("a<tool>b<|im_end|>", add_special_tokens=False)
    assert [i for i in ids if i >= end] == [tool, end]
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<tool>b<|im_end|>"


def test_bos_is_added_as_the_config_says(tmp_path: Path) -> None:
    train_pieces(tmp_path / "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": True})
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode("ab") == [*tokenizer.encode_plain("ab"), tokenizer.special_tokens["</s>"]]


def test_added_tokens_that_tokenizer_json_lacks(tmp_path: Path) -> None:
    last = load("byte_level", tmp_path).vocab_size
    token = {"content": "<|new|>", "special": True}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(last): token}})
    assert loaded(tmp_path).encode("<|new|>") == [last]
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(last + 1): token}})
    with pytest.raises(CheckpointError, match=rf"'<\|new\|>' has id {last}, but {last + 1}"):
        load_tokenizer(tmp_path)


def config(**data: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "tokenizer_config.json", data)


def ranks(data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "qwen.tiktoken").write_bytes(data)


def outside(folder: Path) -> None:
    (folder / "tokenizer.model").symlink_to("/etc/hostname")


LINES = rank_lines().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot read .*tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\0"), "cannot read .*tokenizer.json"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b""), "no SentencePiece model"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"\x0a\x05ab"), "no SentencePiece model"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(random.Random(1).randbytes(999)), "no Sent"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(rank_lines()), "tokenizer_class '' is unk"),
        (outside, "lies outside the folder"),
        (ranks(b"".join(LINES[:-3] + LINES[-2:])), "266 ranks are not 0 … 265"),
        (ranks(b"".join([*LINES, LINES[0]])), None),  # said twice, to the same end
        (ranks(b"".join(LINES[1:])), "266 ranks are not 0 … 265"),
        (ranks(b"".join([*LINES, b"YWJjZA== -1\n"])), "line 268 is no token and rank"),
        (ranks(b"".join([*LINES, b"YWJjZ 263\n"])), "line 268 is no base64"),
        (ranks(b"YWI= 0\n"), "a byte has no rank"),
        (config(added_tokens_decoder={"x": {"content": "a"}}), "'a' with id 'x' is no token"),
        (config(added_tokens_decoder={"99999999": "a"}), "'a' with id 99999999 is no token"),
        (config(added_tokens_decoder=[1]), "added_tokens_decoder is no object"),
        (config(eos_token=5), "eos_token is 5; it must be a text"),
        (config(chat_template=[{"name": "x"}]), "no list of names and templates"),
        (config(chat_template=5), "chat_template is no text"),
        (
            lambda folder: write_json(folder / "added_tokens.json", {"a": True}),
            "'a' with id True is no token",
        ),
    ],
)
def test_one_clear_line(damage: Callable[[Path], Any], message: str | None, tmp_path: Path) -> None:
    damage(tmp_path)
    if message is None:
        assert load_tokenizer(tmp_path)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_added_token_cannot_take_a_piece_over(tmp_path: Path) -> None:
    train_pieces(tmp_path / "tokenizer.model")
    write_json(tmp_path / "added_tokens.json", {"<evil>": 9})
    with pytest.raises(CheckpointError, match=re.escape("id 9 is '<0x06>', but '<evil>'")):
        load_tokenizer(tmp_path)


def test_a_folder_without_any(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
