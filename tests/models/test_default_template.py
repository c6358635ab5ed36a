"""The default recipe's chat template: the checkpoint's own without tools, Hermes' form with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tool_models
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.bundle.read_recipe import load_recipe
from echo_trt.bundle.sources import locate
from echo_trt.errors import UserError
from echo_trt.models.chat import ChatEncoder
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.open_tokenizer import read_template

RECIPE = Path(__file__).parents[2] / "build/smollm2-135m.yaml"
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": st.sampled_from(["", "a\n b ", "{{ x }}", "<|im_end|>"])})
USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"é": 1}}}


@pytest.fixture(scope="module")
def template() -> str:
    return read_template(RECIPE.parent / load_recipe(RECIPE).target.chat_template)


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return open_checkpoint(locate(load_recipe(RECIPE).target, RECIPE.parent)).tokenizer()
    except UserError as error:
        pytest.skip(f"the default model is not here: {error}")


@given(messages=st.lists(MESSAGE, min_size=1, max_size=5), answer=st.booleans())
def test_without_tools_it_writes_what_the_checkpoint_s_writes(tokenizer, template, messages, answer):
    options = {"tokenize": False, "add_generation_prompt": answer}
    assert tokenizer.chat_template != template
    expected = tokenizer.apply_chat_template(messages, **options)
    assert tokenizer.apply_chat_template(messages, chat_template=template, **options) == expected


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_calls_and_results(template, system):
    tokenizer, result = tool_models.qwen3_tokenizer(template), {"role": "tool", "content": "5"}
    encoder = ChatEncoder(tokenizer)
    assert encoder.takes_tools
    answer = {"role": "assistant", "content": "Hm.", "tool_calls": [CALL, CALL]}
    text = tokenizer.decode(encoder.ids([*system, USER, answer, result, result, USER], [TOOL]))
    output = "Be brief." if system else "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    called = '<tool_call>\n{"name": "add", "arguments": {"é": 1}}\n</tool_call>'
    assert text == (
        f"<|im_start|>system\n{output}\n\nYou can call these functions:\n<tools>\n{json.dumps(TOOL)}\n</tools>\n"
        'To call one, write\n<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nHm.\n{called}\n{called}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
