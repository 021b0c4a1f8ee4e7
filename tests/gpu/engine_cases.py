"""What the engine is asked on GPUs, with the answers of transformers.

In fp32 a token is as good as certain: every layout, schedule and batch must give the same one. In bf16 the
order of a sum may decide a near tie. The trained model has few; what comes before one is certain.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distllm.engine import resolve_model
from distllm.engine.tokenizers import load_tokenizer
from distllm.kernels.reference.sampling import gumbel_noise
from tests.beam_cases import cases, in_groups, reference
from tests.checkpoints import greedy_reference, make_model

NUM_TOKENS = 24
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
SEEDED: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.9, "seed": 77, "max_tokens": NUM_TOKENS, "ignore_eos": True},
    "top-k": {"temperature": 1.3, "seed": -5, "top_k": 40, "max_tokens": NUM_TOKENS, "ignore_eos": True},
}
NEAR_TIE = 0.1  # between two logits of the demo model: in bf16 their difference is off by 0.02 (rms)
OPENINGS = ("Once upon a time", "The old king said to his daughter", "In the middle of the forest")
OPENINGS += ("There was once a poor fisherman", "A fox and a crow", "The princess", "At midnight the clock")
OPENINGS += ("The miller had three sons", "She opened the door and", "Deep under the sea", "The wolf")


@dataclass(frozen=True)
class Case:
    """A folder's checkpoint: 31 prompts with their greedy tokens, and one that is sampled."""

    prompts: list[list[int]]
    greedy: list[list[int]]
    needle: list[int]  # longer than a chunk and than a few blocks
    seeded: dict[str, list[int]]  # by name in SEEDED


@dataclass(frozen=True)
class TrainedCase:
    """For the demo model: beginnings of its greedy texts, and how each goes on up to the next near tie."""

    prompts: list[list[int]]
    certain: list[list[int]]


@dataclass(frozen=True)
class BeamCase:
    """For the same checkpoint: prompts, how each is searched, and the sequences found."""

    prompts: list[list[int]]
    params: list[dict[str, Any]]
    sequences: list[list[list[int]]]


EXPERTS: dict[str, Any] = {"num_local_experts": 16, "num_experts_per_tok": 3, "num_hidden_layers": 3}


def make_case(folder: Path, model_type: str = "llama", **options: Any) -> None:
    """A checkpoint with heads of a real size and prompts of odd lengths, in fp32."""
    heads = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = make_model(folder, model_type, hidden_size=256, vocab_size=1031, **heads, **options)
    rng = random.Random(3)
    lengths = [1, 2, 15, 16, 17, 33, 100, *(rng.randrange(1, 60) for _ in range(24))]
    prompts = [rng.choices(range(3, 1031), k=length) for length in lengths]
    needle = rng.choices(range(3, 1031), k=101)
    greedy = [greedy_reference(model, prompt, NUM_TOKENS) for prompt in prompts]
    seeded = {name: sampled_reference(model, needle, **params) for name, params in SEEDED.items()}
    save(folder, Case(prompts, greedy, needle, seeded))
    searches = [*cases(24, seed=4, vocab_size=1031), *in_groups(cases(24, seed=6, vocab_size=1031))]
    found = [[tokens for tokens, _ in reference(model, search)] for search in searches]
    save(folder, BeamCase([prompt for prompt, _ in searches], [asdict(p) for _, p in searches], found))


@torch.no_grad()
def sampled_reference(
    model: Any, prompt: list[int], *, temperature: float, seed: int, top_k: int = 0, **_: Any
) -> list[int]:
    """Gumbel-max over transformers' logits, one token after the other."""
    ids = list(prompt)
    for _step in range(NUM_TOKENS):
        logits = model(torch.tensor([ids])).logits[0, -1]
        lowest = logits.topk(top_k or len(logits)).values[-1]
        entries = torch.arange(len(logits))
        noise = gumbel_noise(torch.tensor([seed]), torch.tensor([len(ids)]), entries)[0]
        scores = (logits / temperature + noise).masked_fill(logits < lowest, -torch.inf)
        ids.append(int(scores.argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def make_trained_case(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    path = resolve_model("demo")
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    case = TrainedCase([], [])
    for text in OPENINGS:
        prompt = list(tokenizer.encode(text))
        ids = prompt + greedy_reference(model, prompt, 2 * NUM_TOKENS)
        best = model(torch.tensor([ids])).logits[0, :-1].topk(2).values
        ties = [at + 1 for at, gap in enumerate((best[:, 0] - best[:, 1]).tolist()) if gap < NEAR_TIE]
        borders = [len(prompt) - 1, *(at for at in ties if at >= len(prompt)), len(ids)]
        for before, tie in itertools.pairwise(borders):
            case.prompts.append(ids[: before + 1])
            case.certain.append(ids[before + 1 : tie][:NUM_TOKENS])
    assert sum(map(len, case.certain)) > 300, "too few tokens to say anything"
    save(folder, case)


def save(folder: Path, case: Case | TrainedCase | BeamCase) -> None:
    (folder / f"{type(case).__name__}.json").write_text(json.dumps(asdict(case)))


def load_case(folder: Path) -> Case:
    return Case(**json.loads((folder / "Case.json").read_text()))


def load_trained_case(folder: Path) -> TrainedCase:
    return TrainedCase(**json.loads((folder / "TrainedCase.json").read_text()))


def load_beam_case(folder: Path) -> BeamCase:
    return BeamCase(**json.loads((folder / "BeamCase.json").read_text()))
