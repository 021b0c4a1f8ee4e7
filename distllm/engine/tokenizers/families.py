"""What families add to their vocabulary files without writing it down: special tokens that follow the last
id, what goes before a text, how text is cut into words, what ends an answer. Data; reads no file.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.engine.tokenizers.settings import TokenizerSettings


@dataclass(frozen=True)
class TokenizerFamily:
    name: str
    appended: tuple[str, ...] = ()  # special tokens after the vocabulary, in order of ids
    prefix: tuple[str, ...] = ()  # before every text
    adds_bos: bool = False  # where the files do not say
    reads_special: bool = True  # does a special token spelled out in a prompt count as one?
    pattern: str = ""  # of words, for ranks
    normal_form: str = ""  # of Unicode, applied before all else
    stops: tuple[str, ...] = ()  # end an answer although no config says so


GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM_MARKS = ("[MASK]", "[gMASK]", "[sMASK]")
GLM_MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
# Contractions, words, numbers of some digits, punctuation, line ends, blanks: as cl100k_base cuts.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PLAIN = TokenizerFamily("plain", adds_bos=True)
CHATGLM2 = TokenizerFamily(
    "chatglm2", appended=(*GLM_MARKS, "sop", "eop"), prefix=("[gMASK]", "sop"), reads_special=False
)
CHATGLM3 = TokenizerFamily(
    "chatglm3",
    appended=(*CHATGLM2.appended, *GLM_ROLES),
    prefix=CHATGLM2.prefix,
    reads_special=False,
    stops=("<|user|>", "<|observation|>"),
)
GLM4 = TokenizerFamily(
    "glm4",
    appended=("<|endoftext|>", *GLM_MARKS, "<sop>", "<eop>", *GLM_ROLES, *GLM_MEDIA),
    prefix=("[gMASK]", "<sop>"),
    pattern=WORDS.replace("DIGITS", "{1,3}"),
    stops=CHATGLM3.stops,
)
QWEN = TokenizerFamily(
    "qwen",
    appended=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))),
    pattern=WORDS.replace("DIGITS", ""),
    normal_form="NFC",
    stops=("<|im_end|>", "<|endoftext|>"),
)
OF_CLASS = {"ChatGLM4Tokenizer": GLM4, "QWenTokenizer": QWEN}


def find_family(settings: TokenizerSettings) -> TokenizerFamily:
    """By the tokenizer class that the folder names. ChatGLM 2 and 3 share theirs: 3 has roles, or says its
    name.
    """
    if settings.tokenizer_class == "ChatGLMTokenizer":
        is_3 = "<|user|>" in settings.added_tokens or "chatglm3" in settings.source.lower()
        return CHATGLM3 if is_3 else CHATGLM2
    return OF_CLASS.get(settings.tokenizer_class, PLAIN)
