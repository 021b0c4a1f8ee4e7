"""One GPU per rank. (Placeholder of this branch; the real one is merged over it.)"""

from __future__ import annotations
import torch


def select_device(control) -> torch.device:
    return (
        torch.device("cuda", control.local_rank % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
