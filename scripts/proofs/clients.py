"""Do the clients that people use work with a server? Installs each in an environment of its own, and writes a table.

    echo-trt serve bundles/smollm2-135m
    python scripts/proofs/clients.py --folder clients --page docs/clients.md

Each client is a short program in ``clients_parts``. A feature works, is refused by a sentence that the client shows, or
is broken; exit code 1 where one is broken. ``--only`` tries some clients again: the page keeps the others' rows, which
are stored in the folder; later sections stay. Needs a package index (pip, npm).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.options import run_alone
from echo_trt.errors import UserError

PARTS = Path(__file__).with_name("clients_parts")
OUTCOMES = ("works", "refused", "broken")
PAGE = """# Tested clients

`scripts/proofs/clients.py` asks a server of the default bundle with each client, and writes this page. A feature works,
is *refused* by a sentence that the client shows, or is broken. Claude Code asked a bundle of Qwen2.5-Coder-0.5B,
GenAI-Perf and tritonclient a server with Triton. [Settings to paste](agents.md). To repeat it, with npm for some:

```
echo-trt serve bundles/smollm2-135m
python scripts/proofs/clients.py --folder clients --page docs/clients.md       # in a second terminal
```

Each with its version, and the number of features that work:

"""


@dataclass(frozen=True)
class Client:
    """A program of ``clients_parts`` with its argument, and the packages that it needs; the first has the version."""

    program: str
    packages: tuple[str, ...]
    npm: bool = False


def _framework(name: str, *packages: str) -> Client:
    return Client(f"frameworks.py {name}", packages)


CLIENTS = {
    "openai": Client("openai_python.py", ("openai>=2", "pydantic>=2")),
    "anthropic": Client("anthropic_python.py", ("anthropic",)),
    "anthropic (Node)": Client("anthropic_node.mjs", ("@anthropic-ai/sdk",), npm=True),
    "ollama": Client("ollama_python.py", ("ollama", "pydantic>=2")),
    "Claude Code": Client("commands.py claude", ("@anthropic-ai/claude-code",), npm=True),
    "Codex CLI": Client("commands.py codex", ("@openai/codex",), npm=True),
    "opencode": Client("commands.py opencode", ("opencode-ai",), npm=True),
    "aider": Client("commands.py aider", ("aider-chat",)),
    "OpenAI Agents": _framework("openai_agents", "openai-agents"),
    "LangChain": Client("langchain_client.py", ("langchain-openai>=1",)),
    "LangChain, Anthropic": _framework("langchain_anthropic", "langchain-anthropic", "openai"),
    "LangChain, Ollama": _framework("langchain_ollama", "langchain-ollama", "openai"),
    "LangGraph": _framework("langgraph", "langgraph", "langchain", "langchain-openai"),
    "LlamaIndex": Client("llama_index_client.py", ("llama-index-llms-openai-like",)),
    "instructor": Client("instructor_client.py", ("instructor",)),
    "Pydantic AI": Client("pydantic_ai_client.py", ("pydantic-ai-slim[openai]",)),
    "LiteLLM": Client("litellm_client.py", ("litellm",)),
    "Vercel AI SDK": Client("ai_sdk.mjs", ("ai@6", "@ai-sdk/openai@3", "zod@4"), npm=True),
    "AG2": _framework("ag2", "ag2[openai]"),
    "Semantic Kernel": _framework("semantic_kernel", "semantic-kernel"),
    "AutoGen": _framework("autogen", "autogen-agentchat", "autogen-ext[openai]"),
    "Haystack": _framework("haystack", "haystack-ai"),
    "CrewAI": _framework("crewai", "crewai"),
    "DSPy": _framework("dspy", "dspy"),
    "Outlines": _framework("outlines", "outlines", "openai"),
    "smolagents": _framework("smolagents", "smolagents[openai]"),
    "llm": _framework("llm", "llm"),
    "Inspect AI": _framework("inspect_ai", "inspect-ai", "openai"),
    "Open WebUI": Client("open_webui_client.py", ("open-webui",)),
    "promptfoo": Client("commands.py promptfoo", ("promptfoo",), npm=True),
    "lm-eval": Client("lm_eval_client.py", ("lm-eval[api]", "transformers>=4")),
    "EvalScope": Client("commands.py evalscope", ("evalscope[perf]",)),
    "Locust": Client("commands.py locust", ("locust",)),
    "GuideLLM": Client("guidellm_client.py", ("guidellm>=0.8",)),
    "AIPerf": Client("aiperf_client.py", ("aiperf",)),
    "GenAI-Perf": Client("genai_perf_client.py", ("genai-perf",)),
    "tritonclient": Client("triton_client.py", ("tritonclient[grpc,http]",)),
}


def main(
    folder: Annotated[Path, Parameter(help="where the clients are installed, and their rows kept")],
    url: Annotated[str, Parameter(help="of the server's API")] = "http://127.0.0.1:9000",
    grpc: Annotated[str, Parameter(help="HOST:PORT of Triton's gRPC endpoint")] = "127.0.0.1:8001",
    http: Annotated[str, Parameter(help="HOST:PORT of Triton's HTTP endpoint")] = "127.0.0.1:8000",
    model: str = "echo",
    context: Annotated[int, Parameter(help="tokens, for clients that ask for it")] = 8192,
    tokenizer: Annotated[Path, Parameter(help="folder with the model's tokenizer, such as the bundle")] = Path(
        "bundles/smollm2-135m"
    ),
    only: Annotated[str, Parameter(help="clients, by semicolons")] = ";".join(CLIENTS),
    page: Annotated[Path | None, Parameter(help="the page to write")] = None,
) -> None:
    """Print one row for each client and feature."""
    facts = {"URL": url, "GRPC": grpc, "HTTP": http, "MODEL": model, "TOKENIZER": str(tokenizer.resolve())}
    folder.mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in only.split(";") if name not in CLIENTS]:
        raise UserError(f"--only names {unknown[0]!r}; choose from {', '.join(CLIENTS)}.")
    stored = folder / "rows.json"
    print("| client | version | feature | | said |\n|---|---|---|---|---|")
    broken = 0
    for name in only.split(";"):
        home = folder / "".join(letter for letter in name if letter.isalnum())
        version, rows = _rows(CLIENTS[name], home.resolve(), facts | {"CONTEXT": str(context)})
        known: dict[str, list[list[str]]] = json.loads(stored.read_text()) if stored.exists() else {}
        known[name] = [[version, *row] for row in rows]
        for feature, outcome, output in rows:
            print(f"| {name} | {version} | {feature} | {outcome} | {output.replace('|', '/')} |", flush=True)
            broken += outcome == "broken"
        stored.write_text(json.dumps(known, indent=1))
        if page:
            rows = "".join(_line(name, known[name]) for name in CLIENTS if name in known)
            _, head, sections = page.read_text().partition("\n## ") if page.exists() else ("", "", "")
            page.write_text(PAGE + rows + head + sections)
    sys.exit(1 if broken else 0)


def _line(name: str, rows: list[list[str]]) -> str:
    """Return a client's row of the page."""
    works = sum(outcome == "works" for _, _, outcome, _ in rows)
    others = [f"{feature} {outcome}" for _, feature, outcome, _ in rows if outcome != "works"]
    return f"- {name} {rows[0][0]}: {'; '.join([str(works), *others])}\n"


