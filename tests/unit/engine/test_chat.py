"""Rendered chats against transformers' own rendering; formats without a template against the families'
published rules, spelled out here; templates that reach for what they may not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distllm.engine.chat import Chat, ChatFormat, as_conversations, load_chat_format
from distllm.engine.tokenizers import load_tokenizer
from distllm.errors import CheckpointError, RequestError
from tests.tokenizers import KINDS, byte_level, train_pieces, write_json

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_2 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, turns=0) %}
{% for message in messages %}
  {% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
  {% endif %}
  {% if message.tool_calls %}{% set ns.turns = ns.turns + 1 %}{% continue %}{% endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
PHI_3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}\
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}\
{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}\
{% generation %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endgeneration %}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
DATED = """{{ strftime_now('%Y') }}{% for m in messages %}\
{{ m | tojson }}{% break %}{% endfor %}{{ enable_thinking }}"""
TEMPLATES = {
    "llama-3": LLAMA_3,
    "qwen-2": QWEN_2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi-3": PHI_3,
    "dated": DATED,
}

HELLO = {"role": "user", "content": '  Hi <b>&\'"you" 漢字 🙂\n'}
ANSWER = {"role": "assistant", "content": "Yes.\n\n"}
SYSTEM = {"role": "system", "content": " Be brief. "}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
CHATS: list[list[dict[str, Any]]] = [
    [HELLO],
    [HELLO, ANSWER, HELLO],
    [SYSTEM, HELLO],
    [SYSTEM, HELLO, ANSWER],
    [HELLO, HELLO],
    [HELLO, CALL, {"role": "tool", "content": "<5>"}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a < b & 'c' é", "x": [1]}}]
NAMES = {"bos_token": "<|end|>", "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True}}


def chat_of(folder: Path, template: str | list[dict[str, str]] | None = None) -> ChatFormat:
    """Of a folder with any tokenizer; a template makes it one with tokenizer.json."""
    if template is not None:
        byte_level(folder)
        write_json(folder / "tokenizer_config.json", {**NAMES, "chat_template": template})
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    chat = load_chat_format(folder, tokenizer)
    assert chat is not None
    return chat


def render(chat: ChatFormat, messages: Any, tools: Any = None, answer: bool = True, **variables: Any) -> Any:
    (messages,) = as_conversations(messages)
    return chat.render(Chat(messages, tools, answer, variables))


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_them(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    chat = chat_of(tmp_path, TEMPLATES[name])
    reference: Any = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    for messages in CHATS:
        for tools in (None, TOOLS):
            for answer in (False, True):
                options: dict[str, Any] = {"tools": tools, "enable_thinking": False}
                try:
                    expected = reference.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=answer, **options
                    )
                except Exception:
                    with pytest.raises(RequestError, match="the chat template refuses these messages"):
                        render(chat, messages, tools, answer, enable_thinking=False)
                    continue
                prompt = render(chat, messages, tools, answer, enable_thinking=False)
                assert prompt.text == expected
                assert prompt.token_ids == reference.encode(expected, add_special_tokens=False)


def test_precedence(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    chat = chat_of(tmp_path, named)
    assert render(chat, [HELLO]).text == "plain"
    assert render(chat, [HELLO], TOOLS).text == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render(chat_of(tmp_path), [HELLO], TOOLS).text == "file"


def test_files_of_a_download_cache(tmp_path: Path) -> None:
    """snapshots/REVISION/file → ../../blobs/HASH, as weights may be; but not out of the cache."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    byte_level(blobs)
    (blobs / "chat_template.jinja").write_text("from a blob")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert render(chat_of(snapshot), [HELLO]).text == "from a blob"
    (tmp_path / "elsewhere").write_text("secret")
    (snapshot / "tokenizer_config.json").symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json lies outside the folder"):
        chat_of(snapshot)


