"""Train the bundled demo model, its draft model and their tokenizer on one text file.

    python examples/train_demo.py --text ../shared/data/grimm.txt --out distllm/assets

The text is small: a model of this size learns it by heart long before it has learned to write.  So a few
teachers read it first, held back by dropout, weight decay and words spelled in several ways; the demo model
learns from the text and from the mean of their predictions, and reads the text alone a few times more until
it writes whole sentences; the draft model learns from the demo model, on the text and on tales that it makes
up.  The last 5 % of the text is never trained on.  The folders written load with transformers unchanged.
"""

import argparse
import copy
import datetime
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

EOS = "<|endoftext|>"
CONTEXT = 1024
VOCAB = 2048
DEMO = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 8}
DRAFT = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}


def split_text(path):
    """Training text and hold-out text (the last 5 % of the file), with nothing but EOS between two tales."""
    text = Path(path).read_text(encoding="utf-8")
    cut = int(len(text) * 0.95)
    return [part.replace(f"\n\n{EOS}\n\n", EOS) for part in (text[:cut], text[cut:])]


def train_tokenizer(text):
    """Byte-level BPE: any text round-trips, nothing is unknown; like Llama's, it puts BOS before a prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split(EOS), trainer)
    bos = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, bos)])
    return tokenizer


def coarser(tokenizer, merges):
    """The same vocabulary with only its first merges: it spells the text in more and shorter tokens."""
    spec = json.loads(tokenizer.to_str())
    spec["model"]["merges"] = spec["model"]["merges"][:merges]
    return Tokenizer.from_str(json.dumps(spec))


def encode(tokenizer, text):
    return torch.tensor(tokenizer.encode(text).ids)


def build(shape, device):
    """A Llama model with random weights: two query heads share a key-value head, embeddings are tied."""
    config = LlamaConfig(
        **shape, vocab_size=VOCAB, num_key_value_heads=shape["num_attention_heads"] // 2, head_dim=32,
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


def add_dropout(model, rate):
    """Drop from what enters the residual stream; hooks leave the saved architecture as it is."""

    def drop(module, _, output):
        return F.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def windows(stream, tokens, seed):
    """Endless batches of random windows; a quarter of them begin where a tale begins, as a prompt does."""
    generator, starts = torch.Generator().manual_seed(seed), (stream == 0).nonzero().flatten().cpu()
    last, offsets = len(stream) - CONTEXT - 1, torch.arange(CONTEXT + 1)
    while True:
        at = torch.randint(last + 1, (max(1, tokens // CONTEXT),), generator=generator)
        tales = starts[torch.randint(len(starts), (len(at) // 4,), generator=generator)]
        at[: len(tales)] = tales.clamp(max=last)
        yield stream[(at[:, None] + offsets).to(stream.device)]


def in_turn(*sources):
    for batches in zip(*sources, strict=True):
        yield from batches


def logits_of(model, ids):
    """The model's forward pass, layer by layer: the one in transformers makes Python wait for the GPU."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with torch.autocast(ids.device.type, torch.bfloat16):
        x = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(x, positions)
        for layer in model.model.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return model.lm_head(model.model.norm(x)).float()


