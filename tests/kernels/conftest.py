"""Where the Triton kernels are tested: on a GPU, or in Triton's interpreter; nowhere without Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
