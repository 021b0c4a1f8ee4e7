"""Small values on their way between host and device, without waiting for either."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_device(
    values: Sequence[int | float] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """values as a tensor on the device. Returns at once: the copy runs on the current stream, from pinned
    memory that its allocator keeps until then.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype)
    found = np.asarray(values)
    host = torch.empty(found.shape, dtype=dtype, pin_memory=True)
    host.numpy()[...] = found  # torch would wake all its threads for a megabyte
    return host.to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way to the host; wait() gives them as soon as the device has written them."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned, if from a GPU
        self._event = torch.cuda.Event() if tensors[0].is_cuda else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> list[torch.Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
