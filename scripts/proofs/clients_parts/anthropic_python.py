"""Anthropic's client: messages, streams, tools, structured output, a refused image, counted tokens."""

import anthropic
from tried import MODEL, QUESTION, URL, tried

NUMBER = {"type": "integer", "minimum": 0, "maximum": 50_000_000}
SCHEMA = {
    "type": "object",
    "properties": {"country": {"type": "string", "maxLength": 20}, "population": NUMBER},
    "required": ["country", "population"],
    "additionalProperties": False,
}
TOOL = {"name": "city", "description": "Note a city.", "input_schema": SCHEMA}
client = anthropic.Anthropic(base_url=URL, api_key="none")
asked = {"model": MODEL, "max_tokens": 96, "messages": [{"role": "user", "content": QUESTION}]}
asked |= {"extra_body": {"temperature": 0}}  # this client has no argument for it


def stream() -> str:
    with client.messages.stream(**asked) as events:
        return "".join(events.text_stream)


def calls() -> list:
    called = client.messages.create(
        **asked, tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True}
    )
    [call] = [block for block in called.content if block.type == "tool_use"]
    result = [{"type": "tool_result", "tool_use_id": call.id, "content": "noted"}]
    turns = [*asked["messages"], {"role": "assistant", "content": called.content}, {"role": "user", "content": result}]
    client.messages.create(**asked | {"messages": turns}, tools=[TOOL])
    return [call.name, call.input]


def image() -> str:
    source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    return client.messages.create(**asked | {"messages": [{"role": "user", "content": content}]}).content[0].text


tried("messages", lambda: client.messages.create(**asked).content[0].text)
tried("stream", stream)
tried("tools, and their results", calls)
form = {"format": {"type": "json_schema", "schema": SCHEMA}}
tried("output_config", lambda: client.messages.create(**asked, output_config=form).content[0].text)
tried("stop_sequences", lambda: client.messages.create(**asked, stop_sequences=["a"]).stop_sequence)
tried("count_tokens", lambda: client.messages.count_tokens(model=MODEL, messages=asked["messages"]).input_tokens)
tried("image", image)
