"""Pydantic AI: text, and an output of a type by native schema and by tool."""

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tried import BASE, MODEL, QUESTION, tried


class City(BaseModel):
    name: str
    country: str
    population: int = Field(ge=0, le=50_000_000)  # small models do not end a number by themselves


model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key="none"))
settings = {"max_tokens": 96, "temperature": 0}
tried("text", lambda: Agent(model, model_settings=settings).run_sync("Say hello.").output)
tried(
    "NativeOutput",
    lambda: Agent(model, output_type=NativeOutput(City), model_settings=settings).run_sync(QUESTION).output,
)
one_call = {**settings, "parallel_tool_calls": False}
tried("output_type (a tool)", lambda: Agent(model, output_type=City, model_settings=one_call).run_sync(QUESTION).output)
