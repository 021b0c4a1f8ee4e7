"""EngineConfig: what the user asks of an engine, checked when made and never changed afterwards. A leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from distllm.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
GENERATION_CONFIGS = ("auto", "vllm")
SPECULATIVE_METHODS = ("ngram", "draft_model", "custom")
MAX_BLOCK_SIZE = 1024
MAX_DRAFTS = 32  # tokens of one request that are guessed at a time
MAX_NGRAM = 32


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed before the model verifies them. Names as in vLLM, where it has them."""

    method: str
    num_speculative_tokens: int = 4  # at most; fewer where guesses have been wrong
    model: str | None = None  # of draft_model: "demo-draft" or a folder, as EngineConfig.model
    draft_tensor_parallel_size: int = 1  # 1, and rank 0 drafts for all, or tensor_parallel_size
    prompt_lookup_min: int = 2  # of ngram: tokens that must have stood before
    prompt_lookup_max: int = 4  # of ngram: where several places match, more of them count
    proposer: Callable[..., Any] | None = None  # of custom: (token ids so far, how many) → guessed token ids

    def __post_init__(self) -> None:
        if self.method not in SPECULATIVE_METHODS:
            known = ", ".join(SPECULATIVE_METHODS)
            raise ConfigError(f"speculative_config: method is {self.method!r}; it must be one of {known}")
        if self.model is not None and not isinstance(self.model, str):
            raise ConfigError(f"speculative_config: model is {self.model!r}; it must be a name or a folder")
        if self.proposer is not None and not callable(self.proposer):
            raise ConfigError(f"speculative_config: proposer is {self.proposer!r}; it must be a function")
        self._check_range("num_speculative_tokens", 1, MAX_DRAFTS)
        self._check_range("prompt_lookup_min", 1, MAX_NGRAM)
        self._check_range("prompt_lookup_max", self.prompt_lookup_min, MAX_NGRAM)
        self._check_range("draft_tensor_parallel_size", 1, 2**20)
        for method, name in (("draft_model", "model"), ("custom", "proposer")):
            given = getattr(self, name) is not None
            if given != (self.method == method):
                which = "is missing" if not given else f"is of method {method!r} alone"
                raise ConfigError(f"speculative_config: {name} {which}; method is {self.method!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SpeculativeConfig:
        """What the user wrote."""
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"speculative_config is {options!r}; it must be a dict, like {{'method': 'ngram'}}"
            )
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"speculative_config has no {name!r}; it knows {', '.join(known)}")
        if "method" not in options:
            raise ConfigError(
                f"speculative_config: method is missing; one of {', '.join(SPECULATIVE_METHODS)}"
            )
        return cls(**options)

    def _check_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"speculative_config: {name} is {value!r}; it must be an integer from {low} to {high}"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Option names as in vLLM. None means: derived from the model and the machine by `resolve`."""

    model: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str = "auto"  # the checkpoint's on a GPU, float32 on a CPU
    load_format: str = "auto"  # "dummy": random weights, from config.json alone
    generation_config: str = "auto"  # the folder's sampling defaults; "vllm": the library's, as vLLM names it
    seed: int = 0  # of the requests that bring none
    max_model_len: int | None = None  # prompt and generated tokens of one sequence
    max_num_seqs: int = 256  # sequences that run at the same time
    max_num_batched_tokens: int = 8192  # of one step; longer prompts are computed in chunks
    block_size: int = 64  # tokens per KV block: what attention fetches at once
    enable_prefix_caching: bool = True
    kv_cache_memory_bytes: int | None = None  # per rank
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory for weights, KV cache and the step itself
    enforce_eager: bool = False  # no CUDA graphs: the slow, obvious path
    speculative_config: Mapping[str, Any] | None = None  # SpeculativeConfig's fields

    def __post_init__(self) -> None:
        drafts = self.speculation
        if drafts is not None and drafts.draft_tensor_parallel_size not in (1, self.tensor_parallel_size):
            raise ConfigError(
                f"speculative_config: draft_tensor_parallel_size is {drafts.draft_tensor_parallel_size}; "
                f"it must be 1 or tensor_parallel_size, which is {self.tensor_parallel_size}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"load_format is {self.load_format!r}; it must be one of {', '.join(LOAD_FORMATS)}"
            )
        if self.generation_config not in GENERATION_CONFIGS:
            raise ConfigError(
                f"generation_config is {self.generation_config!r}; "
                f"it must be one of {', '.join(GENERATION_CONFIGS)}"
            )
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ConfigError(f"block_size is {self.block_size}; it must be between 1 and {MAX_BLOCK_SIZE}")
        for name in ("max_model_len", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens"):
            self._check_positive(name)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )

    @property
    def speculation(self) -> SpeculativeConfig | None:
        return None if self.speculative_config is None else SpeculativeConfig.of(self.speculative_config)

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not 1 <= value < 2**40:
            raise ConfigError(f"{name} is {value}; it must be at least 1")

    def resolve(self, max_position_embeddings: int) -> EngineConfig:
        """Fill max_model_len from the model, or check it against the model's window."""
        if self.max_model_len is None:
            return replace(self, max_model_len=max_position_embeddings)
        if self.max_model_len > max_position_embeddings:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}; the model's window "
                f"(max_position_embeddings) is {max_position_embeddings}"
            )
        return self

    @property
    def context_len(self) -> int:
        """max_model_len of a resolved config."""
        assert self.max_model_len is not None, "resolve() first"
        return self.max_model_len
