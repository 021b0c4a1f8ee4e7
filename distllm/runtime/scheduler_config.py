"""SchedulerConfig: how much the scheduler may use, and whether a request fits into it at all."""

from __future__ import annotations

from dataclasses import dataclass

from distllm.errors import ConfigError, RequestError
from distllm.runtime.request import Request


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int  # slots
    max_num_batched_tokens: int  # of one step
    max_model_len: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool
    depth: int  # steps from sampling a token to computing with it: pp_size

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "enable_prefix_caching" and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")

    def check_fits(self, request: Request) -> None:
        """Raise RequestError if the request could not run even if it were alone."""
        num_rows = len(request.together)
        size = f"prompt of {request.num_prompt_tokens} tokens + max_tokens {request.max_tokens}"
        num_tokens = request.num_prompt_tokens + request.max_tokens
        if num_tokens > self.max_model_len:
            raise RequestError(
                f"{size} is {num_tokens}; max_model_len is {self.max_model_len}: "
                "shorten the prompt or lower max_tokens"
            )
        if num_rows > self.max_num_seqs:
            raise RequestError(
                f"beam_width is {num_rows}; max_num_seqs is {self.max_num_seqs} and beams run together: "
                "lower beam_width or raise max_num_seqs"
            )
        # Nothing reads the last token's KV. Beams may come to share nothing.
        num_blocks = num_rows * -(-(num_tokens - 1) // self.block_size)
        size += f" of {num_rows} beams" if num_rows > 1 else ""
        if num_blocks > self.num_blocks:
            raise RequestError(
                f"{size} needs {num_blocks} KV blocks of {self.block_size} tokens and there are "
                f"{self.num_blocks}: shorten the prompt, lower max_tokens or give the KV cache more memory"
            )
