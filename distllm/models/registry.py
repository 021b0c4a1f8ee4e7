"""The families that distllm runs. A new family is one file and one entry here."""

from __future__ import annotations

import reprlib
from difflib import get_close_matches
from typing import Any

from distllm.errors import CheckpointError
from distllm.models.baichuan import BAICHUAN
from distllm.models.chatglm import CHATGLM
from distllm.models.falcon import FALCON
from distllm.models.family import Family
from distllm.models.gemma2 import GEMMA2
from distllm.models.gemma3 import GEMMA3
from distllm.models.glm import GLM, GLM4
from distllm.models.gpt2 import GPT2
from distllm.models.llama import LLAMA
from distllm.models.mistral import MISTRAL
from distllm.models.mixtral import MIXTRAL
from distllm.models.phi3 import PHI3
from distllm.models.qwen import QWEN
from distllm.models.qwen2 import QWEN2
from distllm.models.qwen3 import QWEN3
from distllm.models.qwen3_moe import QWEN3_MOE
from distllm.models.spec import DecoderSpec
from distllm.models.starcoder2 import STARCODER2

FAMILIES = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    STARCODER2,
    GEMMA2,
    GEMMA3,
    PHI3,
    GLM,
    GLM4,
    CHATGLM,
    FALCON,
    GPT2,
    BAICHUAN,
    QWEN,
)

# What DecoderSpec cannot say yet, by a part of the architecture's name.
MISSING = {
    "Qwen2Moe": "a shared expert",
    "qwen2_moe": "a shared expert",
    "Deepseek": "multi-head latent attention",
    "Phi3Small": "block-sparse attention",
    "Mamba": "a state space in place of attention",
    "ForConditionalGeneration": "inputs other than text",
    "ForSequenceClassification": "a head that classifies",
}


def find_family(config: dict[str, Any]) -> Family:
    """The family of a config.json, by `architectures`; without them, by `model_type`."""
    architectures = config.get("architectures")
    if not architectures:
        return family_named(config.get("model_type"))
    for family in FAMILIES:
        if isinstance(architectures, list) and architectures[0] in family.architectures:
            return family
    name = architectures[0] if isinstance(architectures, list) else architectures
    known = [each for family in FAMILIES for each in family.architectures]
    raise _unknown(f"architectures {reprlib.repr(architectures)}", str(name), known)


def family_named(name: object) -> Family:
    """The family of a spec."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise _unknown(f"model_type {reprlib.repr(name)}", str(name), [family.name for family in FAMILIES])


def parse_config(config: dict[str, Any]) -> DecoderSpec:
    """The spec of a config.json. Raises CheckpointError for whatever is not implemented exactly."""
    return find_family(config).read_config(config)


def _unknown(what: str, name: str, known: list[str]) -> CheckpointError:
    """In one line, with the nearest name that is supported and what the other would need."""
    missing = next((f" (it has {knob})" for part, knob in MISSING.items() if part in name), "")
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return CheckpointError(f"{what} is not supported{missing}; the nearest that is: {nearest}")
