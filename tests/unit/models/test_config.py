"""config.json → DecoderSpec: what is read, and that whatever would change the result is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.errors import CheckpointError
from distllm.models.registry import family_named, parse_config
from distllm.models.rope_spec import LinearScaling, Llama3Scaling, RopeSpec
from distllm.models.shards import slot_shapes
from distllm.models.spec import DecoderSpec, NormSpec

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 32,
    "long_factor": [2.0] * 32,
    "original_max_position_embeddings": 4096,
}


def config(**changes: Any) -> dict[str, Any]:
    """Llama 3.2 1B, as its file has it; a change to ... removes the key."""
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    return {key: value for key, value in (base | changes).items() if value is not ...}


def test_llama_3_2() -> None:
    assert parse_config(config()) == DecoderSpec(
        family="llama",
        vocab_size=128256,
        hidden_size=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=8192,
        activation="silu",
        norm=NormSpec("rms", 1e-5),
        rope=RopeSpec(500000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_embeddings=True,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )


def test_both_dialects_mean_the_same() -> None:
    new = config(
        rope_scaling=...,
        rope_theta=...,
        torch_dtype=...,
        rope_parameters=LLAMA3 | {"rope_theta": 500000.0},
        dtype="bfloat16",
    )
    assert parse_config(new) == parse_config(config())


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_key_value_heads": ...}, "num_kv_heads", 32),
        ({"head_dim": ...}, "head_dim", 64),
        ({"head_dim": 128}, "head_dim", 128),
        ({"rope_scaling": None, "rope_theta": ...}, "rope", RopeSpec(10000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope", RopeSpec(5e5, LinearScaling(2))),
        ({"partial_rotary_factor": 0.5, "rope_scaling": None}, "rope", RopeSpec(5e5, rotary_dim=32)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "max_position_embeddings", 262144),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "max_position_embeddings", 262144),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "max_position_embeddings", 131072),
        ({"rope_scaling": LONGROPE}, "max_position_embeddings", 131072),
        ({"tie_word_embeddings": ...}, "tied_embeddings", False),
        ({"torch_dtype": ...}, "dtype", "float32"),
        ({"attention_bias": True}, "out_bias", True),
        ({"architectures": ...}, "family", "llama"),
        ({"pretraining_tp": 2, "auto_map": {"x": "y"}, "use_cache": False}, "family", "llama"),
    ],
)
def test_read(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(parse_config(config(**changes)), field) == value


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["Llama7ForCausalLM"]}, r"Llama7ForCausalLM.*nearest that is: LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": None, "model_type": None}, "model_type None"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "a shared expert.*nearest that is: Qwen3MoeForCausalLM"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"partial_rotary_factor": 2.5}, "partial_rotary_factor is 2.5"),
        ({"partial_rotary_factor": 0.01}, "rotary_dim is 0"),
        ({"rope_scaling": {"type": "spiral", "factor": 4.0}}, "'spiral'; supported: 'default', 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": True}}, "factor is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "twist": 3}}, "rope setting 'twist'"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "1 longrope factors for 32 pairs"),
        ({"rope_scaling": LONGROPE | {"long_factor": 3}}, "must be lists"),
        ({"rope_scaling": LONGROPE | {"long_factor": ["x"] * 32}}, "long_factor is 'x'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ({"rope_scaling": {"full_attention": LLAMA3}}, "one for all layers"),
        ({"rope_scaling": [1]}, "rope settings"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"num_key_value_heads": 0}, "num_kv_heads is 0"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 KV heads"),
        ({"head_dim": 63}, "head_dim is 63"),
        (
            {"head_dim": ..., "hidden_size": 2050},
            "hidden_size 2050 is not a multiple of num_attention_heads 32",
        ),
        ({"head_dim": ..., "num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": 10**400}, "vocab_size is"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_hidden_layers": 16.0}, "num_layers is 16.0"),
        ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
        ({"rms_norm_eps": 0}, "norm eps is 0"),
        ({"mlp_bias": 1}, "mlp_bias is 1"),
        ({"attention_bias": None}, "qkv_bias is None"),
    ],
)
def test_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        parse_config(config(**changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*sorted(config()), "rope_parameters", "dtype"]), json_values)
def test_any_value_gives_a_spec_or_one_clear_error(key: str, value: Any) -> None:
    try:
        parse_config(config(**{key: value}))
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("rope_scaling", [None, LLAMA3])
def test_spec_survives_json(rope_scaling: dict[str, Any] | None) -> None:
    spec = parse_config(config(rope_scaling=rope_scaling))
    assert DecoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_every_slot_has_a_name_in_the_checkpoint() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 9, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24, attention_bias=True, mlp_bias=True))
    spec = parse_config(config(**model.config.to_dict() | {"rope_scaling": None}))
    sources = [family_named("llama").source(spec, *slot) for slot in slot_shapes(spec).items()]
    found = {source.names[0]: source.shape for source in sources}
    assert found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
