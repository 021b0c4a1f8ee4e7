"""Where the Triton kernels are tested: on a GPU, or in Triton's interpreter; nowhere without Triton."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "a test collected before these imports Triton: it compiles for a GPU"
    os.environ["TRITON_INTERPRET"] = "1"
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
