"""Frameworks that ask OpenAI's API: a function each, whose name is the program's argument."""

import asyncio
import sys

from openai import AsyncOpenAI, OpenAI
from tried import BASE, MODEL, QUESTION, tried

HELLO = "Say hello."


def openai_agents() -> None:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    @function_tool
    def note(city: str) -> str:
        """Note a city."""
        return city

    set_tracing_disabled(True)
    client, few = AsyncOpenAI(base_url=BASE, api_key="none"), ModelSettings(max_tokens=48, temperature=0)
    must = ModelSettings(max_tokens=400, temperature=0, tool_choice="required", store=True, truncation="auto")
    for name, kind in {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}.items():
        agent = Agent(name="a", instructions="Be brief.", model=kind(MODEL, client), model_settings=few)
        tried(name, lambda agent=agent: Runner.run_sync(agent, HELLO).final_output)
        agent = Agent(name="a", model=kind(MODEL, client), model_settings=must, tools=[note])
        tried(f"{name}, tools", lambda agent=agent: Runner.run_sync(agent, QUESTION).final_output)


def langgraph() -> None:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    def note(city: str) -> str:
        """Note a city."""
        return city

    llm = ChatOpenAI(model=MODEL, base_url=BASE, api_key="none", temperature=0, max_tokens=48)
    agent = create_agent(llm, [note])
    turns = {"messages": [{"role": "user", "content": HELLO}]}
    tried("agent", lambda: agent.invoke(turns, {"recursion_limit": 6})["messages"][-1].content)


def ag2() -> None:
    from ag2 import Agent
    from ag2.config import OpenAIConfig

    agent = Agent("a", config=OpenAIConfig(MODEL, base_url=BASE, api_key="none", max_tokens=48))
    tried("chat", lambda: asyncio.run(agent.ask(HELLO)).body)


def semantic_kernel() -> None:
    from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
    from semantic_kernel.contents import ChatHistory

    history = ChatHistory()
    history.add_user_message(HELLO)
    service = OpenAIChatCompletion(ai_model_id=MODEL, async_client=AsyncOpenAI(base_url=BASE, api_key="none"))
    few = OpenAIChatPromptExecutionSettings(max_tokens=48)
    tried("chat", lambda: asyncio.run(service.get_chat_message_content(history, few)))


def autogen() -> None:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    known = dict.fromkeys(("function_calling", "json_output", "structured_output"), True)
    info = {"vision": False, "family": "unknown", **known}
    client = OpenAIChatCompletionClient(model=MODEL, base_url=BASE, api_key="none", model_info=info, max_tokens=48)
    tried("agent", lambda: asyncio.run(AssistantAgent("a", client).run(task=HELLO)).messages[-1].content)


def haystack() -> None:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    few = {"max_tokens": 48}
    asked = OpenAIChatGenerator(Secret.from_token("none"), MODEL, api_base_url=BASE, generation_kwargs=few)
    tried("chat", lambda: asked.run([ChatMessage.from_user(HELLO)])["replies"][0].text)


def crewai() -> None:
    from crewai import LLM

    tried("call", lambda: LLM(model=f"openai/{MODEL}", base_url=BASE, api_key="none", max_tokens=48).call(HELLO))


def dspy() -> None:
    import dspy

    lm = dspy.LM(f"openai/{MODEL}", api_base=BASE, api_key="none", max_tokens=96, temperature=0)
    tried("call", lambda: lm(HELLO))


def inspect_ai() -> None:
    from inspect_ai.model import get_model

    model = get_model(f"openai/{MODEL}", base_url=BASE, api_key="none")
    tried("generate", lambda: asyncio.run(model.generate(HELLO)).completion)


def outlines() -> None:
    import outlines
    from pydantic import BaseModel

    class City(BaseModel):
        country: str
        population: int

    model = outlines.from_openai(OpenAI(base_url=BASE, api_key="none"), MODEL)
    tried("JSON", lambda: model(QUESTION, City, max_tokens=96))
    model = outlines.from_vllm(OpenAI(base_url=BASE, api_key="none"), MODEL)
    tried("JSON, as from vLLM", lambda: model(QUESTION, City, max_tokens=96))


def smolagents() -> None:
    from smolagents import OpenAIModel

    model = OpenAIModel(MODEL, api_base=BASE, api_key="none", max_tokens=48)
    turns = [{"role": "user", "content": [{"type": "text", "text": HELLO}]}]
    tried("generate", lambda: model.generate(turns).content)


def llm() -> None:
    from llm.default_plugins.openai_models import Chat

    model = Chat("echo", model_name=MODEL, api_base=BASE)
    tried("prompt", lambda: model.prompt(HELLO, key="none", max_tokens=48, stream=False).text())


def langchain_anthropic() -> None:
    from langchain_anthropic import ChatAnthropic
    from tried import URL

    model = ChatAnthropic(model=MODEL, base_url=URL, api_key="none", max_tokens=48)
    tried("invoke", lambda: model.invoke(HELLO).content)
    tried("stream", lambda: "".join(chunk.text for chunk in model.stream(HELLO)))


def langchain_ollama() -> None:
    from langchain_ollama import ChatOllama
    from tried import URL

    model = ChatOllama(model=MODEL, base_url=URL, num_predict=48)
    tried("invoke", lambda: model.invoke(HELLO).content)
    tried("stream", lambda: "".join(chunk.text for chunk in model.stream(HELLO)))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
