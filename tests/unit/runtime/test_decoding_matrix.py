"""Every pair of features that needs no GPU, ranks as threads: see tests/decoding_matrix.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from distllm import LLM, RequestError, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from tests import decoding_matrix as matrix

POSSIBLE = [pair for pair in matrix.ON_CPU if frozenset(pair) not in matrix.IMPOSSIBLE]
IMPOSSIBLE = [pair for pair in matrix.ON_CPU if frozenset(pair) in matrix.IMPOSSIBLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix.make_models(tmp_path_factory.mktemp("matrix"))


@cache
def plain_outputs(folder: Path, kind: tuple[str, ...]) -> list[Any]:
    """What a plain engine gives to each request alone. kind: the features that change requests."""
    with LLM(str(folder), **matrix.PLAIN) as llm:
        return matrix.run(llm, matrix.requests(kind), [[i] for i in range(matrix.NUM_PROMPTS)])


def of_requests(pair: matrix.Pair) -> tuple[str, ...]:
    return tuple(name for name in pair if matrix.FEATURES[name].params or name == "beam")


@pytest.mark.parametrize("pair", POSSIBLE, ids=" × ".join)
def test_pair(folder: Path, pair: matrix.Pair) -> None:
    plain = plain_outputs(folder, of_requests(pair))
    tp, pp = matrix.layout(pair)
    with matrix.arranged(pair) as seen:

        def use(control: LocalControl) -> None:
            grid = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
            with LLM(str(folder), comm=control, **grid, **matrix.options(folder, pair)) as llm:  # type: ignore[arg-type]
                matrix.check_cell(llm, pair, plain, seen)

        run_ranks(tp * pp, use, timeout_s=100)


@pytest.mark.parametrize("pair", IMPOSSIBLE, ids=" × ".join)
def test_pair_that_cannot_be(folder: Path, pair: matrix.Pair) -> None:
    """Refused with a reason; or, where nothing was asked for that could be refused, not done."""
    with (
        matrix.arranged(pair) as seen,
        LLM(str(folder), **matrix.options(folder, pair)) as llm,
    ):
        if changes := matrix.FEATURES[pair[1]].params:
            with pytest.raises(RequestError, match="SamplingParams; beam_search takes BeamSearchParams"):
                llm.beam_search(matrix.prompts(), SamplingParams(**changes))  # type: ignore[arg-type]
            return
        outputs = matrix.run(llm, matrix.requests(("beam",)), [list(range(matrix.NUM_PROMPTS))])
        assert matrix.facts(outputs) == matrix.facts(plain_outputs(folder, ("beam",)))
        assert not seen["overlap"]
        stats = llm.speculation_stats()
        assert stats is None or stats.num_draft_tokens == 0


@pytest.mark.parametrize("name", ["structured", "penalties"])
def test_without_it_the_tokens_are_others(folder: Path, name: str) -> None:
    """Or the cells that have it would say nothing about it."""
    with_it, without = (matrix.facts(plain_outputs(folder, kind)) for kind in ((name,), ()))
    assert sum(mine != theirs for mine, theirs in zip(with_it, without, strict=True)) > len(without) / 2


def test_the_document_is_the_table() -> None:
    document = Path(__file__).parents[3] / "docs/feature-matrix.md"
    assert document.read_text() == matrix.document() + "\n", "run `make docs`"
