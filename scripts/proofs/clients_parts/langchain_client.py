"""LangChain: invoke, stream, batch, structured output in its three methods, tools."""

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from tried import BASE, MODEL, QUESTION, tried


class City(BaseModel):
    """A city."""

    name: str
    country: str
    population: int = Field(ge=0, le=50_000_000)


llm = ChatOpenAI(model=MODEL, base_url=BASE, api_key="none", temperature=0, max_tokens=256)
tried("invoke", lambda: llm.invoke("Say hello.").content)
tried("stream", lambda: "".join(chunk.content for chunk in llm.stream("Say hello.")))
tried("batch", lambda: [answer.content for answer in llm.batch(["Say hello.", "Say goodbye."])])
for method in ("json_schema", "json_mode", "function_calling"):
    structured = llm.with_structured_output(City if method != "json_mode" else None, method=method)
    tried(f"with_structured_output({method})", lambda structured=structured: structured.invoke(QUESTION))
tried("bind_tools", lambda: llm.bind_tools([City], tool_choice="City").invoke(QUESTION).tool_calls)
tried(
    "responses",
    lambda: ChatOpenAI(model=MODEL, base_url=BASE, api_key="none", use_responses_api=True).invoke("Hi.").text,
)
