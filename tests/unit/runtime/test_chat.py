"""LLM.chat over ranks as threads, and the sampling defaults of a model folder in vLLM's order."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from distllm import LLM, CheckpointError, ConfigError, RequestError, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.engine.tokenizers import load_tokenizer
from distllm.runtime.sampling.sampling_params import default_sampling_params
from tests.checkpoints import make_llama
from tests.tokenizers import byte_level, rank_lines, write_json

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'bot:' }}"
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
HELLO = [{"role": "user", "content": "abc <|end|>"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    make_llama(path, vocab_size=300, num_hidden_layers=2)
    byte_level(path)
    write_json(path / "tokenizer_config.json", {"chat_template": TEMPLATE})
    generation = {"eos_token_id": [2, 299], "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 5}
    write_json(path / "generation_config.json", generation)
    return path


def chat(folder: Path, layout: tuple[int, int], messages: Any, **options: Any) -> list[Any]:
    def run(control: LocalControl) -> tuple[Any, Any]:
        tp, pp = layout
        with LLM(
            str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, max_model_len=99
        ) as llm:
            with pytest.raises(RequestError, match="messages must be"):
                llm.chat([{"content": "x"}])
            answers = llm.chat(messages, GREEDY, **options)
            texts = [answer.prompt for answer in answers]
            return answers, llm.generate(texts if llm.is_root else "", GREEDY)

    results = run_ranks(layout[0] * layout[1], run, timeout_s=60)
    assert all(result == ([], []) for result in results[1:])
    return results[0]


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_chat_is_generate_after_the_template(folder: Path, layout: tuple[int, int]) -> None:
    answers, generated = chat(folder, layout, [HELLO, [*HELLO, {"role": "bot", "content": "🙂"}]])
    assert [answer.prompt for answer in answers] == [
        "user: abc <|end|>\nbot:",
        "user: abc <|end|>\nbot: 🙂\nbot:",
    ]
    assert [a.prompt_token_ids for a in answers] == [g.prompt_token_ids for g in generated]
    assert [a.outputs[0].text for a in answers] == [g.outputs[0].text for g in generated]
    assert all(len(answer.outputs[0].token_ids) == 6 for answer in answers)


def test_the_folders_defaults_and_what_goes_before_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Explicit parameters are taken as they are; the folder's are for who gives none."""
    with caplog.at_level(logging.INFO, "distllm"), LLM(str(folder)) as llm:
        wanted = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=5)
        assert llm.get_default_sampling_params() == wanted
        assert len(llm.generate("abc")[0].outputs[0].token_ids) <= 5
        explicit = llm.generate("abc", SamplingParams(ignore_eos=True))[0]
        assert len(explicit.outputs[0].token_ids) == 16
    assert "temperature 0.6, top_p 0.9, max_new_tokens 5" in caplog.text
    with LLM(str(folder), generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
    with pytest.raises(ConfigError, match="generation_config is 'x'; it must be one of auto, vllm"):
        LLM(str(folder), generation_config="x")


def test_defaults_that_are_no_parameters() -> None:
    assert default_sampling_params({"do_sample": True, "top_k": None}) == SamplingParams()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature is 'hot'"):
        default_sampling_params({"temperature": "hot"})


def test_the_family_ends_answers_that_no_config_mentions(folder: Path, tmp_path: Path) -> None:
    """Qwen's chat ends with <|im_end|>, which config.json does not say; ids past the model's rows are left
    out.
    """
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "qwen.tiktoken").write_bytes(rank_lines())
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 300})
    end = len(rank_lines().splitlines()) + 2
    with LLM(str(tmp_path)) as llm:
        assert set(llm._admission._eos) == {2, end - 2, end}


def test_without_a_format_chat_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path, num_hidden_layers=1)
    with LLM(str(tmp_path)) as llm, pytest.raises(RequestError, match="no chat template"):
        llm.chat(HELLO)


def test_a_token_that_the_model_has_no_row_for(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    config = {
        "added_tokens_decoder": {str(tokenizer.vocab_size + n): {"content": f"<{n}>"} for n in range(40)}
    }
    write_json(tmp_path / "tokenizer_config.json", config)
    with LLM(str(tmp_path)) as llm, pytest.raises(RequestError, match="the vocabulary is 0 … 299"):
        llm.generate("<39>")
