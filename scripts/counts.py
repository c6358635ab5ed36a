"""Count what the code's structure promises: lines, the files of each feature, and what one chat runs through.

    python scripts/counts.py                           # lines and features
    python scripts/counts.py bundles/smollm2-135m      # and the files that a streamed chat runs

tests/test_layers.py holds the limits (``FEATURES``); a feature that spreads has lost its seam.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Feature -> how its lines in the package are known, and in how many files it may stand.
FEATURES: dict[str, tuple[str, int]] = {
    "latency targets": (
        r"\b(latency|tpot|ttft|[Pp]ace|prices?|seats?|sat_out|forecasts?|Forecaster|ExpectedLatency|targets)\b",
        43,
    ),
    "block drafters": (r"Block(Drafter|Facts|Shape|Module|Config|Role)|\.block\b|\"block\"|[Mm]arkov", 23),
    "hybrids": (r"Hybrid|state_slots|commit_states|state_values|RequestStates|MAX_ROWS|tree_context|divisible", 12),
    "tensor parallelism": (r"tensor_parallel|\branks?\b|rank_files|Ranked|Collectives", 31),
    "synthetic text": (r"synthetic|text_key", 0),
    "prompt log-probabilities": (r"prompt_logprobs", 17),
    "token sources": (r"token_sources|TokenSource|OutgoingSources|proposer", 19),
    "KV events": (r"kv_events|publish_kv", 6),
}
#: An engine's name, or a branch by it, outside the engines' own folders.
ENGINE_NAMES = r"engine *(==|!=|in|not in) |\"(openvino|tensorrt|torch)\"|\.tensorrt\b|on_cpu\("
ENGINE_LINES = 1
CHAT_FILES = 76


def found(pattern: str, folder: str = "echo_trt", but: str = "-") -> dict[str, int]:
    """Return the lines that a pattern stands in, by file."""
    lines: dict[str, int] = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        name = str(file.relative_to(ROOT))
        number = sum(bool(re.search(pattern, line)) for line in file.read_text("utf-8").splitlines())
        if number and not name.startswith(but):
            lines[name] = number
    return lines


def engine_names() -> dict[str, int]:
    """Return the lines outside ``backends`` that name an engine, by file."""
    return found(ENGINE_NAMES, but="echo_trt/backends")


async def _ask(bundle: Path, begin: object) -> None:
    """Answer a streamed chat twice, door and engine in this process; ``begin`` before the second."""
    import httpx

    from echo_trt.engine.llm import LLM
    from echo_trt.engine.process.host import Host
    from echo_trt.engine.service.metrics import EngineMetrics
    from echo_trt.engine.service.service import Service
    from echo_trt.server.app import create_app

    llm, stop = LLM(bundle, batch=4), asyncio.Event()
    service, path = Service(llm), Path(tempfile.mkdtemp()) / "engine"
    host = Host(service, bundle, EngineMetrics("echo"))
    serving = asyncio.create_task(host.serve(path, stop))
    while not path.exists():
        await asyncio.sleep(0.01)
    app = create_app(path)
    body = {"messages": [{"role": "user", "content": "Say hello."}], "stream": True, "max_tokens": 24, "seed": 1}
    body |= {"temperature": 0.7, "min_p": 0.1}
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as client:
            for measured in (False, True):
                if measured and callable(begin):
                    begin()
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    stop.set()
    await serving
    service.close(0)


def chat_files(bundle: Path) -> list[str]:
    """Return the package's files of which a function runs while one streamed chat is answered."""
    files, on = dict[str, None](), threading.Event()
    package = str(ROOT / "echo_trt")

    def note(frame: object, event: str, _: object) -> None:
        if event == "call" and on.is_set():
            name = frame.f_code.co_filename
            if name.startswith(package):
                files[str(Path(name).relative_to(ROOT))] = None

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        asyncio.run(_ask(bundle, on.set))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(files)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, nargs="?", help="of the chat that is traced")
    requested = options.parse_args()
    for folder in ("echo_trt", "tests", "scripts", "lab"):
        print(f"{folder:26} {sum(found('', folder).values()):6} lines")
    for name, (pattern, most) in FEATURES.items():
        lines = found(pattern)
        print(f"{name:26} {len(lines):6} files of {most}, {sum(lines.values())} lines")
    print(f"{'engine names':26} {sum(engine_names().values()):6} lines of {ENGINE_LINES}")
    if requested.bundle:
        files = chat_files(requested.bundle)
        print(f"{'a streamed chat':26} {len(files):6} files of {CHAT_FILES}", *files, sep="\n  ")


if __name__ == "__main__":
    main()
