"""Clients that are programs: a function each, whose name is the program's argument, writes its settings and runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tried import BASE, MODEL, URL, tried

HELLO, HERE = "Say hello.", Path.cwd()
CONTEXT = int(os.environ["CONTEXT"])


def said(*command: str, **env: str) -> str:
    """Return what a command prints; RuntimeError with its last words where it fails."""
    own = {"HOME": str(HERE), "PWD": str(HERE), "NO_COLOR": "1", **env}
    done = subprocess.run(
        command, env=os.environ | own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=840
    )
    if done.returncode:
        raise RuntimeError((done.stderr + done.stdout)[-400:])
    return (done.stdout.strip() or done.stderr)[-400:]


def claude() -> None:
    env = {"ANTHROPIC_BASE_URL": URL, "ANTHROPIC_API_KEY": "none", "ANTHROPIC_MODEL": MODEL}
    env |= {"ANTHROPIC_SMALL_FAST_MODEL": MODEL, "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "256"}
    ends = {"temperature": 0, "stop_sequences": [".", "\n\n"]}  # a model this small would go on to the limit
    env |= {"CLAUDE_CODE_EXTRA_BODY": json.dumps(ends), "IS_SANDBOX": "1"}
    env |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "API_TIMEOUT_MS": "800000"}
    tried("-p", lambda: said("claude", "-p", HELLO, "--max-turns", "2", **env))


def codex() -> None:
    folder = HERE / ".codex"
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(f"""
model = "{MODEL}"
model_provider = "echo"
model_context_window = {CONTEXT}
web_search = "disabled"
agents.enabled = false
[model_providers.echo]
name = "echo-trt"
base_url = "{BASE}"
wire_api = "responses"
""")
    tried("exec", lambda: said("codex", "exec", "--skip-git-repo-check", HELLO))


def opencode() -> None:
    options = {"baseURL": BASE, "apiKey": "none"}
    model = {"name": MODEL, "limit": {"context": CONTEXT, "output": 64}}
    provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {MODEL: model}}
    (HERE / "opencode.json").write_text(json.dumps({"provider": {"echo": provider}}))
    tried("run", lambda: said("opencode", "run", "--model", f"echo/{MODEL}", HELLO))


def aider() -> None:
    (HERE / "hello.py").write_text("print('hello')\n")
    words = ("--no-git", "--yes-always", "--no-show-model-warnings", "--edit-format", "whole", "--map-tokens", "0")
    tried(
        "--message",
        lambda: said("aider", *words, "--model", f"openai/{MODEL}", "--message", HELLO, OPENAI_API_BASE=BASE),
    )


def promptfoo() -> None:
    settings = {"apiBaseUrl": BASE, "apiKey": "none", "max_tokens": 48}
    provider = {"id": f"openai:chat:{MODEL}", "config": settings}
    tests = [{"assert": [{"type": "javascript", "value": "output.length > 0"}]}]
    (HERE / "config.json").write_text(json.dumps({"prompts": [HELLO], "providers": [provider], "tests": tests}))
    env = {"PROMPTFOO_DISABLE_TELEMETRY": "1", "PROMPTFOO_DISABLE_UPDATE": "1"}
    tried("eval", lambda: said("promptfoo", "eval", "-c", "config.json", "--no-cache", **env))


def evalscope() -> None:
    words = ("--url", f"{BASE}/chat/completions", "--model", MODEL, "--api", "openai", "--dataset", "random")
    sizes = ("--number", "4", "--parallel", "2", "--max-tokens", "16", "--min-prompt-length", "16")
    more = ("--max-prompt-length", "32", "--tokenizer-path", os.environ["TOKENIZER"])
    tried("perf", lambda: said("evalscope", "perf", *words, *sizes, *more))


def locust() -> None:
    (HERE / "locustfile.py").write_text(f"""
from locust import HttpUser, task
class Asker(HttpUser):
    @task
    def ask(self):
        turns = [{{"role": "user", "content": {HELLO!r}}}]
        self.client.post("/v1/chat/completions", json={{"model": {MODEL!r}, "messages": turns, "max_tokens": 8}})
""")
    tried(
        "4 users",
        lambda: said("locust", "--headless", "-u", "4", "-r", "4", "-t", "15s", "--host", URL, "--only-summary"),
    )


if __name__ == "__main__":
    globals()[sys.argv[1]]()
