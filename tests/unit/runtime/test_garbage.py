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


def test_what_the_caller_has_frozen_stays_so() -> None:
    gc.freeze()
    try:
        with old_objects_spared():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_while_an_engine_works() -> None:
    with LLM("demo") as llm:
        assert gc.get_freeze_count() == 0
        for _ in llm.stream("Once", SamplingParams(max_tokens=3)):
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
        with pytest.raises(RequestError):
            llm.generate("Once", SamplingParams(logits_processors=["unknown"]))
        assert gc.get_freeze_count() == 0
