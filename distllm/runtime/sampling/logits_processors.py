"""A user's own logits processors: Python that changes the logits of one row.

What one raises, or returns that nothing can be sampled from, is an error of that row's request alone. It goes
with the sampled tokens to rank 0, in a tensor of fixed size: every rank knows from the plan what travels.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distllm.runtime.staging import to_device

LogitsProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]
"""(prompt and output so far, logits [vocab_size] fp32) → logits. The same on every rank of tp."""

ERROR_BYTES = 256


class ProcessorError(Exception):
    """What is wrong, in one line."""


@dataclass(frozen=True)
class NamedProcessor:
    name: str
    function: LogitsProcessor

    def apply(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """What the function makes of its own copies. Raises ProcessorError."""
        try:
            found = self.function(token_ids.copy(), logits.clone())
        except Exception as error:  # whatever it is, it is the user's
            raise ProcessorError(f"logits processor {self.name!r} raised {_described(error)}") from None
        wrong = _wrong(found, logits)
        if wrong:
            raise ProcessorError(f"logits processor {self.name!r} returned {wrong}")
        return found


def _described(error: Exception) -> str:
    """With the place where it was raised, which is before the text: that may be cut."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {text}"


def _wrong(found: object, logits: torch.Tensor) -> str:
    if not isinstance(found, torch.Tensor):
        return f"a {type(found).__name__}; it must return the row of logits"
    if found.shape != logits.shape or not found.is_floating_point():
        return f"{list(found.shape)} of {found.dtype}; it must return {list(logits.shape)} of {logits.dtype}"
    highest = float(found.max())  # NaN if any is
    return "" if math.isfinite(highest) else f"logits whose highest is {highest}; it must be finite"


def errors_to_device(errors: Sequence[str], device: torch.device) -> torch.Tensor:
    """[len(errors), ERROR_BYTES] uint8; longer ones are cut."""
    padded = [error.encode()[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0") for error in errors]
    packed = np.frombuffer(b"".join(padded), np.uint8)
    return to_device(packed.reshape(len(errors), ERROR_BYTES), torch.uint8, device)


def errors_of(tensor: torch.Tensor) -> list[str]:
    """Inverse of errors_to_device, from the host."""
    return [row.numpy().tobytes().rstrip(b"\0").decode(errors="ignore") for row in tensor]
