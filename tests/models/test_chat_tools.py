"""Tools, their calls and their results in chat templates: what templates are given, and what no text can forge."""

from __future__ import annotations

import json
import re

import pytest
import tool_models
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from echo_trt.engine.text.prompts import ChatPrompt, PromptReader
from echo_trt.models.chat import ChatEncoder
from echo_trt.models.messages import checked_messages, checked_tools

USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
NAMES = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|start_header_id|>", "</tool_response>", "<tool_response>"]
RULE = "give a list."


def call(arguments: object, **more: object) -> dict:
    return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments, **more}}


def turns(arguments: object, result: str) -> list[dict]:
    assistant = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    return [USER, assistant, {"role": "tool", "tool_call_id": "1", "content": result}]


@pytest.fixture(scope="module")
def encoders() -> list[tuple[ChatEncoder, object]]:
    made = [tool_models.qwen3_tokenizer(), tool_models.llama3_tokenizer()]  # Mistral's changes ids of calls
    return [(ChatEncoder(each), each) for each in made]


@given(parts=st.lists(st.sampled_from([*NAMES, "a", " ", "\n", "é"]), max_size=6))
def test_names_of_control_tokens_in_calls_results_and_descriptions_are_text(encoders, parts):
    text = "".join(parts)
    for encoder, tokenizer in encoders:

        def count(text: str, encoder=encoder, tokenizer=tokenizer) -> list[int]:
            tool = {"type": "function", "function": {"name": "add", "description": text, "parameters": {"x": text}}}
            messages = checked_messages(turns(json.dumps({"a": text}), text), "messages", RULE)
            ids = encoder.ids(messages, checked_tools([tool]))
            return [token for token in ids if tokenizer.convert_ids_to_tokens(token) in NAMES]

        assert count(text) == count("x")


def test_arguments_are_objects_for_the_template_and_null_content_is_empty(encoders):
    for encoder, tokenizer in encoders:
        texts = [
            tokenizer.decode(encoder.ids(checked_messages(turns(given, "5"), "messages", RULE), [TOOL]))
            for given in ('{"a":  1}', {"a": 1})
        ]
        assert texts[0] == texts[1]
        assert '": {"a": 1}}' in texts[0]
        assert "None" not in texts[0]


def test_what_is_kept_of_a_message():
    message = USER | {"refusal": None, "name": "Ann", "reasoning_content": "Hm.", "tool_calls": [], "x": 5}
    assert checked_messages([message], "messages", RULE) == [USER | {"name": "Ann", "reasoning_content": "Hm."}]
    [kept] = checked_messages(turns("", "5")[1:2], "messages", RULE)
    assert kept == {"role": "assistant", "content": "", "tool_calls": [call({})]}


@pytest.mark.parametrize(
    ("messages", "output"),
    [
        ([USER | {"name": 5}], "messages[0].name is no text"),
        ([USER | {"tool_calls": "x"}], "messages[0].tool_calls is no list"),
        (turns("{", "5"), "messages[1].tool_calls[0].function.arguments is no JSON object"),
        (turns("[" * 100_000, "5"), "messages[1].tool_calls[0].function.arguments is no JSON object"),
        (turns({"a": "\ud800"}, "5"), "messages[1].tool_calls[0].function.arguments is no JSON object"),
        ([USER | {"tool_calls": [{}]}], "messages[0].tool_calls[0] has no function with a name"),
        ([{"role": "assistant", "content": None}], "messages[0] has no role and content"),
    ],
)
def test_messages_that_are_none(messages, output):
    with refused(output):
        checked_messages(messages, "messages", RULE)


@pytest.mark.parametrize(
    ("tools", "output"),
    [
        ({}, "tools is no list of tools"),
        ([TOOL] * 129, "tools has 129 entries; give at most 128"),
        ([TOOL, TOOL], "tools[1] is a second function 'add'"),
        ([{"type": "function"}], "tools[0] has no function with a name"),
        ([{"function": {"name": "x", "description": "\ud800"}}], "tools[0] holds half a surrogate pair"),
    ],
)
def test_tools_that_are_none(tools, output):
    with refused(output):
        checked_tools(tools)


#: As Gemma's and Mistral's: no system prompt, and roles that take turns.
IN_TURNS = (
    "{% for m in messages %}"
    "{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('roles take turns') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
LISTED = f"You can call these functions:\n<tools>\n{json.dumps(TOOL)}\n</tools>\nTo call one, write\n"
LISTED += '<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>'
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (tool_models.CHATML, [f"<|im_start|>system\n{LISTED}<|im_end|>\n", "<|im_start|>user\nhello<|im_end|>\n"]),
        (IN_TURNS, [f"<|im_start|>user\n{LISTED}\n\nhello<|im_end|>\n"]),
    ],
)
def test_templates_without_tools_get_them_as_text(template, before):
    """In Hermes' form; the results of two calls are one turn."""
    tokenizer = tool_models.qwen3_tokenizer(template)
    encoder = ChatEncoder(tokenizer)
    chat = turns({"a": 1}, "5")
    chat[1]["tool_calls"] *= 2
    messages = checked_messages([*chat, chat[2], {"role": "user", "content": "So?"}], "messages", RULE)
    text = tokenizer.decode(encoder.ids(messages, [TOOL]))
    result = "<tool_response>\n5\n</tool_response>\n"
    after = f"<|im_start|>assistant\n{CALLED}\n{CALLED}<|im_end|>\n<|im_start|>user\n{result * 2}So?<|im_end|>\n"
    assert text.startswith("".join(before) + after)
    without = tokenizer.decode(encoder.ids(messages))
    assert without.startswith("<|im_start|>user\nhello<|im_end|>\n" + after)
    assert tokenizer.decode(encoder.ids([USER])).startswith("<|im_start|>user\nhello<|im_end|>\n")


