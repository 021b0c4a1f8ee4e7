"""Tiny tokenizers of every kind, trained on the spot, and random texts that are hard on them."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ALPHABETS = [
    "abc xyz.",
    "äöüßéñ ",
    "漢字かな",
    "🙂👩‍👩‍👧‍👦🇩🇪",
    "שלום עולם",
    "\x01\x1f\u200b\u2028 \t\n",
    "      ",
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(0, 20)))


def corpus() -> list[str]:
    rng = random.Random(5)
    return ["the cat sat on abc xyz ", *(random_text(rng) for _ in range(60))]


def byte_level(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(_byte_level())


@cache
def _byte_level() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    library.train_from_iterator(corpus(), trainer)
    return library.to_str()


def byte_fallback(folder: Path) -> None:
    """As Llama 2's: blanks are ▁, one is put before the text and taken away again."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcxyz.ä漢", "▁▁", "ab"]
    vocab = {token: number for number, token in enumerate(tokens)}
    library = Tokenizer(
        models.BPE(vocab, [("▁", "▁"), ("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.save(str(folder / "tokenizer.json"))


def unigram(folder: Path) -> None:
    """No byte fallback: what it does not know is lost."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(corpus(), trainer)
    library.save(str(folder / "tokenizer.json"))


def train_pieces(path: Path, model_type: str = "bpe", dummy_prefix: bool = True, **options: Any) -> None:
    path.write_bytes(_pieces(model_type, dummy_prefix, **options))


@cache
def _pieces(model_type: str, dummy_prefix: bool, **options: Any) -> bytes:
    import sentencepiece

    options = {
        "vocab_size": 330,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
    } | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([*corpus(), *["the cat sat on abc xyz. " * 9] * 40]),
        model_writer=model,
        model_type=model_type,
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def sp_bpe(folder: Path) -> None:
    train_pieces(folder / "tokenizer.model")


def sp_bpe_no_prefix(folder: Path) -> None:
    train_pieces(folder / "tokenizer.model", dummy_prefix=False)


def sp_unigram(folder: Path) -> None:
    """All of SentencePiece's own defaults: no bytes, blanks merged, NFKC."""
    train_pieces(
        folder / "tokenizer.model",
        "unigram",
        vocab_size=70,
        byte_fallback=False,
        remove_extra_whitespaces=True,
        normalization_rule_name="nmt_nfkc",
    )


def chatglm(folder: Path) -> None:
    train_pieces(folder / "tokenizer.model")
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm3-6b"},
    )


def rank_lines() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [text.encode() for text in ("ab", " x", "  ", "th", "the", "ש", "12", "123")]
    tokens += ["漢".encode()[:2], "漢".encode(), "🙂".encode()[:2]]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def qwen(folder: Path) -> None:
    (folder / "qwen.tiktoken").write_bytes(rank_lines())


def glm4(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(rank_lines())
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ChatGLM4Tokenizer"})


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


KINDS: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        byte_level,
        byte_fallback,
        unigram,
        sp_bpe,
        sp_bpe_no_prefix,
        sp_unigram,
        chatglm,
        qwen,
        glm4,
    )
}
LOSSLESS = {"byte_level", "byte_fallback", "sp_bpe", "sp_bpe_no_prefix", "chatglm", "glm4"}
