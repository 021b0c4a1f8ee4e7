"""What grammars forbid, on the device: packed masks of a step's rows into −inf. Knows no grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from distllm.runtime.staging import to_device


def apply_masks(logits: torch.Tensor, slots: Sequence[int], masks: Mapping[int, bytes]) -> torch.Tensor:
    """logits [num_rows, vocab_size] of these slots, with −inf wherever a slot's mask has no bit; the input is
    kept. The rows of a slot are neighbours, as many as masks, StepPlan.token_masks, has for it. Does not wait
    for the device.
    """
    rows = [row for row, slot in enumerate(slots) if slot in masks]
    if not rows:
        return logits
    packed = np.frombuffer(
        bytearray(b"".join(masks[slot] for slot in dict.fromkeys(slots) if slot in masks)), dtype=np.uint8
    )
    columns = to_device(packed.reshape(len(rows), -1), torch.uint8, logits.device)
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((columns[:, :, None] & bits) != 0).flatten(1)[:, : logits.shape[1]]
    index = to_device(rows, torch.int64, logits.device)
    return logits.index_copy(0, index, logits[index].masked_fill(~allowed, -torch.inf))
