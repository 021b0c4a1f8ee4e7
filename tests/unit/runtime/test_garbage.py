"""That the collector looks at new objects alone while an engine works, at all of them before and after."""

from __future__ import annotations

import gc
import weakref

import pytest

from distllm import LLM, RequestError, SamplingParams
from distllm.runtime.garbage import old_objects_spared


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_only_new_objects_are_collected_inside() -> None:
    old = weakref.ref(Cycle())
    with old_objects_spared():
        new = weakref.ref(Cycle())
        gc.collect()
        assert old() is not None and new() is None
    gc.collect()
    assert old() is None


def test_while_an_engine_works() -> None:
    def num_spared() -> int:
        return gc.get_freeze_count() // 10_000  # Python 3.12 itself begins with a few hundred

    with LLM("demo") as llm:
        assert not num_spared()
        for _ in llm.stream("Once", SamplingParams(max_tokens=3)):
            assert num_spared()
        assert not num_spared()
        with pytest.raises(RequestError):
            llm.generate("Once", SamplingParams(logits_processors=["unknown"]))
        assert not num_spared()
