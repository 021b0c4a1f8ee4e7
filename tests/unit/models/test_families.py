"""Each family against its transformers class, fp32: logits under both dialects of config.json, ropes beyond
their original window, greedy tokens over layouts, in chunks and from an engine.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from distllm import LLM, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.engine import build_engine, load_weights, open_source, read_spec
from distllm.errors import CheckpointError
from distllm.models.decoder import Decoder
from distllm.models.glm import DEFAULTS as GLM_DEFAULTS
from distllm.models.moe_spec import MoESpec
from distllm.models.registry import FAMILIES, family_named, parse_config
from distllm.models.rope_spec import RopeSpec
from distllm.models.shards import shard_table, slot_shapes
from distllm.parallel.layout import RankLayout
from tests.checkpoints import greedy_reference, make_llama
from tests.unit.models import family_cases
from tests.unit.models.family_cases import LONG_FACTORS, SIZES
from tests.unit.models.older_cases import OLDER_CASES
from tests.unit.models.stepping import run_layout

CASES = family_cases.CASES | OLDER_CASES
TOLERANCE = 2e-4
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
LENGTHS = (1, 5, 40, 23)  # some shorter than the window of 8, some longer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("families")
    made = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = root / str(number)
        made[name] = folder, case.make(folder, seed=number)
    return made


def with_hub_config(folder: Path, to: Path, name: str, **changes: Any) -> Path:
    """The same weights under the other config.json."""
    to.mkdir()
    shutil.copy(folder / "model.safetensors", to)
    (to / "config.json").write_text(json.dumps(CASES[name].hub_config() | changes))
    return to


def max_error(folder: Path, model: Any, layout: RankLayout, lengths: tuple[int, ...] = LENGTHS) -> float:
    rng = random.Random(layout.world_size)
    texts = [[rng.randrange(model.config.vocab_size) for _ in range(length)] for length in lengths]
    with torch.no_grad():
        wanted = [model(torch.tensor([text])).logits[0] for text in texts]
    found = run_layout(folder, layout, texts, seed=layout.world_size)
    return max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_logits(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, name: str) -> None:
    folder, model = checkpoints[name]
    assert max_error(folder, model, RankLayout()) <= TOLERANCE
    hub = with_hub_config(folder, tmp_path / "hub", name)
    assert read_spec(hub) == read_spec(folder)
    assert max_error(hub, model, RankLayout(2, 2)) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_its_slot(checkpoints: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, _ = checkpoints[name]
    spec = read_spec(folder)
    family = family_named(spec.family)
    sources = [family.source(spec, slot, shape) for slot, shape in slot_shapes(spec).items()]
    tensors = load_file(folder / "model.safetensors")
    stored = {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(".attn.bias")
    }
    found = {next(filter(stored.__contains__, source.names)): source.shape for source in sources}
    assert found == stored


PROMPT_LENGTHS = (3, 19, 30)
NUM_TOKENS = 16


def greedy(folder: Path, layout: tuple[int, int], prompts: list[list[int]]) -> list[list[int]]:
    """In chunks of at most 7 tokens."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    tp, pp = layout

    def run(control: LocalControl) -> list[Any]:
        options: dict[str, Any] = {"max_num_batched_tokens": 7, "block_size": 4, "max_model_len": 64}
        with LLM(
            str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, **options
        ) as llm:
            return llm.generate(prompts, params)  # type: ignore[arg-type]

    return [list(output.outputs[0].token_ids) for output in run_ranks(tp * pp, run, timeout_s=60)[0]]


GREEDY: dict[str, list[tuple[int, int]]] = {
    "mistral, window": [(4, 1)],
    "qwen2, window on": LAYOUTS,
    "qwen3": [(2, 2)],
    "starcoder2": [(4, 1)],
    "gemma2": LAYOUTS,
    "gemma3": [(2, 2)],
    "phi3": [(4, 1)],
    "glm": [(2, 2)],
    "glm4": [(4, 1)],
    "chatglm": LAYOUTS,
    "falcon 7b": LAYOUTS,
    "falcon 40b": [(4, 1)],
    "falcon rw": [(2, 2)],
    "gpt2": LAYOUTS,
    "baichuan 7b": [(2, 2)],
    "baichuan2 13b": LAYOUTS,
    "qwen": LAYOUTS,
    "mixtral": LAYOUTS,
    "qwen3_moe": LAYOUTS,
    "qwen3_moe, dense layers": [(2, 2)],
}


