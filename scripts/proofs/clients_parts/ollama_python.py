"""Ollama's client: chats, texts, streams, structured output, a tool, the list of models, a refused image."""

import ollama
from pydantic import BaseModel
from tried import MODEL, QUESTION, URL, tried


class City(BaseModel):
    country: str
    population: int


def note(city: str) -> str:
    """Note a city.

    Args:
        city: its name
    """
    return city


client = ollama.Client(host=URL)
chat = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}
few = {"temperature": 0, "num_predict": 96}
image = [{"role": "user", "content": "What is this?", "images": ["aGk="]}]
tried("chat", lambda: client.chat(**chat, options=few).message.content)
tried("chat, streamed", lambda: "".join(line.message.content for line in client.chat(**chat, options=few, stream=True)))
tried("generate", lambda: client.generate(MODEL, "Say hello.", options=few).response)
tried("format", lambda: client.chat(**chat, format=City.model_json_schema(), options=few).message.content)
tried("tools", lambda: client.chat(**chat, tools=[note], options=few).message)
tried("think", lambda: client.chat(**chat, think=True, options=few).message.content)
tried("list, show", lambda: [client.list().models[0].model, client.show(MODEL).capabilities])
tried("image", lambda: client.chat(MODEL, image, options=few).message.content)
tried("embed", lambda: client.embed(MODEL, "x"))
