"""The official client: chats, streams, structured output, tools, responses, echo."""

from openai import OpenAI
from pydantic import BaseModel
from tried import BASE, MODEL, QUESTION, tried


class City(BaseModel):
    name: str
    country: str
    population: int


TOOL = {"type": "function", "function": {"name": "city", "parameters": City.model_json_schema()}}
client = OpenAI(base_url=BASE, api_key="none")
chat = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 96, "temperature": 0}


def stream() -> str:
    chunks = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def typed_events() -> str:
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=32) as events:
        return ", ".join(sorted({event.type for event in events}))


def echoed() -> list:
    answer = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=1, echo=True, logprobs=1)
    return answer.choices[0].logprobs.token_logprobs


tried("chat", lambda: client.chat.completions.create(**chat).choices[0].message.content)
tried("stream with usage", stream)
tried("parse(pydantic)", lambda: client.chat.completions.parse(**chat, response_format=City).choices[0].message.parsed)
tried(
    "json_object",
    lambda: client.chat.completions.create(**chat, response_format={"type": "json_object"}).choices[0].message.content,
)
tried(
    "tools, required",
    lambda: client.chat.completions.create(**chat, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls,
)
tried("responses", lambda: client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=32).output_text)
tried("responses, streamed", typed_events)
tried("responses.parse", lambda: client.responses.parse(model=MODEL, input=QUESTION, text_format=City).output_parsed)
tried("echo with logprobs", echoed)