def greedy_case(model: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and their continuations."""
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 67) for _ in range(length)] for length in PROMPT_LENGTHS]
    return prompts, [greedy_reference(model, prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, name: str) -> None:
    """Two KV heads on four ranks among the layouts; and from an engine read under another one."""
    folder, model = checkpoints[name]
    prompts, expected = greedy_case(model)
    for layout in GREEDY[name]:
        assert greedy(folder, layout, prompts) == expected, layout

    def build(control: LocalControl) -> None:
        build_engine(open_source(folder), tmp_path / "engine", 2, 2, "float32", control)

    run_ranks(2, build)
    assert greedy(tmp_path / "engine", (1, 1), prompts) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, layouts in GREEDY.items() if layouts != LAYOUTS])
def test_greedy_tokens_in_every_layout(checkpoints: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, model = checkpoints[name]
    prompts, expected = greedy_case(model)
    for layout in LAYOUTS:
        assert greedy(folder, layout, prompts) == expected, layout


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn, all keys": {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
        "mscale": 1.3, "mscale_all_dim": 0.4,
    },
    "yarn, factor of attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
}  # fmt: skip
ORIGINAL = 24


@pytest.mark.parametrize("length", [20, 70], ids=["within", "beyond"])
@pytest.mark.parametrize("name", ROPES)
def test_ropes_within_and_beyond_the_original_window(tmp_path: Path, name: str, length: int) -> None:
    """The engine's max_model_len is the length of this text."""
    rope = ROPES[name] | {"rope_theta": 100.0}  # low: few pairs are all fast or all slow
    if name != "linear":
        rope["original_max_position_embeddings"] = ORIGINAL
    options = SIZES | {"num_hidden_layers": 2, "head_dim": 12, "rope_parameters": rope}
    model = make_llama(tmp_path, **(options | {"max_position_embeddings": 4 * ORIGINAL}))
    assert max_error(tmp_path, model, RankLayout(), (length,)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("length", [60, 70], ids=["within", "beyond"])
def test_phi_3_within_and_beyond_the_original_window(
    checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str, length: int
) -> None:
    """Of a part of each head, and under the names that older files have for it."""
    folder, model = checkpoints["phi3, longrope"]
    hub = with_hub_config(
        folder, tmp_path / "hub", "phi3, longrope", rope_scaling={"type": kind, **LONG_FACTORS}
    )
    assert max_error(hub, model, RankLayout(), (length,)) <= TOLERANCE


@pytest.mark.parametrize("length", [20, 70], ids=["within", "beyond"])
def test_dynamic_rope_is_that_of_the_longest_sequence(tmp_path: Path, length: int) -> None:
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
    options = SIZES | {"num_hidden_layers": 2, "rope_parameters": rope, "max_position_embeddings": ORIGINAL}
    model = make_llama(tmp_path, **options)
    assert read_spec(tmp_path).max_position_embeddings == 3 * ORIGINAL
    assert max_error(tmp_path, model, RankLayout(), (length,)) <= TOLERANCE


def test_partial_rotary(tmp_path: Path) -> None:
    """Within the rope settings, as newer files have it."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    spec = parse_config(CASES["qwen3"].hub_config() | {"rope_scaling": rope})
    assert spec.rope is not None and spec.rope.rotary_dim == 6


def test_embeddings_are_scaled_as_in_transformers(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    """In bf16, bit for bit: √32 is rounded to 5.65625 before it multiplies."""
    folder, model = checkpoints["gemma2"]
    source, layout, ids = open_source(folder), RankLayout(), torch.arange(67)
    weights = load_weights(source, shard_table(source.spec, layout), torch.bfloat16, torch.device("cpu"))
    decoder = Decoder(source.spec, layout, weights, LocalControl().split(0, 0), 64)
    with torch.no_grad():
        wanted = copy.deepcopy(model.model.embed_tokens).bfloat16()(ids)
    assert torch.equal(decoder.embed(ids, ids), wanted)


def test_names_are_one_family_s_own() -> None:
    names = [family.name for family in FAMILIES] + [a for family in FAMILIES for a in family.architectures]
    assert len(names) == len(set(names))


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A change to ... takes the key away."""
    return {key: value for key, value in (config | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("mistral, none", {"attention_bias": True}, "attention_bias True is not supported"),
        ("mistral, none", {"sliding_window": 0}, "sliding_window is 0"),
        ("qwen2, window on", {"max_window_layers": None}, "max_window_layers is missing"),
        ("qwen2, window on", {"layer_types": ["linear_attention"] * 3}, "layer type is 'linear_attention'"),
        ("qwen2, window on", {"layer_types": ["sliding_attention"]}, "1 windows for 3 layers"),
        ("qwen3", {"num_experts": 8}, "num_experts 8 is not supported"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer type is 'sliding_attention'"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok is 6; .* from 1 to 5"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
        ("mixtral", {"hidden_act": "gelu"}, "the experts' activation is 'gelu'; supported: 'silu'"),
        ("mixtral", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size 8 is not supp"),
        ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("qwen3_moe", {"moe_intermediate_size": ...}, "moe_intermediate_size is missing"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "a layer of mlp_only_layers is 3; .* from 0 to 2"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all'; it must be a list"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type is 'rms_norm'; supported: 'layer_norm'"),
        ("starcoder2", {"use_bias": "yes"}, "qkv_bias is 'yes'"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type is 'gated'; supported: 'default'"),
        ("gemma2", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar is 'x'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3", {"rope_local_base_freq": "low"}, "rope_theta is 'low'"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias True is not supported"),
        ("phi3", {"sliding_window": -1}, "sliding_window is -1"),
        ("phi3, longrope", {"partial_rotary_factor": 1.0}, "6 longrope factors for 8 pairs"),
        ("phi3, longrope", {"head_dim": 32}, "6 longrope factors for 12 pairs"),
        ("glm", {"attention_bias": "no"}, "qkv_bias is 'no'"),
        ("glm", {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("glm4", {"partial_rotary_factor": 0.25}, "rotary_dim is 3"),
        ("chatglm", {"rmsnorm": False}, "rmsnorm False is not supported; only True"),
        ("chatglm", {"post_layer_norm": False}, "post_layer_norm False is not supported; only True"),
        ("chatglm", {"multi_query_attention": False}, "multi_query_attention False is not supported"),
        ("chatglm", {"multi_query_attention": ...}, "multi_query_attention False is not supported"),
        (
            "chatglm",
            {"apply_residual_connection_post_layernorm": True},
            "post_layernorm True is not supported",
        ),
        ("chatglm", {"original_rope": False}, "original_rope False is not supported; only True"),
        ("chatglm", {"position_encoding_2d": True}, "position_encoding_2d True is not supported"),
        ("chatglm", {"quantization_bit": 4}, "quantization_bit 4 is not supported"),
        ("chatglm", {"pre_seq_len": 128}, "pre_seq_len 128 is not supported"),
        ("chatglm", {"vision_config": {"depth": 2}}, "vision_config .* is not supported"),
        ("chatglm", {"tie_word_embeddings": True}, "tie_word_embeddings True is not supported"),
        ("chatglm", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .* is not supported"),
        (
            "chatglm",
            {"rope_ratio": 16, "seq_length": 32768},
            "rope_ratio 16 for 32768 positions is ChatGLM2-6B-32K's",
        ),
        ("chatglm", {"rope_ratio": None}, "rope_ratio is None"),
        ("chatglm", {"kv_channels": 14}, "rotary_dim is 7"),
        ("chatglm", {"padded_vocab_size": ...}, "padded_vocab_size is missing"),
        ("chatglm", {"add_qkv_bias": 3}, "qkv_bias is 3"),
        ("falcon 7b", {"multi_query": None}, "multi_query is missing"),
        ("falcon 7b", {"parallel_attn": "yes"}, "parallel_attn is 'yes'; supported: False, True"),
        ("falcon 7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2; supported: None, 1"),
        ("falcon 40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ("falcon rw", {"apply_residual_connection_post_layernorm": True}, "post_layernorm True is not"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not"),
        ("gpt2", {"activation_function": "mish"}, "activation_function is 'mish'"),
        ("gpt2", {"n_embd": {}}, "hidden_size is {}"),
        ("falcon rw", {"head_dim": "x"}, "head_dim is 'x'"),
        ("baichuan 7b", {"hidden_size": 5120}, "5120 is that of 13B, max_position_embeddings 128 that of 7B"),
        (
            "baichuan 13b",
            {"hidden_size": 4096},
            "4096 is that of 7B, max_position_embeddings None that of 13B",
        ),
        ("baichuan 13b", {"model_max_length": None}, "model_max_length is missing"),
        ("baichuan2 13b", {"tie_word_embeddings": True}, "normalized head cannot be tied"),
        ("qwen", {"kv_channels": None}, "kv_channels is missing"),
        ("qwen", {"seq_length": None}, "seq_length is missing"),
        ("qwen", {"use_logn_attn": "yes"}, "use_logn_attn is 'yes'"),
        ("qwen", {"no_bias": None}, "no_bias is None"),
        ("qwen", {"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
    ],
)
def test_refused(name: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        parse_config(changed(CASES[name].hub_config(), changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
every_key = sorted({key for case in CASES.values() for key in case.hub} | {"rope_parameters", "layer_types"})


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(CASES)), st.sampled_from(every_key), json_values)
def test_any_value_gives_a_spec_or_one_clear_error(name: str, key: str, value: Any) -> None:
    try:
        parse_config(CASES[name].hub_config() | {key: value})
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_released_defaults() -> None:
    """What files leave out is what the first release of the family had."""
    config = replace(CASES["mistral, none"], hub=CASES["mistral, none"].hub | {"sliding_window": ...})
    assert parse_config(config.hub_config()).windows == (4096,) * 3
    moe = replace(CASES["qwen3_moe"], hub=CASES["qwen3_moe"].hub | {"norm_topk_prob": ...})
    assert parse_config(moe.hub_config()).moe == MoESpec(9, 3, 13, renormalize=False)
    assert parse_config(CASES["starcoder2"].hub_config()).tied_embeddings
    assert parse_config(CASES["gemma2"].hub_config()).tied_embeddings
    glm = parse_config(changed(CASES["glm"].hub_config(), dict.fromkeys(GLM_DEFAULTS, ...)))
    assert (glm.head_dim, glm.num_kv_heads, glm.qkv_bias, glm.rope and glm.rope.rotary_dim) == (
        128,
        2,
        True,
        64,
    )


@pytest.mark.parametrize("architecture", ["ChatGLMModel", "ChatGLMForConditionalGeneration"])
def test_both_architectures_of_chatglm(architecture: str) -> None:
    config = CASES["chatglm"].hub_config() | {"architectures": [architecture]}
    assert parse_config(config).family == "chatglm"


@pytest.mark.parametrize(
    ("seq_length", "ratio", "theta"),
    [(8192, ..., 1e4), (32768, 50, 5e5), (131072, 500, 5e6), (1048576, 10000, 1e8)],
    ids=["chatglm3-6b", "chatglm3-6b-32k", "glm-4-9b-chat", "glm-4-9b-chat-1m"],
)
def test_windows_of_chatglm(seq_length: int, ratio: Any, theta: float) -> None:
    spec = parse_config(
        changed(CASES["chatglm"].hub_config(), {"seq_length": seq_length, "rope_ratio": ratio})
    )
    assert spec.rope == RopeSpec(theta, rotary_dim=6, interleaved=True)
    assert spec.max_position_embeddings == seq_length
