"""CRC-32 of stored bytes, whole or joined from parts, so that threads can check one tensor together.

Against damage, not against forgery: nothing in an engine is signed, and a cryptographic hash would read
slower than the disk.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch

from distllm.engine.dtypes import tensor_bytes

POLYNOMIAL = 0xEDB88320  # of CRC-32; the highest bit of a number is the lowest power of x
ONE, X = 1 << 31, 1 << 30


def crc32(content: torch.Tensor) -> int:
    """Of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor_bytes(content))


def joined_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two parts one after the other, from those of each. As crc32_combine of zlib in C."""
    return _multiply(_power_of_x(8 * second_bytes), first) ^ second


def as_hex(crc: int) -> str:
    """As engine.json keeps it."""
    return f"{crc:08x}"


def _multiply(a: int, b: int) -> int:
    """a · b modulo the polynomial, over bits."""
    product = 0
    for power in range(31, -1, -1):
        if a >> power & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache
def _power_of_x(exponent: int) -> int:
    power, square = ONE, X
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        exponent >>= 1
    return power
