"""LlamaIndex's OpenAILike: complete, chat, stream, structured."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from tried import BASE, MODEL, tried

facts = {"model": MODEL, "api_base": BASE, "api_key": "none", "is_chat_model": True, "max_tokens": 32}
llm = OpenAILike(**facts)
tried("complete", lambda: llm.complete("The sky is").text)
tried("chat", lambda: llm.chat([ChatMessage(role="user", content="Say hello.")]).message.content)
tried(
    "stream_chat",
    lambda: "".join(piece.delta for piece in llm.stream_chat([ChatMessage(role="user", content="Say hello.")])),
)
