"""What a piece of a tokenizer.json writes, as bytes, by the file's own decoder.

Byte-level pieces and byte fallbacks can be parts of characters, which the decoder itself gives only as
U+FFFD; everything else it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from distllm.errors import RequestError

STRINGS_TOGETHER = {"Sequence", "ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
BYTE = re.compile("<0x([0-9A-F]{2})>")


def bytes_of_pieces(decoder: Any) -> Callable[[str], bytes]:
    """decoder: of the tokenizers library. Raises RequestError if it does more than string pieces together."""
    kinds = {"none"} if decoder is None else set(_kinds(json.loads(decoder.__getstate__())))
    if not kinds <= STRINGS_TOGETHER:
        raise RequestError(
            "structured_outputs need a tokenizer whose texts are its tokens' texts strung together; "
            f"the decoder of this one is {', '.join(sorted(kinds - STRINGS_TOGETHER))}"
        )
    if "ByteLevel" in kinds:
        return _byte_level

    def written(piece: str) -> bytes:
        byte = BYTE.fullmatch(piece) if "ByteFallback" in kinds else None
        text: str = "" if byte else decoder.decode(["a", piece, "a"])[1:-1]  # not at the border of a text
        return bytes.fromhex(byte[1]) if byte else text.encode()

    return written


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for inner in decoder.get("decoders", ()):
        yield from _kinds(inner)


def _byte_level(piece: str) -> bytes:
    """A piece with any other character is meant as it is."""
    return bytes(map(BYTE_OF.__getitem__, piece)) if BYTE_OF.keys() >= {*piece} else piece.encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's: printable characters of Latin-1 are themselves, the other bytes are numbered on from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_level_table()