def test_tools_as_text_go_behind_a_system_prompt_and_write_no_control_token():
    tokenizer = tool_models.qwen3_tokenizer(tool_models.CHATML)
    system = {"role": "system", "content": "Be brief."}
    tool = {"type": "function", "function": {"name": "add", "description": "<|im_end|>"}}
    ids = ChatEncoder(tokenizer).ids([system, USER], [tool])
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions:\n")
    assert ids.count(tokenizer.eos_token_id) == 2


#: As SmolLM3's: tools under another name, calls of earlier turns left out, and a mode of thinking in the system prompt.
SMOLLM3 = (
    "{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{%- set thinks = enable_thinking and '/no_think' not in system %}"
    "<|im_start|>system\n{{ '/think' if thinks else '/no_think' }}\n{{ system.replace('/no_think', '') }}"
    "{% if xml_tools %}{{ xml_tools | tojson }}{% endif %}<|im_end|>\n"
    "{%- for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not thinks %}<think>\n\n</think>\n{% endif %}{% endif %}"
)


def test_a_template_with_tools_under_another_name_gets_them_as_text_and_has_its_thinking():
    tokenizer = tool_models.qwen3_tokenizer(SMOLLM3)
    encoder = ChatEncoder(tokenizer)
    assert encoder.variables == {"enable_thinking", "xml_tools"}
    chat = checked_messages([{"role": "system", "content": "Be brief."}, *turns({"a": 1}, "5")], "messages", RULE)
    thinking = tokenizer.decode(encoder.ids(chat, [TOOL]))
    assert thinking.startswith(f"<|im_start|>system\n/think\nBe brief.\n\n{LISTED}<|im_end|>")
    assert CALLED in thinking
    assert thinking.endswith("<|im_start|>assistant\n")
    chat[0]["content"] += "/no_think"
    for asked in (encoder.ids(chat), encoder.ids(chat[1:], kwargs={"enable_thinking": False})):
        assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
        assert "system\n/no_think\n" in tokenizer.decode(asked)


def test_ids_of_calls_are_as_mistral_s_templates_insist():
    tokenizer = tool_models.mistral_tokenizer()
    written = tokenizer.decode(ChatEncoder(tokenizer).ids(checked_messages(turns({"a": 1}, "5"), "messages", RULE)))
    [called], [answered] = re.findall('"id": "([a-z0-9]{9})"', written), re.findall('"call_id": "(.*?)"', written)
    assert called == answered
    own = checked_messages(json.loads(json.dumps(turns({"a": 1}, "5")).replace('"1"', '"x1y2z3abc"')), "messages", RULE)
    assert tokenizer.decode(ChatEncoder(tokenizer).ids(own)) == written.replace(called, "x1y2z3abc")


def test_a_tokenizer_without_a_template_takes_tools():
    tokenizer = tool_models.qwen3_tokenizer(None)
    assert tokenizer.decode(ChatEncoder(tokenizer).ids([USER], [TOOL])) == f"{LISTED}\nhello"


def test_variables_of_a_template_may_be_set_and_nothing_else():
    template = (
        "{% if not date is defined %}{% set date = 'today' %}{% endif %}{% set own = 1 %}{{ bos_token }}{{ date }}"
        "{{ enable_thinking }}{{ tools }}{{ documents }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    encoder = ChatEncoder(tool_models.qwen3_tokenizer(template))
    assert encoder.variables == {"date", "enable_thinking"}
    for name in ("own", "chat_template", "tokenize", "messages", "tools", "nobody"):
        with refused(f"chat_template_kwargs.{name} is no variable of this model's chat template; give date"):
            encoder.ids([USER], kwargs={name: 1})
    with refused("chat_template_kwargs.x is no variable of this model's chat template; leave it out"):
        ChatEncoder(tool_models.llama3_tokenizer()).ids([USER], kwargs={"x": 1})


def test_names_of_control_tokens_in_variables_are_text():
    template = "{{ x }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = tool_models.qwen3_tokenizer(template)
    ids = ChatEncoder(tokenizer).ids([USER], kwargs={"x": "<|im_end|>"})
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "kwargs", "inside"),
    [
        (tool_models.QWEN3, {}, False),
        (tool_models.QWEN3, {"enable_thinking": False}, False),
        (tool_models.QWEN3_THINKING, {}, True),
    ],
)
def test_requests_say_whether_the_answer_begins_in_a_thought(tmp_path, template, kwargs, inside):
    """Marks that a user writes say nothing of it."""
    tool_models.qwen3_tokenizer(template).save_pretrained(tmp_path)
    reader = PromptReader(tmp_path, 1000)
    chat = ChatPrompt([{"role": "user", "content": "what is <think>?"}], [TOOL], kwargs)
    assert reader.in_thought(reader.ids(chat)) is inside
    info = reader.facts
    assert info.takes_tools
    assert info.thinking.closes == "</think>"
    assert {"<tool_call>", "<think>"} & set(info.tokens)
