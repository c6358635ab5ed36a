"""Tiny models that are shaped as Qwen3, Llama 3 and Mistral are: tokenizers with their marks, and chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.checkpoints import llama, mistral, qwen3
from pairs import DECODING, LIMITS, SIZES
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from echo_trt.bundle.read_recipe import parse_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.server.tool_formats import marked

QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'These functions can be called:\\n<tools>\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '</tools>\\nCall one by writing\\n<tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call>' }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
#: As of the models that always think: the prompt opens the thought.
QWEN3_THINKING = QWEN3[: QWEN3.index("{%- if add_generation_prompt")] + (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}{{- raise_exception('only single tool calls here') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {%- else %}
        {%- if tools and message.role == 'user' and loop.last %}
            {{- 'Answer with a call, {"name": NAME, "parameters": OBJECT}, of one of\\n' }}
            {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
        {%- endif %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.last %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('an id has nine characters') }}{%- endif %}
            {{- '[TOOL_CALLS] [' if loop.first else ', ' }}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}{{- raise_exception('an id has nine characters') }}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
#: Knows no tools: they come as text.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Between calls' marks of other formats: a template each for one call, and what stands before all and behind them.
CALLS = {
    "coder": (
        "", "<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments | items %}<parameter={{ k }}>\n{{ v }}\n"
        "</parameter>\n{% endfor %}</function>\n</tool_call>", ""),
    "deepseek": (marked.CALLS, marked.CALL + "function" + marked.SEPARATOR + "{{ c.name }}\n```json\n"
        "{{ c.arguments | tojson }}\n```" + marked.CALL_END, marked.CALLS_END),
    "deepseek31": (marked.CALLS, marked.CALL + "{{ c.name }}" + marked.SEPARATOR + "{{ c.arguments | tojson }}"
        + marked.CALL_END, marked.CALLS_END),
    "mistral": ("", "{% if call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
        "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}", ""),
    "mistral_list": ("[TOOL_CALLS] [", '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}', "]"),
}  # fmt: skip
OTHERS = {
    kind: "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    + CHATML.replace(
        "{{ m.content }}",
        "{{ m.content or '' }}{% if m.tool_calls %}"
        f"{begin}{{% for call in m.tool_calls %}}{{% set c = call.function %}}{call}{{% endfor %}}{end}{{% endif %}}",
    )
    for kind, (begin, call, end) in CALLS.items()
}
TEMPLATES = {"qwen3": QWEN3, "thinking": QWEN3_THINKING, "chatml": CHATML, **OTHERS}
CORPUS = 'the theme of a thing, naïve café; {"name": "get_weather", "arguments": {"city": "Paris"}} \n tool think ' * 3
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SHOWN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
MISTRAL_SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
MISTRAL_SPECIAL += ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
VOCAB = 420
#: A schema whose texts a random model ends soon, and one that says itself that it takes no other properties.
NUMBER = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
}
CLOSED_NUMBER = NUMBER | {"additionalProperties": False}


def tokenizer(template: str | None, special: list[str], shown: list[str], **more: Any) -> PreTrainedTokenizerFast:
    """Bytes, their commonest merges, and added tokens: ``shown`` ones stay in texts."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCAB - len(special) - len(shown)
    made.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_tokens([AddedToken(name, special=name in special, normalized=False) for name in special + shown])
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **more)


def qwen3_tokenizer(template: str | None = QWEN3) -> PreTrainedTokenizerFast:
    """Return a tokenizer of which the marks of Mistral's calls are special tokens, those of other formats not."""
    names = (marked.CALLS, marked.CALLS_END, marked.CALL, marked.CALL_END, marked.SEPARATOR)
    shown = [name for name in names if name in (template or "")]
    special = [name for name in ("[TOOL_CALLS]", "[ARGS]") if name in (template or "")]
    return tokenizer(template, QWEN_SPECIAL + special, QWEN_SHOWN + shown, eos_token="<|im_end|>")


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(LLAMA3, LLAMA_SPECIAL, [], bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(MISTRAL, MISTRAL_SPECIAL, [], bos_token="<s>", eos_token="</s>")


OTHERS = {"llama3": (llama3_tokenizer, llama), "mistral_7b": (mistral_tokenizer, mistral)}


def write(folder: Path, kind: str) -> Recipe:
    """Return a checkpoint, and the recipe of its bundle. kind: one of OTHERS or of TEMPLATES."""
    made = OTHERS[kind][0]() if kind in OTHERS else qwen3_tokenizer(TEMPLATES[kind])
    made.save_pretrained(folder / kind)
    network = OTHERS[kind][1] if kind in OTHERS else qwen3
    sizes = {**SIZES, "vocab_size": len(made), "eos_token_id": made.eos_token_id}
    network(**sizes).save_pretrained(folder / kind)
    raw = {
        "name": kind,
        "target": {"path": str(folder / kind)},
        "draft": {"kind": "lookup"},
        "precision": "fp32",
        "limits": {**LIMITS, "context": 1200},
        "decoding": DECODING,
    }
    return parse_recipe(raw, "recipe.yaml")
