"""``echo-trt bench`` beside a server of OpenAI's completions: our own, which in fp32 writes our plain texts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from engine.service.served import free_ports, needs_triton
from refusal import refused
from rich.console import Console
from server.running import running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt_lab import load
from echo_trt_lab.benchmark.command import run
from echo_trt_lab.benchmark.options import BenchOptions
from echo_trt_lab.benchmark.peer_openai import OpenAIPeer, Server

pytestmark = needs_triton
TRITON = True
ROOT = Path(__file__).parents[3]
TEXTS = ["the theme of a thing", "a thing", "what is the name of the theme that they meant", "so", "abc " * 16]


@pytest.fixture(scope="module")
def url(server) -> str:
    return f"http://127.0.0.1:{server.openai}"


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"id": i, "prompt": text}) for i, text in enumerate(TEXTS)), "utf-8")
    return file


def bench(bundle: Path, prompts: Path, messages: Console, *peers: str) -> dict:
    sizes = {"batches": (1, 3), "max_tokens": 16, "rounds": 2, "requests": 5}
    job = BenchOptions(bundle, prompts=[prompts], policies=("static",), peers=peers, **sizes)
    return run(job, Console(quiet=True), messages)


def test_a_server_is_measured_beside_ours_and_writes_our_texts(roomy_bundle, prompts, url, capsys):
    result = bench(roomy_bundle, prompts, Console(), f"served={url}", f"again={url}/v1#close")
    output = " ".join(capsys.readouterr().out.split())
    assert "note: peer again took prompts from its prefix cache" in output  # the last prompt is long enough for a block
    rows = [row for row in result["results"] if row["policy"] in ("served", "again")]
    assert [(row["batch"], row["policy"]) for row in rows] == [(b, p) for b in (1, 3) for p in ("served", "again")]
    for row in rows:
        done, of = row["same_texts"].split(" of ")
        assert done == of == str(2 * max(5, 2 * row["batch"]))
        for name in ("decode_tokens_per_s", "end_to_end_tokens_per_s", "prefill_tokens_per_s", "ratio"):
            assert row[name] > 0 < row["end_to_end_ratio"]
        for name in ("ttft_ms", "time_per_token_ms"):
            assert 0 <= row[name]["p50"] <= row[name]["p99"] > 0  # a busy machine reads an answer's tokens at once


def test_the_figures_are_those_of_the_stream(roomy_bundle, url):
    """Every token is in an arrival, whether the server counts them as they come or at the end alone."""
    tokenizer, ids = load_tokenizer(roomy_bundle), [5, 6, 7]
    peer = OpenAIPeer(Server.parse(f"served={url}"), tokenizer)
    offline = LLM(roomy_bundle, "autoregressive", 1).generate([ids], SamplingParams(max_tokens=40))[0]
    for options in (peer._options, {"include_usage": True}):
        peer._options = options
        found = peer.run([ids], 1, 40)
        assert found.answers == [offline.text]
        assert found.whole.tokens == pytest.approx(len(offline.token_ids))
        assert found.decode.tokens == pytest.approx(found.whole.tokens, abs=8)  # without the first arrival
        assert found.prefill.tokens == 3
        assert sum(found.ttft) == pytest.approx(found.prefill.elapsed)


def test_a_server_that_takes_text_alone_gets_the_prompts_text(roomy_bundle, url):
    """Ours, behind a door that refuses token ids and usage before the end, as some servers do."""

    async def forward(request: Request) -> Response:
        body = json.loads(await request.body() or "{}")
        body.pop("add_special_tokens", None)
        if isinstance(body.get("prompt"), list) or "continuous_usage_stats" in body.get("stream_options", {}):
            return JSONResponse({"detail": "prompt must be a string"}, 422)
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.request(request.method, url + request.url.path, json=body or None)
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])

    with running(Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])) as door:
        tokenizer = load_tokenizer(roomy_bundle)
        ids = [tokenizer.encode(text) for text in TEXTS]
        found = OpenAIPeer(Server.parse(f"door={door.base_url}"), tokenizer).run(ids, 2, 16)
    offline = LLM(roomy_bundle, "autoregressive", 1).generate(ids, SamplingParams(max_tokens=16))
    assert found.answers == [completion.text for completion in offline]


@pytest.mark.parametrize(
    ("changed", "output"),
    [
        (("http://127.0.0.1:{free}",), ("served", "127.0.0.1:{free}", "does not answer", "start the server")),
        (("{url}#gpt-9",), ("serves no model 'gpt-9'", "echo, close", "behind #")),
        (("{url}/v2",), ("/v2/v1/models answers 404", "OpenAI-compatible")),
        (("{url}", "{url}"), ("'served'", "taken", "name of its own")),
        (("127.0.0.1:8000",), ("'served=127.0.0.1:8000'", "NAME=URL")),
    ],
    ids=["nobody", "model", "no API", "twice", "no URL"],
)
def test_refused_in_a_sentence_before_anything_runs(changed, output, roomy_bundle, prompts, url, monkeypatch):
    monkeypatch.setattr("echo_trt_lab.benchmark.command.LLM", None)
    names = {"url": url, "free": free_ports(1)[0]}
    with refused(*(text.format(**names) for text in output)):
        bench(roomy_bundle, prompts, Console(quiet=True), *(f"served={text.format(**names)}" for text in changed))


def test_a_refusal_of_the_server_is_told(roomy_bundle, url):
    peer = OpenAIPeer(Server.parse(f"served={url}"), load_tokenizer(roomy_bundle))
    with refused("served", "refuses a request", "480", "lower --batch or --max-tokens"):
        peer.run([[5] * 490], 1, 64)


def test_a_server_s_doors_are_loaded_in_turns_and_compared(prompts, url, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load, "SETTLE_S", 0.2)
    out, urls = tmp_path / "load.json", [f"openai={url}", f"triton=grpc://127.0.0.1:{server.grpc}"]
    with pytest.raises(SystemExit) as done:
        load.main([prompts], urls, streams="1,3", seconds=0.5, rounds=2, max_tokens=16, json_file=out)
    output = capsys.readouterr()
    assert done.value.code == 0, output.err
    assert len(output.out.splitlines()) == 4
    rows = json.loads(out.read_text())
    order = [(row["round"], row["streams"], row["server"]) for row in rows]
    assert order == [(r, s, name) for r in (0, 1) for s in (1, 3) for name in ("openai", "triton")[:: 1 - 2 * r]]
    for name in ("openai", "triton"):  # over all rounds: a busy machine may answer nothing in one second
        tokens, messages = (
            sum(row[what] for row in rows if row["server"] == name) for what in ("tokens_per_s", "messages_per_s")
        )
        assert tokens >= messages > 0
        assert any(row["ttft_ms"] > 0 for row in rows if row["server"] == name)


def test_a_round_in_which_the_first_server_answers_nothing_has_no_ratio():
    kinds = "tokens_per_s", "messages_per_s", "ttft_ms", "ttft_p99_ms"
    rates = {"first": (0.0, 2.0), "second": (5.0, 3.0)}
    rows = [
        {"server": name, "streams": 1, "errors": [], **dict.fromkeys(kinds, rate)}
        for name, each in rates.items()
        for rate in each
    ]
    assert [line.count("(1.500)") for line in load.table(rows)] == [0, 4]
    assert [line.count("(nan)") for line in load.table(rows[::2])] == [0, 4]


def test_a_server_that_does_not_start_is_told_with_its_own_words(prompts):
    command = f"broken={sys.executable} -c 'import sys; sys.exit(\"no {{port}} for me\")'"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmarks" / "serve_load.py", prompts, "--server", command],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(r"error: server broken has not answered: no \d+ for me", done.stderr)
