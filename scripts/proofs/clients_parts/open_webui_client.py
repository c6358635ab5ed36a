"""Open WebUI without a browser: its server in front of OpenAI's API and of Ollama's, and chats as its page asks."""

import os
import socket
import subprocess
import tempfile
import time

import httpx
from tried import BASE, MODEL, QUESTION, URL, tried

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = str(probe.getsockname()[1])
SETTINGS = {
    "OPENAI_API_BASE_URL": BASE,
    "OLLAMA_BASE_URL": URL,
    "WEBUI_SECRET_KEY": "0123456789abcdef0123456789abcdef",
    "WEBUI_AUTH": "false",
    "OFFLINE_MODE": "true",
    "RAG_EMBEDDING_ENGINE": "openai",  # else it loads a network of its own from a hub
}
client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120)


def starts(process: subprocess.Popen[bytes]) -> str:
    """Wait for the server, and sign in as its only user."""
    while process.poll() is None:
        try:
            client.get("/health").raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(1)
    client.headers.pop("Authorization", None)
    token = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).raise_for_status().json()["token"]
    client.headers["Authorization"] = f"Bearer {token}"
    return str(client.get("/api/version").json())


def models() -> list[str]:
    return [model["id"] for model in client.get("/api/models").raise_for_status().json()["data"]]


def chat(*parts: str, **more: object) -> str:
    """Ask for a chat whose answer must hold ``parts``."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48, **more}
    answer = client.post("/api/chat/completions", json=body)
    if answer.is_error or any(part not in answer.text for part in parts):
        raise RuntimeError(f"{answer.status_code}: {answer.text}")
    return answer.text


for api, other in ("OPENAI", "OLLAMA"), ("OLLAMA", "OPENAI"):
    folder = tempfile.mkdtemp()
    env = os.environ | SETTINGS | {"DATA_DIR": folder, f"ENABLE_{api}_API": "true", f"ENABLE_{other}_API": "false"}
    command = ["open-webui", "serve", "--host", "127.0.0.1", "--port", PORT]
    with open(f"{folder}/log", "wb") as log:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    name = api.capitalize().replace("ai", "AI")
    try:
        tried(f"{name}: start", lambda process=process: starts(process))
        tried("models", lambda: models()[models().index(MODEL)])
        tried("chat", lambda: chat("choices", stream=False))
        tried("stream", lambda: chat("data: ", "[DONE]", stream=True))
    finally:
        process.terminate()
        process.wait(60)
