"""What grammars forbid, from the host to the device: packed masks of a step's rows. Knows no grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from distllm.kernels import mask_logits
from distllm.runtime.staging import to_device


def apply_masks(logits: torch.Tensor, slots: Sequence[int], masks: Mapping[int, bytes]) -> torch.Tensor:
    """logits [num_rows, vocab_size] of these slots, with −inf wherever a slot's mask has no bit; the input is
    kept. The rows of a slot are neighbours, as many as masks, StepPlan.token_masks, has for it. Does not wait
    for the device.
    """
    masked = np.array([slot in masks for slot in slots])
    if not masked.any():
        return logits
    packed = b"".join(masks[slot] for slot in dict.fromkeys(slots) if slot in masks)
    numbers = np.where(masked, masked.cumsum() - 1, -1)
    return mask_logits(
        logits,
        to_device(np.frombuffer(packed, np.uint8).reshape(masked.sum(), -1), torch.uint8, logits.device),
        to_device(numbers, torch.int64, logits.device),
    )
