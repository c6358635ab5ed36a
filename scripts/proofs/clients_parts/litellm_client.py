"""litellm: text, stream, structured output, a prompt that is too long."""

import litellm
from pydantic import BaseModel
from tried import BASE, MODEL, QUESTION, tried


class City(BaseModel):
    name: str
    country: str
    population: int


requested = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE, "api_key": "none", "max_tokens": 96, "temperature": 0}
chat = {**requested, "messages": [{"role": "user", "content": QUESTION}]}


def too_long() -> str:
    try:
        litellm.completion(**{**requested, "messages": [{"role": "user", "content": "word " * 20_000}]})
    except litellm.ContextWindowExceededError:
        return "ContextWindowExceededError"
    raise RuntimeError("a prompt that is too long was taken")


tried("completion", lambda: litellm.completion(**chat).choices[0].message.content)
tried("stream", lambda: "".join(c.choices[0].delta.content or "" for c in litellm.completion(**chat, stream=True)))
tried("response_format", lambda: litellm.completion(**chat, response_format=City).choices[0].message.content)
tried("too long a prompt", too_long)