def text_loss(model, ids):
    return F.cross_entropy(logits_of(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def distill_loss(teachers, hard):
    """Cross entropy with the teachers' mean prediction, mixed with a share (hard) of the text itself."""

    def loss(model, ids):
        with torch.no_grad():
            soft = sum(logits_of(teacher, ids[:, :-1]).softmax(-1) for teacher in teachers) / len(teachers)
        soft_loss = F.cross_entropy(logits := logits_of(model, ids[:, :-1]).flatten(0, 1), soft.flatten(0, 1))
        return hard * F.cross_entropy(logits, ids[:, 1:].flatten()) + (1 - hard) * soft_loss

    return loss


@torch.no_grad()
def evaluate(model, stream):
    """Nats for each token but the first: windows of 1024 tokens advance by 512; the new ones count."""
    last = len(stream) - 1 - CONTEXT
    starts = [*range(0, last, CONTEXT // 2), last]
    ids = torch.stack([stream[at : at + CONTEXT + 1] for at in starts]).to(model.device)
    logits = logits_of(model, ids[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(starts), CONTEXT).cpu()
    fresh = [row[a - b :] for row, a, b in zip(nats[1:], starts[:-1], starts[1:], strict=True)]
    return torch.cat([nats[0], *fresh])


@torch.no_grad()
def agreement(model, other, stream):
    """The share of positions at which both models think the same token most likely."""
    ids = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT).to(model.device)
    return (logits_of(model, ids).argmax(-1) == logits_of(other, ids).argmax(-1)).float().mean().item()


def optimizer_for(model, decay):
    """AdamW whose learning rate is a tensor, so that a captured step can read it; it begins at zero."""
    norms, weights = [], []
    for parameter in model.parameters():
        (norms if parameter.dim() == 1 else weights).append(parameter)
    groups = [{"params": weights, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    rate = torch.zeros((), device=model.device)
    cuda = model.device.type == "cuda"
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=cuda, capturable=cuda), rate


def captured(step):
    """The step as one CUDA graph: launched one by one, the kernels of so small a model leave the GPU idle."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def stepper(model, average, ids, loss_of, optimizer, keep):
    """One step of training on ids, which also moves the average of the weights; and the loss it last saw."""
    weights, averages = list(model.parameters()), list(average.parameters())
    seen = torch.zeros((), device=model.device)

    def step():
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - keep)
            seen.copy_(loss)

    return captured(step) if model.device.type == "cuda" else step, seen


def fit(name, model, batches, loss_of, held, steps, lr, decay, dropout, pick=True):
    """AdamW, warm-up, cosine to zero; returns averaged weights, the best on the hold-out or the last."""
    add_dropout(model.train(), dropout)
    average, ids = copy.deepcopy(model).eval(), next(batches)
    optimizer, rate = optimizer_for(model, decay)
    step, seen = stepper(model, average, ids, loss_of, optimizer, min(0.998, steps / (steps + 10)))
    best, kept, begin = math.inf, None, time.time()
    for number in range(1, steps + 1):
        rate.fill_(lr * min(20 * number / steps, 0.5 + 0.5 * math.cos(math.pi * number / steps)))
        ids.copy_(next(batches))
        step()
        if number % max(1, steps // 10) == 0:
            nats, seconds = evaluate(average, held).mean().item(), time.time() - begin
            print(f"{name} {number:5d} train {seen:.4f} held {nats:.4f} {seconds:.1f}s", flush=True)
            if nats < best or not pick:
                best, kept = nats, copy.deepcopy(average)
    return kept


@torch.no_grad()
def write(model, ids, length, **options):
    """The prompts in ids continued to length tokens by sampling, straight past the end of a tale."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # sampling has a sum that CUDA cannot order
    ids = ids.to(model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_length=length,
        eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    torch.use_deterministic_algorithms(True)
    return out


def train_teacher(args, number, streams, held):
    """A model like the demo; every fourth batch that it reads is spelled in shorter tokens."""
    torch.manual_seed(args.seed + number)
    full, *coarse = [windows(stream, args.batch, args.seed + number) for stream in streams]
    batches = in_turn(*[source for each in coarse for source in (full, full, full, each)])
    model = build(DEMO, args.device)
    return fit(f"teacher{number}", model, batches, text_loss, held, args.teacher_steps, args.lr, 2.0, 0.3)


def train_demo(args, streams, held):
    teachers = [train_teacher(args, number, streams, held) for number in range(args.teachers)]
    torch.manual_seed(args.seed + 100)
    batches, loss = windows(streams[0], args.batch, args.seed + 100), distill_loss(teachers, args.hard)
    return fit("demo", build(DEMO, args.device), batches, loss, held, args.steps, args.lr, 0.5, 0.1)


def polish(args, demo, stream, held):
    """Some more readings of the text, then most of the way there: fluency for a little perplexity."""
    torch.manual_seed(args.seed + 200)
    batches, model = windows(stream, args.batch // 4, args.seed + 200), copy.deepcopy(demo)
    model = fit(
        "polish", model, batches, text_loss, held, args.polish_steps, 0.4 * args.lr, 0.1, 0.1, pick=False
    )
    with torch.no_grad():
        torch._foreach_lerp_(list(demo.parameters()), list(model.parameters()), args.polish)
    return demo


def train_draft(args, draft, demo, stream, held):
    """The draft learns what the demo predicts, half of the time on what the demo writes, as in use."""
    made_up = write(demo, torch.zeros(args.tales, 1, dtype=torch.long), CONTEXT // 2).flatten()
    batches = in_turn(*[windows(each, args.batch // 4, args.seed + 300) for each in (stream, made_up)])
    loss = distill_loss([demo], 0.0)
    return fit("draft", draft, batches, loss, held, args.draft_steps, args.lr, 0.1, 0.0, pick=False)


def load(folder, device, dtype):
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def save(model, tokenizer, folder):
    """Writes the folder in bfloat16; returns the model read back from it, to be judged as others see it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    tokenizer.save(f"{folder}/tokenizer.json")
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS}
    words |= {"model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n")
    return load(folder, model.device, torch.bfloat16)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
---

# {name}

{what}

| | |
| --- | --- |
| architecture | Llama: {layers} layers, hidden {hidden}, MLP {mlp}, {heads} query heads, \
{kv} key-value heads, head size 32, tied embeddings, context {context} |
| parameters | {parameters:,} in bfloat16 |
| tokenizer | byte-level BPE, {vocab} tokens, trained on the same text; `{eos}` begins and ends a tale |
| data | *Household Tales* of the Brothers Grimm, translated by Margaret Hunt (1884), public domain |
| training | {training}; {seconds:.0f} s on {hardware}, {date}; the hold-out chose \
the checkpoint and the settings, so its figures flatter the model a little |
| hold-out | the last 5 % of the text: perplexity {ppl:.2f} per token, {bits:.3f} bits per byte \
({tokens:,} tokens, windows of 1024 that advance by 512) |
{extra}
Made by

    {command}

with torch {torch} and transformers {transformers}. {determinism}

## A sample

Temperature 0.75, top-p 0.95, {length} tokens with the prompt:

> {sample}

## Limits

It is there to show and to test an inference runtime on any machine. It knows nothing but old tales: it
answers no questions, loses the thread after a few sentences, and repeats the cruelties and prejudices of its
source.
"""
DETERMINISM = (
    "The seed fixes every random choice and torch runs its deterministic kernels: two short runs side by "
    "side on an H100 wrote the same demo weights bit for bit. Other hardware or versions give other weights."
)


def card(args, model, tokenizer, held, held_bytes, **words):
    """The model card; what can be measured is measured on the model read back from its folder."""
    torch.manual_seed(args.seed)
    nats, config, length = evaluate(model, held), model.config, 160
    prompt = encode(tokenizer, "There was once a king who had three daughters")[None]
    sample = tokenizer.decode(write(model, prompt, length, temperature=0.75, top_p=0.95)[0].tolist())
    return CARD.format(
        ppl=nats.mean().exp(), bits=nats.sum() / math.log(2) / held_bytes, tokens=len(nats), eos=EOS,
        vocab=VOCAB, context=CONTEXT, layers=config.num_hidden_layers, hidden=config.hidden_size,
        mlp=config.intermediate_size, heads=config.num_attention_heads, kv=config.num_key_value_heads,
        parameters=model.num_parameters(), date=datetime.date.today(), command=args.command,
        hardware=torch.cuda.get_device_name() if model.device.type == "cuda" else "a CPU", length=length,
        torch=torch.__version__, transformers=transformers.__version__, determinism=DETERMINISM,
        sample=sample.replace("\n", "\n> "), **words,
    )  # fmt: skip


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--text", default="../shared/data/grimm.txt")
    add("--out", default="distllm/assets")
    add("--start", help="the folder of an earlier run: polish its demo model, go on with its draft model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=16384, help="tokens in a batch; a quarter to polish and for the draft")
    add("--lr", type=float, default=3e-3, help="peak learning rate; to polish 0.4 of it")
    add("--teachers", type=int, default=3, help="how many")
    add("--teacher-steps", type=int, default=1200, help="of each teacher")
    add("--steps", type=int, default=1800, help="of the demo model")
    add("--hard", type=float, default=0.3, help="share of the text itself in its loss")
    add("--polish-steps", type=int, default=400, help="on the text alone")
    add("--polish", type=float, default=0.65, help="share of the way to the polished weights")
    add("--draft-steps", type=int, default=3000, help="of the draft model")
    add("--tales", type=int, default=512, help="beginnings made up for the draft model to read")
    args = parser.parse_args()
    changed = [(k, v) for k, v in vars(args).items() if v != parser.get_default(k) and k != "out"]
    flags = [f" --{k.replace('_', '-')} {v}" for k, v in changed]
    args.command = "python examples/train_demo.py" + "".join(flags)
    return args


def make_demo(args, tokenizer, streams, held, held_bytes):
    begin = time.time()
    if args.start:
        demo = load(f"{args.start}/demo", args.device, torch.float32)
    else:
        demo = train_demo(args, streams, held)
    demo = save(polish(args, demo, streams[0], held), tokenizer, f"{args.out}/demo")
    words = {
        "name": "distllm demo", "extra": "", "seconds": time.time() - begin,
        "what": "A language model small enough to travel with the source code. It writes fairy tales.",
        "training": f"{args.teachers} teachers of the same shape, {args.teacher_steps} steps of "
        f"{args.batch:,} tokens each; {args.steps} such steps on the text ({args.hard:.0%}) and on the "
        f"teachers' mean prediction; {args.polish_steps} steps of {args.batch // 4:,} tokens on the text "
        f"alone, {args.polish:.0%} of the way there",
    }  # fmt: skip
    Path(args.out, "demo/README.md").write_text(card(args, demo, tokenizer, held, held_bytes, **words))
    return demo


def make_draft(args, demo, tokenizer, stream, held, held_bytes):
    begin = time.time()
    torch.manual_seed(args.seed + 300)
    if args.start:
        draft = load(f"{args.start}/demo-draft", args.device, torch.float32)
    else:
        draft = build(DRAFT, args.device)
    draft = save(train_draft(args, draft, demo, stream, held), tokenizer, f"{args.out}/demo-draft")
    agreed = agreement(demo, draft, held)
    words = {
        "name": "distllm demo draft", "seconds": time.time() - begin,
        "what": "The draft model for speculative decoding with the distllm demo.",
        "training": f"{args.draft_steps} steps on the demo model's predictions, half of them on the text, "
        f"half on {args.tales} beginnings that it made up; {args.batch // 4:,} tokens a step",
        "extra": f"| as a draft | its most likely token is the demo's at {agreed:.1%} of the hold-out |\n",
    }  # fmt: skip
    Path(args.out, "demo-draft/README.md").write_text(card(args, draft, tokenizer, held, held_bytes, **words))


def main():
    args = parse()
    torch.use_deterministic_algorithms(True)
    text, held_text = split_text(args.text)
    tokenizer = train_tokenizer(text)
    spellings = [tokenizer, coarser(tokenizer, 600), coarser(tokenizer, 1200)]
    streams = [encode(each, text).to(args.device) for each in spellings]
    held, held_bytes = encode(tokenizer, held_text), len(held_text.replace(EOS, "").encode())
    demo = make_demo(args, tokenizer, streams, held, held_bytes)
    make_draft(args, demo, tokenizer, streams[0], held, held_bytes)


if __name__ == "__main__":
    main()