def _rows(client: Client, folder: Path, facts: Mapping[str, str]) -> tuple[str, list[tuple[str, str, str]]]:
    """Run a client's program: its version, and lines of feature, outcome and what was said."""
    program, *words = client.program.split()
    version = ""
    try:
        version = _installed_by_npm(client, folder) if client.npm else _installed_by_pip(client, folder)
        python = sys.executable if client.npm else str(folder / "bin" / "python")
        command = (
            ["node", str(folder / program)] if program.endswith(".mjs") else [python, str(PARTS / program), *words]
        )
        found = [str(folder / "bin"), str(folder / "node_modules" / ".bin"), os.environ["PATH"]]
        env = _environment() | facts | {"PATH": os.pathsep.join(found), "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, cwd=folder)
    except (subprocess.SubprocessError, OSError) as error:
        reason = error.stderr[-200:] if isinstance(error, subprocess.CalledProcessError) else error
        return version, [("install", "broken", " ".join(str(reason).split()))]
    lines = [line.split("\t", 2) for line in done.stdout.splitlines() if line.count("\t") == 2]
    rows = [(feature, outcome, output) for feature, outcome, output in lines if outcome in OUTCOMES]
    if done.returncode or not rows:
        rows.append(("the program", "broken", " ".join(done.stderr.split())[-200:]))
    return version, rows


def _installed_by_pip(client: Client, folder: Path) -> str:
    """Install the packages where they are not there yet; return the first one's version."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        _run(python, "-m", "pip", "install", "-q", *client.packages)
    name = client.packages[0].partition("[")[0].partition(">")[0]
    return _run(python, "-c", f"from importlib.metadata import version; print(version({name!r}))").strip()


def _installed_by_npm(client: Client, folder: Path) -> str:
    if not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _run("npm", "install", "--silent", *client.packages, cwd=folder)
    for program in PARTS.glob("*.mjs"):
        (folder / program.name).write_text(program.read_text())  # node looks for packages beside the program
    name = client.packages[0][0] + client.packages[0][1:].partition("@")[0]
    return str(json.loads((folder / "node_modules" / name / "package.json").read_text())["version"])


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd, timeout=900, env=_environment())
    return done.stdout


def _environment() -> dict[str, str]:
    """Return this process's, without packages that are not the client's own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


if __name__ == "__main__":
    run_alone(main)