def test_what_the_template_says_no_to(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render(chat_of(tmp_path, MISTRAL), [HELLO, HELLO])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ ''|attr('__class__') }}x{{ ''['__class__']['__mro__'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_what_reaches_out_is_stopped(template: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="reaches for what templates may not have") as caught:
        render(chat_of(tmp_path, template), [HELLO])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ undefined_thing.x }}",
    ],
)
def test_what_breaks_is_refused(template: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the chat template refuses these messages"):
        render(chat_of(tmp_path, template), [HELLO])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "may be empty"),
        ([[]], "may be empty"),
        ("hello", "list of {role, content}"),
        ([{"content": "x"}], "list of {role, content}"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "type 'image'; only text is read"),
        ([{"role": "user", "content": object()}], "plain JSON data"),
        ([{"role": "user", "content": "\ud800"}], "plain JSON data"),
    ],
)
def test_what_is_no_message(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        as_conversations(messages)


def pieces_of(folder: Path, **config: Any) -> Any:
    from sentencepiece import SentencePieceProcessor

    train_pieces(folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", config)
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def say(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def test_chatglm3_is_put_together_from_ids(tmp_path: Path) -> None:
    model = pieces_of(tmp_path, tokenizer_class="ChatGLMTokenizer", name_or_path="THUDM/chatglm3-6b")
    n, sp = model.GetPieceSize(), model.EncodeAsIds
    head, system, user, assistant, observation = [n + 1, n + 3], n + 5, n + 6, n + 7, n + 8
    chat = chat_of(tmp_path)
    messages = [
        say("system", "abc"),
        say("user", "<|user|> x"),
        say("assistant", "y", metadata="f"),
        say("observation", "z"),
    ]
    expected = [*head, system, *sp("\n"), *sp("abc"), user, *sp("\n"), *sp("<|user|> x")]
    expected += [assistant, *sp("f\n"), *sp("y"), observation, *sp("\n"), *sp("z"), assistant]
    assert render(chat, messages) == (None, expected)
    assert render(chat, messages, answer=False) == (None, expected[:-1])
    tool = sp('abc\n[\n    {\n        "a": "é"\n    }\n]')
    assert render(chat, messages[:1], [{"a": "é"}]).token_ids == [*head, system, *sp("\n"), *tool, assistant]
    for bad, tools in [([say("tool", "x")], None), (messages[1:], TOOLS), ([{"role": "user"}], None)]:
        with pytest.raises(RequestError):
            render(chat, bad, tools)


GLM_4 = """[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>\
{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_glm4_with_and_without_its_template(tmp_path: Path) -> None:
    """glm-4-9b-chat has 151329 ranks: [gMASK] 151331, <sop> 151333, roles 151335 … 151338."""
    KINDS["glm4"](tmp_path)
    tokenizer, chat = load_tokenizer(tmp_path), chat_of(tmp_path)
    assert tokenizer is not None
    n, plain = tokenizer.special_tokens["<|endoftext|>"], tokenizer.encode_plain
    assert tokenizer.stop_token_ids == {n + 7, n + 9}
    messages = [
        say("system", "ab"),
        say("user", "x 漢"),
        say("assistant", "y", metadata="f"),
        say("user", "z"),
    ]
    expected = [n + 2, n + 4, n + 6, *plain("\n"), *plain("ab"), n + 7, *plain("\n"), *plain("x 漢")]
    expected += [n + 8, *plain("f\n"), *plain("y"), n + 7, *plain("\n"), *plain("z"), n + 8]
    assert render(chat, messages) == (None, expected)
    spelled = render(chat, [say("user", "<|assistant|>")], answer=False).token_ids
    assert spelled == [n + 2, n + 4, n + 7, *plain("\n"), *plain("<|assistant|>")], (
        "what users write is letters"
    )
    with pytest.raises(RequestError, match="GLM-4's chat format knows no tools"):
        render(chat, messages, TOOLS)
    settings = {"tokenizer_class": "ChatGLM4Tokenizer", "chat_template": GLM_4}
    write_json(tmp_path / "tokenizer_config.json", settings)
    templated = render(chat_of(tmp_path), messages)
    assert templated.token_ids == expected
    assert templated.text.startswith("[gMASK]<sop><|system|>\nab<|user|>\nx 漢<|assistant|>f\ny")


def test_chatglm2_counts_rounds(tmp_path: Path) -> None:
    model = pieces_of(tmp_path, tokenizer_class="ChatGLMTokenizer", name_or_path="THUDM/chatglm2-6b")
    n, chat = model.GetPieceSize(), chat_of(tmp_path)
    prompt = render(chat, [say("user", "a"), say("assistant", "b"), say("user", "c")])
    assert prompt.text == "[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答："
    assert prompt.token_ids == [n + 1, n + 3, *model.EncodeAsIds(prompt.text)]
    with pytest.raises(RequestError, match="ChatGLM2's chat format knows no tools"):
        render(chat, [say("user", "a")], TOOLS)


def test_baichuan_has_ids_for_roles(tmp_path: Path) -> None:
    model = pieces_of(tmp_path, tokenizer_class="BaichuanTokenizer", add_bos_token=False)
    write_json(tmp_path / "generation_config.json", {"user_token_id": 195, "assistant_token_id": 196})
    sp, chat = model.EncodeAsIds, chat_of(tmp_path)
    messages = [say("system", "abc"), say("user", "x"), say("assistant", "y"), say("user", "</s>")]
    expected = [*sp("abc"), 195, *sp("x"), 196, *sp("y"), 195, *sp("</s>"), 196]
    assert render(chat, messages) == (None, expected)
    assert render(chat, messages[1:3]) == (None, [195, *sp("x"), 196, *sp("y")])


def test_qwen_writes_chatml(tmp_path: Path) -> None:
    KINDS["qwen"](tmp_path)
    tokenizer, chat = load_tokenizer(tmp_path), chat_of(tmp_path)
    assert tokenizer is not None
    prompt = render(chat, [say("user", "ab"), say("assistant", "x"), say("user", "<|im_end|>")])
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
        "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == text
    end = tokenizer.special_tokens["<|im_end|>"]
    assert prompt.token_ids.count(end) == 4, "the one that a user wrote is letters"
    with pytest.raises(RequestError, match="knows no enable_thinking"):
        render(chat, [say("user", "ab")], enable_thinking=True)


def test_no_template_and_no_format(tmp_path: Path) -> None:
    byte_level(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert load_chat_format(tmp_path, tokenizer) is None
