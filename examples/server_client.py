"""Ask a running server through OpenAI's client, streamed, and show what it used.

pip install openai
echo-trt serve bundles/smollm2-135m &
python examples/server_client.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:9000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "any"),  # the server's, where it was started with --api-keys-file
)
stream = client.chat.completions.create(
    model="echo",
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    max_tokens=64,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} answered]")
