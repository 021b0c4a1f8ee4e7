"""Sampled tokens follow the distribution, through the whole engine, at tp 1 and tp 4."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.draw_cases import check_layouts

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.timeout(300)]


def test_draws(tmp_path: Path) -> None:
    check_layouts(tmp_path, [1, 4], "cpu")
