"""Small host values on their way to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_device(
    values: Sequence[int | float] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """values as a 1-D tensor on the device. Returns at once: the copy runs on the current stream, from pinned
    memory that its allocator keeps until then.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
