"""Count what the code's structure promises: lines, statements, the files of each feature, and of one chat.

    python scripts/counts.py                           # lines, statements and features
    python scripts/counts.py bundles/smollm2-135m      # and the files that a streamed chat runs

tests/test_layers.py holds the limits (``FEATURES``); a feature that spreads has lost its seam.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import re
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Feature -> how its lines in the package are known, and in how many files it may stand.
FEATURES: dict[str, tuple[str, int]] = {
    "latency targets": (  # not the price of time or the targets of passes
        r"tpot|ttft|\b(latency|Latency\w*|[Pp]acer?|Prices|usual_price|sat_out)\b",
        30,
    ),
    "block drafters": (  # not blocks of the KV pool, nor of a checkpoint's scales
        r"Block(Drafter|Facts|Shape|Module|Config|Network)|block_(config|facts|shape)"
        r"|\b(model|search\.model|drafter|draft|kind|facts)\.block\b|[Mm]arkov",
        16,
    ),
    "hybrids": (r"Hybrid|state_slots|commit_states|state_values|RequestStates|MAX_ROWS|tree_context|divisible", 12),
    "tensor parallelism": (  # not what ranks before what
        r"tensor_parallel|rank_files|Ranked|Collectives|rank_(group|processes)|all_gather|sum_ranks|\.ranks?\b"
        r"|\b(of|every|all|other|own) ranks?\b|\branks?[=:)]",
        25,
    ),
    "synthetic text": (r"synthetic|text_key", 0),
    "prompt log-probabilities": (r"prompt_logprobs", 12),
    "token sources": (r"token_sources|TokenSource|OutgoingSources|proposer", 18),
    "KV events": (r"kv_events|publish_kv", 6),
}
#: An engine's name, or a branch by it, outside the engines' own folders.
ENGINE_NAMES = r"engine *(==|!=|in|not in) |\"(openvino|tensorrt|torch)\"|\.tensorrt\b|on_cpu\("
ENGINE_LINES = 1
CHAT_FILES = 64
MOST_FIELDS = 20
#: Classes of more fields, which are their interface: options, bodies of APIs, a checkpoint's and a policy's settings.
WIDE = {
    *("ServeOptions", "SamplingParams", "ChatRequest", "ResponseObject", "GoodputTuning"),
    *(
        "DecoderConfig",
        "HybridConfig",
        "ShortConvConfig",
        "RecurrentConfig",
        "MtpConfig",
        "BlockConfig",
        "Eagle3Config",
    ),
}


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


def wide_classes() -> dict[str, int]:
    """Return classes of the package that have more than MOST_FIELDS public fields, inherited ones included."""
    own, bases = dict[str, set[str]](), dict[str, list[str]]()
    for file in (ROOT / "echo_trt").rglob("*.py"):
        for kind in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(kind, ast.ClassDef):
                declared = [each.target.id for each in kind.body if isinstance(each, ast.AnnAssign)]
                stored = [
                    each for each in ast.walk(kind) if isinstance(each, ast.Attribute) and type(each.ctx) is ast.Store
                ]
                declared += [each.attr for each in stored if getattr(each.value, "id", "") == "self"]
                own[kind.name] = {name for name in declared if not name.startswith("_")}
                bases[kind.name] = [base.id for base in kind.bases if isinstance(base, ast.Name)]

    def fields(name: str) -> set[str]:
        return own.get(name, set[str]()).union(*map(fields, bases.get(name, [])))

    return {name: number for name in own if (number := len(fields(name))) > MOST_FIELDS}


async def _ask(bundle: Path, second: threading.Event) -> None:
    """Answer a streamed chat twice, door and engine in this process; ``second`` is set during the latter."""
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
            for number in range(2):
                if number:
                    second.set()
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            second.clear()
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
        asyncio.run(_ask(bundle, on))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(files)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, nargs="?", help="of the chat that is traced")
    requested = options.parse_args()
    for folder in ("echo_trt", "tests", "scripts", "lab"):
        trees = (ast.parse(file.read_text("utf-8")) for file in (ROOT / folder).rglob("*.py"))
        number = sum(isinstance(node, ast.stmt) for tree in trees for node in ast.walk(tree))
        print(f"{folder:26} {sum(found('', folder).values()):6} lines, {number} statements")
    for name, (pattern, most) in FEATURES.items():
        lines = found(pattern)
        print(f"{name:26} {len(lines):6} files of {most}, {sum(lines.values())} lines")
    print(f"{'engine names':26} {sum(engine_names().values()):6} lines of {ENGINE_LINES}")
    print(f"{'wide classes':26} {len(wide_classes()):6} of {len(WIDE)}", *sorted(wide_classes()))
    if requested.bundle:
        files = chat_files(requested.bundle)
        print(f"{'a streamed chat':26} {len(files):6} files of {CHAT_FILES}", *files, sep="\n  ")


if __name__ == "__main__":
    main()
