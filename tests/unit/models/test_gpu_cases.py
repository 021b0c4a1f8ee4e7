"""The GPU tests' checkpoints of each family: that none is missing, and the way through them, in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distllm.models.registry import FAMILIES
from distllm.parallel.layout import RankLayout
from tests.gpu import logit_cases
from tests.gpu.logit_cases import SEED, VARIANTS, check, make_case, spec_of, texts
from tests.unit.models.stepping import run_layout

HEAD_SIZES = {64, 80, 96, 128, 256}  # of released models


def test_every_family_has_a_case_and_so_has_every_head_size() -> None:
    specs = [spec_of(name) for name in VARIANTS]
    assert {spec.family for spec in specs} == {family.name for family in FAMILIES}
    assert {spec.head_dim for spec in specs} >= HEAD_SIZES


@pytest.mark.parametrize("name", VARIANTS)
def test_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(logit_cases, "TEXT_LENGTHS", (1, 30))
    case = make_case(tmp_path, name, torch.device("cpu"))
    logits = run_layout(tmp_path, RankLayout(), texts(), SEED, torch.bfloat16)
    check(case, logits, torch.bfloat16, "one rank")
