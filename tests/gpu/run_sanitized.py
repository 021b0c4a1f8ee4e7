"""Run by sanitize.py under compute-sanitizer, at small odd shapes.

`Triton`: engines and requests that need every kernel; that none was missed is checked. `peer memory`, on
several ranks: the all-reduce kernels in all their modes. `plant`: one value read past the end of a tensor.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from distllm import LLM, SamplingParams, kernels
from distllm.comm.connect import open_control
from distllm.comm.devices import select_device
from distllm.kernels import triton as triton_kernels
from tests.kernels.test_attention import ROWS, Knobs, check

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1031, "hidden_size": 200,
    "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 80, "max_position_embeddings": 1200, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {"max_tokens": 3, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0, **PLAIN),
    SamplingParams(temperature=0.7, seed=1, n=2, **PLAIN),
    SamplingParams(top_k=9, top_p=0.8, min_p=0.01, typical_p=0.9, frequency_penalty=0.5, seed=2, **PLAIN),
    SamplingParams(logprobs=3, min_tokens=2, stop_token_ids=[7], **PLAIN),
]


@dataclass(frozen=True)
class Engine:
    dtype: str
    block_size: int
    max_num_batched_tokens: int
    intermediate_size: int
    prompt_lengths: tuple[int, ...]


CHUNKED = (150, 1, 90, 7)  # whole, in chunks beside decodes, and split when the longest decodes alone
ENGINES = (
    Engine("bfloat16", 3, 64, 302, CHUNKED),
    Engine("float32", 3, 64, 302, CHUNKED),
    Engine("bfloat16", 64, 1200, 304, (1101, 3)),  # what goes by the tensor memory accelerator
)


def run_engines(engines: Iterable[Engine]) -> None:
    for engine in engines:
        with tempfile.TemporaryDirectory() as folder:
            own = {"torch_dtype": engine.dtype, "intermediate_size": engine.intermediate_size}
            (Path(folder) / "config.json").write_text(json.dumps(CONFIG | own))
            with LLM(
                folder,
                load_format="dummy",
                enforce_eager=True,
                block_size=engine.block_size,
                max_num_batched_tokens=engine.max_num_batched_tokens,
                kv_cache_memory_bytes=2**22,
            ) as llm:
                prompts = [[5 + i % 1000 for i in range(length)] for length in engine.prompt_lengths]
                llm.generate(prompts, PARAMS[: len(prompts)])
                llm.generate(prompts[0], PARAMS[0])


def run_alone() -> None:
    """Kernels that none of these engines needs."""
    x, gain = torch.randn(21, 203, device="cuda"), torch.ones(203, device="cuda")
    kernels.layer_norm(x, gain, gain, 1e-5)
    shares, experts = kernels.route(x[:, :5], 2, renormalize=True)
    gate_up, down = torch.randn(5, 2 * 37, 203, device="cuda"), torch.randn(5, 203, 37, device="cuda")
    kernels.expert_mlp(x, gate_up, down, shares, experts)
    numbers = torch.arange(-1, 20, device="cuda") % 3 - 1
    kernels.mask_logits(x, torch.randint(256, (2, 28), dtype=torch.uint8, device="cuda"), numbers)


def run_verifications() -> None:
    """Decodes of several tokens, which engines run in graphs alone."""
    for rows in ("verification", "long verification"):
        for head_dim, block_size in ((80, 3), (64, 64)):
            check(ROWS[rows], 6, 2, head_dim, block_size, torch.float32, Knobs(window=17))


def run_triton() -> None:
    """The engine, and a check that it has launched every kernel that there is."""
    launched: set[str] = set()
    run = JITFunction.run

    def recording(self: JITFunction, *args: object, **kwargs: object) -> object:
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    JITFunction.run = recording
    run_engines(ENGINES)
    run_alone()
    run_verifications()
    missed = all_kernels() - launched
    assert not missed, f"{sorted(missed)} did not run: add a request that needs them"
    print(f"{len(launched)} Triton kernels ran", flush=True)


def run_fp32() -> None:
    run_engines(engine for engine in ENGINES if engine.dtype == "float32")
    run_verifications()


def all_kernels() -> set[str]:
    package = triton_kernels
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    functions = {value.fn.__name__ for value in values if isinstance(value, JITFunction)}
    return {name for name in functions if name.endswith("_kernel")}  # the others are called by these


def run_peer_memory() -> None:
    from distllm.comm.nccl import NcclComm
    from tests.gpu.run_one_shot import ONLY

    control = open_control()
    device = select_device(control)
    comm = NcclComm(control.split(0, control.rank, "tp"), "tp", 60, peer_memory=True)
    one_shot = comm.one_shot
    assert one_shot is not None, "these GPUs do not reach each other's memory"
    for limits in ONLY.values():
        one_shot._limits = limits
        for dtype in (torch.bfloat16, torch.float16):
            for shape in ((1, 8), (3, 896), (2, 4104)):
                x, residual = (torch.ones(shape, dtype=dtype, device=device) for _ in range(2))
                one_shot.all_reduce_add_norm(x, residual, residual[0].clone(), 1e-5)
                one_shot.all_reduce(x)
                assert x.eq(control.size).all()
    comm.close()
    control.close()


@triton.jit
def planted_kernel(x, size):
    tl.store(x, tl.load(x + size))


def run_plant() -> None:
    x = torch.ones(7, device="cuda")
    planted_kernel[(1,)](x, 7)
    torch.cuda.synchronize()


if __name__ == "__main__":
    {"Triton": run_triton, "Triton in fp32": run_fp32, "peer memory": run_peer_memory, "plant": run_plant}[
        sys.argv[1]
    ]()
