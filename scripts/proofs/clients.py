"""Do the clients that people use work with a server? Installs each in an environment of its own, and prints a table.

    echo-trt serve bundles/smollm2-135m
    python scripts/proofs/clients.py --folder clients

Each client is a short program in ``clients_parts``. A feature works, is refused by a sentence that the client shows, or
is broken; exit code 1 where one is broken. Features of tools need a model whose chat template knows them, else they are
refused. Needs a package index (pip, npm); nothing else beyond the server is asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.options import run_alone

PARTS = Path(__file__).with_name("clients_parts")


@dataclass(frozen=True)
class Client:
    """A program of ``clients_parts``, and the packages that it needs."""

    program: str
    packages: tuple[str, ...]


CLIENTS = {
    "openai": Client("openai_python.py", ("openai>=2", "pydantic>=2")),
    "langchain": Client("langchain_client.py", ("langchain-openai>=1",)),
    "llama-index": Client("llama_index_client.py", ("llama-index-llms-openai-like",)),
    "instructor": Client("instructor_client.py", ("instructor",)),
    "pydantic-ai": Client("pydantic_ai_client.py", ("pydantic-ai-slim[openai]",)),
    "litellm": Client("litellm_client.py", ("litellm",)),
    "lm-eval": Client("lm_eval_client.py", ("lm-eval[api]", "transformers>=4")),
    "tritonclient": Client("triton_client.py", ("tritonclient[grpc,http]",)),
    "guidellm": Client("guidellm_client.py", ("guidellm>=0.8",)),
    "aiperf": Client("aiperf_client.py", ("aiperf",)),
    "genai-perf": Client("genai_perf_client.py", ("genai-perf",)),
    "ai-sdk": Client("ai_sdk.mjs", ("ai@6", "@ai-sdk/openai@3", "zod@4")),
}


def main(
    folder: Annotated[Path, Parameter(help="where the clients are installed, and kept")],
    url: Annotated[str, Parameter(help="of the OpenAI-compatible API")] = "http://127.0.0.1:9000",
    grpc: Annotated[str, Parameter(help="HOST:PORT of Triton's gRPC endpoint")] = "127.0.0.1:8001",
    http: Annotated[str, Parameter(help="HOST:PORT of Triton's HTTP endpoint")] = "127.0.0.1:8000",
    model: str = "echo",
    tokenizer: Annotated[Path, Parameter(help="folder with the model's tokenizer, such as the bundle")] = Path("."),
    only: Annotated[str, Parameter(help="clients, by commas")] = ",".join(CLIENTS),
) -> None:
    """One row for each client and feature."""
    facts = {"URL": url, "GRPC": grpc, "HTTP": http, "MODEL": model, "TOKENIZER": str(tokenizer.resolve())}
    print("| client | feature | | said |\n|---|---|---|---|")
    broken = 0
    for name in only.split(","):
        for feature, outcome, output in _rows(name, CLIENTS[name], folder / name, facts):
            print(f"| {name} | {feature} | {outcome} | {output.replace('|', '/')} |", flush=True)
            broken += outcome == "broken"
    sys.exit(1 if broken else 0)


def _rows(name: str, client: Client, folder: Path, facts: dict[str, str]) -> list[tuple[str, str, str]]:
    """Run a client's program; its lines are feature, outcome and what was said, between tabs."""
    try:
        command = _node(client, folder) if client.program.endswith(".mjs") else _python(client, folder)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | facts | {"PATH": path, "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, cwd=folder)
    except (subprocess.SubprocessError, OSError) as error:
        return [("install", "broken", str(error)[:200])]
    rows = [tuple(line.split("\t", 2)) for line in done.stdout.splitlines() if line.count("\t") == 2]
    if done.returncode or not rows:
        rows.append(("the program", "broken", " ".join(done.stderr.split())[-200:]))
    return rows


def _python(client: Client, folder: Path) -> list[str]:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *client.packages], check=True, capture_output=True)
    return [str(python), str(PARTS / client.program)]


def _node(client: Client, folder: Path) -> list[str]:
    if not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", *client.packages], check=True, capture_output=True, cwd=folder)
    program = folder / client.program
    program.write_text((PARTS / client.program).read_text())  # node looks for packages beside the program
    return ["node", str(program)]


if __name__ == "__main__":
    run_alone(main)
