"""Ollama's API before a real engine, asked by Ollama's own client; the model is tiny and speaks nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tool_models
from server.running import asked_at
from tool_models import NUMBER

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams

ollama = pytest.importorskip("ollama", reason="needs the ollama client: pip install ollama")
ADD = {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": NUMBER, "strict": True}}
CHAT = [{"role": "user", "content": "the theme of a thing"}]
GREEDY = {"temperature": 0, "num_predict": 20, "num_ctx": 64}
NAME = "echo:latest"  # as Ollama's clients call it


@pytest.fixture(scope="module")
def bundle(tool_bundle) -> Path:
    return tool_bundle("qwen3")


@pytest.fixture(scope="module")
def door(bundle) -> Iterator[httpx.Client]:
    with asked_at(bundle) as door:
        yield door


@pytest.fixture(scope="module")
def client(door) -> ollama.Client:
    return ollama.Client(host=str(door.base_url))


def test_chats_and_texts_whole_and_streamed_are_what_plain_decoding_says(client, bundle):
    truth = LLM(bundle, "autoregressive", 1).chat(CHAT, SamplingParams(max_tokens=20))[0]
    requested = {"model": NAME, "options": GREEDY}
    whole = client.chat(messages=CHAT, **requested)
    lines = list(client.chat(messages=CHAT, stream=True, **requested))
    assert whole.message.content == "".join(line.message.content for line in lines) == truth.text
    text = client.generate(prompt=CHAT[0]["content"], **requested)
    pieces = list(client.generate(prompt=CHAT[0]["content"], stream=True, **requested))
    assert text.response == "".join(piece.response for piece in pieces) == truth.text
    for last in (whole, lines[-1], text, pieces[-1]):
        assert last.done
        assert last.done_reason == truth.finish_reason
        assert (last.prompt_eval_count, last.eval_count) == (truth.prompt_tokens, len(truth.token_ids))
        assert last.total_duration >= last.prompt_eval_duration + last.eval_duration > 0
    assert not any(line.done for line in (*lines[:-1], *pieces[:-1]))


def test_an_answer_fits_its_format_and_calls_its_tool(client, door):
    options = {"num_predict": 100, "seed": 3}
    for text in (
        client.chat(NAME, CHAT, format=NUMBER, options=options, think=False).message.content,
        client.generate(NAME, "the theme", format=NUMBER, options=options, think=False).response,
    ):
        assert json.loads(text)["n"] in range(10)
    token = tool_models.qwen3_tokenizer().convert_tokens_to_ids("<tool_call>")
    call = {"model": NAME, "messages": CHAT, "tools": [ADD], "options": options, "logit_bias": {str(token): 100}}
    whole = door.post("/api/chat", json=call | {"stream": False, "parallel_tool_calls": False, "think": False}).json()
    lines = door.post("/api/chat", json=call | {"parallel_tool_calls": False, "think": False}).text.splitlines()
    *_, called, last = [ollama.ChatResponse.model_validate_json(line) for line in lines]
    assert called.message.tool_calls == ollama.ChatResponse.model_validate(whole).message.tool_calls
    [made] = called.message.tool_calls
    assert made.function.name == "add"
    assert made.function.arguments["n"] in range(10)
    assert last.done
    turns = [*CHAT, whole["message"], {"role": "tool", "tool_name": "add", "content": "7"}]
    assert client.chat(NAME, turns, tools=[ADD], options=GREEDY).prompt_eval_count > last.prompt_eval_count


def test_think_is_the_template_s_switch(client):
    counts = {t: client.chat(NAME, CHAT, think=t, options=GREEDY).prompt_eval_count for t in (None, True, "low", False)}
    assert counts[None] == counts[True] == counts["low"] < counts[False]  # the last one's prompt has an empty thought


def test_the_model_is_told_of_and_always_loaded(client):
    assert [model.model for model in client.list().models] == [model.model for model in client.ps().models] == ["echo"]
    assert client.list().models[0].size > 10_000
    shown = client.show(NAME)
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["echo-trt.context_length"] == 1200
    assert shown.modelinfo["general.basename"] == "echo"
    assert "<tool_call>" in shown.template
    for loaded in (client.chat(NAME, keep_alive="5m"), client.generate(NAME, keep_alive=0)):
        assert loaded.done
        assert loaded.done_reason == "load"


@pytest.mark.parametrize(
    ("path", "change", "sentence"),
    [
        ("chat", {"messages": [CHAT[0] | {"images": ["aGk="]}]}, "messages.0.images: this model reads text alone"),
        ("chat", {"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role is 'bot'"),
        ("chat", {"messages": CHAT, "options": {"temperature": 9}}, "options.temperature is 9"),
        ("chat", {"messages": CHAT, "options": {"num_predict": 0}}, "options.num_predict is 0"),
        ("chat", {"messages": CHAT, "options": {"repeat_penalty": 0}}, "options.repeat_penalty is 0"),
        ("chat", {"messages": CHAT, "options": {"mirostat": 2}}, "options.mirostat is 2, which this engine does not"),
        ("chat", {"messages": CHAT, "options": {"temprature": 1}}, "options.temprature is 1, but no field has this"),
        ("chat", {"messages": CHAT, "format": "xml"}, "format is 'xml': give json or a JSON schema."),
        ("chat", {"messages": CHAT, "format": {"type": 5}}, "format"),
        (
            "chat",
            {"messages": CHAT, "tools": [{"type": "function", "function": {}}]},
            "tools.0.function.name is",
        ),
        ("generate", {"prompt": "x", "raw": True}, "raw is true, which this engine does not support; leave it out."),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix is 'y'"),
        ("show", {"model": "llama"}, "The model 'llama' does not exist here; ask for 'echo'."),
    ],
)
def test_a_refusal_is_a_sentence_that_names_the_field(door, path, change, sentence):
    answer = door.post(f"/api/{path}", json={"model": NAME} | change)
    assert answer.status_code == (404 if path == "show" else 400)
    assert answer.json()["error"].startswith(sentence)
