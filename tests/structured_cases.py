"""A tiny model with a byte-level tokenizer, and random schemas and regexes of texts that come to an end."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distllm import StructuredOutputsParams
from tests.checkpoints import make_llama

NAMES = ["name", "age", "größe", "a b", 'q"uote', "back\\slash", "漢字", "x", "🙂", "tab\t"]
PATTERNS = ["^[a-z]{1,5}$", "^(ab|cd){1,3}$", "^[0-9]{4}-[0-9]{2}$", "^ä[^a-z]{0,3}$", "^v[0-9]{1,3}\\.?$"]
VOCAB_SIZE = 333  # more rows than the tokenizer has tokens, and no multiple of anything


def make_folder(folder: Path) -> Path:
    """Eos is token 2. The logits are close to each other: every token that may come does."""
    model = make_llama(folder, vocab_size=VOCAB_SIZE, num_hidden_layers=2, max_position_embeddings=2048)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    rng = random.Random(1)
    samples = [json.dumps(make_schema(rng, 2), ensure_ascii=False) for _ in range(50)]
    library.train_from_iterator(samples, trainer)
    return library


def make_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _pattern, _integer, _constant, _enum, _flag]
    kinds += [_array, _array, _object, _object, _any_of] if depth else []
    return rng.choice(kinds)(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    shortest = rng.randint(0, 3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 6)}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-500, 500)
    kind = rng.choice(["minimum", "exclusiveMinimum"])
    return {"type": "integer", kind: low, "maximum": low + rng.randint(1, 2000)}


def _constant(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice([0, -1.5, "ü", None, True, [1, "two"], {"k": []}])}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "grün", 'a"b', "\n", 1, 2.5, None, False, "🙂🙂"], rng.randint(1, 5))}


def _flag(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.sample(["boolean", "null"], rng.randint(1, 2))}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    shortest = rng.randint(0, 2)
    sizes = {"minItems": shortest, "maxItems": shortest + rng.randint(0, 2)}
    schema: dict[str, Any] = {"type": "array", "items": make_schema(rng, depth - 1), **sizes}
    if rng.random() < 0.3:
        schema |= {"prefixItems": [make_schema(rng, depth - 1)]}
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: make_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [make_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def make_regex(rng: random.Random, depth: int = 2) -> str:
    atoms = ["a", "[a-f]", "[^a-z]", "é", "\\.", "[0-9]", "漢", ".", "🙂", " "]
    parts = []
    for _ in range(rng.randint(1, 4)):
        inner = rng.choice(atoms)
        if depth and rng.random() < 0.4:
            inner = f"({make_regex(rng, depth - 1)}|{make_regex(rng, depth - 1)})"
        parts.append(inner + rng.choice(["", "", "?", "{1,3}", "{2}", "{0,4}"]))
    return "".join(parts)


HARD_SCHEMAS: list[dict[str, Any]] = [
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"type": "null"}, {"type": "null"}, {"$ref": "#/$defs/node"}]},
    }, "required": ["value", "next"], "additionalProperties": False}}},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}},
               {"properties": {"a": {"maximum": 5}}, "required": ["a"], "additionalProperties": False}]},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 0},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "array", "items": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}, "minItems": 3,
     "maxItems": 3},
    {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "object",
     "properties": {"c": {"enum": ["deep"]}}, "required": ["c"], "additionalProperties": False}},
     "required": ["b"], "additionalProperties": False}}, "required": ["a"], "additionalProperties": False},
]  # fmt: skip
HARD_REGEXES = ["a?", "(a|ab)(c|bcd)", "[0-9]{1,3}(\\.[0-9]{1,3}){3}", "(🙂|é){1,5}x", "\\n\\t?", "(a+)+$"]


def make_case(number: int) -> StructuredOutputsParams:
    """Hard ones first; then schemas, every third a regex."""
    hard = [*({"json": schema} for schema in HARD_SCHEMAS), *({"regex": regex} for regex in HARD_REGEXES)]
    if number < len(hard):
        return StructuredOutputsParams(**hard[number])
    rng = random.Random(number)
    if number % 3 == 0:
        return StructuredOutputsParams(regex=make_regex(rng))
    return StructuredOutputsParams(json=make_schema(rng, 2))


def check_text(form: StructuredOutputsParams, text: str) -> None:
    import jsonschema

    if form.regex is not None:
        assert re.fullmatch(form.regex, text), f"{text!r} does not match {form.regex}"
    if form.json is not None:
        validator = jsonschema.validators.validator_for({}, jsonschema.Draft202012Validator)
        validator(form.json, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))
    if form.choice is not None:
        assert text in form.choice


def cases(count: int) -> Iterator[StructuredOutputsParams]:
    return map(make_case, range(count))
