"""What dies is started again, what runs is finished at the end, and what cannot start says why."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import served
from refusal import refused
from served import Served, free_ports, joined, needs_triton, triton
from waiting import wait_until

from echo_trt.adapters.triton import server as triton_server
from echo_trt.cli import serve as launcher
from echo_trt.cli.serve import run
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.supervision.options import TRITON_PORTS, ServeOptions

LONG = {"text_input": "the theme of a thing, ", "max_tokens": 440, "ignore_eos": True}
STREAMS = 8


def attempt(server: Served, **request) -> dict:
    """Return an answer or the kind of its failure, in time."""
    try:
        return server.generate(**request)
    except Exception as error:
        return {"error": type(error).__name__}


@needs_triton
def test_deaths_and_the_end(roomy_bundle, tmp_path):
    with triton(roomy_bundle, tmp_path / "log", "--policy", "autoregressive").wait_for("serving") as server:
        whole = server.generate(**LONG)
        for number, name in enumerate(("triton_python_backend_stub", "tritonserver"), 1):
            _kill_under_load(server, name, whole)
            server.wait_for("serving again", again=number)
            assert "does not answer" not in server.err, "it was only noticed by a probe"
            assert server.generate(**LONG)["text_output"] == whole["text_output"]
            assert len(server.children("triton_python_backend_stub")) == 1
            assert len(server.regions()) == 1
        _stop_with_streams(server, whole)


@needs_triton
def test_a_divided_target_is_served_and_a_lost_rank_is_replaced(divided_bundle, roomy_bundle, tmp_path):
    prompt, params = [5, 6, 7, 8], SamplingParams(20, ignore_eos=True)
    (wanted,) = LLM(roomy_bundle, "autoregressive", 1).generate([prompt], [params])
    requested = {"input_ids": prompt, "max_tokens": 20, "ignore_eos": True}
    with triton(divided_bundle, tmp_path / "log").wait_for("serving") as server:
        assert server.generate(**requested)["output_ids"] == wanted.token_ids
        (rank,) = server.children("bin/python")
        os.kill(rank, signal.SIGKILL)
        assert "rank 1 of 2 has ended" in server.generate(**requested)["error"]
        server.wait_for("serving again", again=1)
        assert server.generate(**requested)["output_ids"] == wanted.token_ids
        assert server.stop() == 0


@needs_triton
def test_the_gateway_s_answers_finish_before_triton_is_stopped(roomy_bundle, tmp_path):
    """Triton does not count them: they come by the engine's socket."""
    with Served(roomy_bundle, tmp_path / "log", triton=True).wait_for("serving") as server:
        whole = server.complete("a thing", max_tokens=440)
        with ThreadPoolExecutor(1) as pool:
            requested = pool.submit(server.complete, "a thing", max_tokens=440, speculate=False)
            server.wait_metrics(lambda metrics: metrics["echo_running"] == 1)
            assert server.stop() == 0, server.err
            assert requested.result(60) == whole
        assert "lost" not in server.err


def _kill_under_load(server: Served, name: str, whole: dict) -> None:
    """Clients get an answer or an error, none waits for ever."""
    (victim,) = server.children(name)  # looked up before: reading /proc takes as long as an answer
    with ThreadPoolExecutor(STREAMS) as pool:
        first = server.stream(**LONG)
        requested = [pool.submit(_ask_until_error, server) for _ in range(STREAMS)]
        first.next()  # the engine is at work
        os.kill(victim, signal.SIGKILL)
        answers = [answer for each in requested for answer in each.result(60)]
    assert any("error" in answer for answer in answers), "it was killed too late"
    for answer in answers:
        assert "error" in answer or answer["text_output"] == whole["text_output"]


def _ask_until_error(server: Served) -> list[dict]:
    """One answer after another, so that there is load when the kill comes, however fast the engine is."""
    answers = []
    while len(answers) < 20 and not (answers and "error" in answers[-1]):
        answers.append(attempt(server, **LONG))
    return answers


def _stop_with_streams(server: Served, whole: dict) -> None:
    streams = [server.stream(**LONG) for _ in range(STREAMS)]
    begun = [stream.next() for stream in streams]
    assert "finish_reason" not in begun[-1]
    server.process.send_signal(signal.SIGTERM)
    # Short ones, so that one comes while the streams are finished, however fast the engine is.
    refusal = wait_until(lambda: attempt(server, text_input="a thing", max_tokens=1).get("error"))
    assert "shutting down" in refusal
    assert all("error" in attempt(server, **LONG) for _ in range(50))
    for first, stream in zip(begun, streams, strict=True):
        assert joined([first, *stream])[0] == whole["text_output"]
    assert server.process.wait(180) == 0, server.err
    assert not server.regions()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.http))


@needs_triton
def test_a_launcher_that_is_killed_takes_everything_along(roomy_bundle, tmp_path):
    server = triton(roomy_bundle, tmp_path / "log").wait_for("serving")
    below = server.children("triton")
    assert len(below) == 2
    server.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, below)))
    folders = lambda: list(Path(tempfile.gettempdir()).glob(f"{triton_server.PREFIX}{server.process.pid}-*"))  # noqa: E731
    assert len(folders()) == 1
    triton_server.remove_regions()
    triton_server.remove_folders(Path(tempfile.gettempdir()))
    assert not server.regions()
    assert not folders()


@needs_triton
def test_of_two_launchers_on_the_same_ports_one_serves(roomy_bundle, tmp_path, monkeypatch):
    """And its host may be a name, and it may open as many files as the system lets it."""
    ports, (soft, hard) = free_ports(4), resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(served, "free_ports", lambda number: ports)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 900), hard))
    try:
        both = [triton(roomy_bundle, tmp_path / name, "--host", "localhost") for name in ("one", "two")]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        wait_until(lambda: any(server.process.poll() is not None for server in both))
        loser, winner = sorted(both, key=lambda server: server.process.poll() is None)
        assert loser.process.returncode == 2
        assert "serve: serving" not in loser.err
        assert "in use" in loser.err.strip().splitlines()[-1]
        winner.wait_for("serving")
        assert winner.generate(text_input="a thing", max_tokens=2)["completion_tokens"] == 2
        assert resource.prlimit(winner.children("tritonserver")[0], resource.RLIMIT_NOFILE)[0] == hard
    finally:
        for server in both:
            server.kill()


# -- what cannot start ---------------------------------------------------------------------------------------------


@pytest.fixture
def job(bundle_of) -> ServeOptions:
    ports = {f"{name}_port": port for name, port in zip(TRITON_PORTS, free_ports(3), strict=True)}
    return ServeOptions(bundle_of("lookup"), openai_port=0, triton=True, **ports)


def test_what_the_launcher_refuses_before_it_starts_anything(job, tmp_path, monkeypatch):
    (tmp_path / "short").write_text("abc\n")
    with socket.socket() as taken, refused("--grpc-port", job.grpc_port, "give another port"):
        taken.bind(("127.0.0.1", job.grpc_port))
        taken.listen()
        run(job)
    with refused(tmp_path, "not a bundle"):
        run(ServeOptions(tmp_path))
    for changes, output in (
        ({"grpc_port": job.http_port}, (job.http_port, "a port of its own")),
        ({"batch": 99999}, ("--batch is 99999", "from 1 to 4096")),
        ({"api_keys": tmp_path / "short"}, ("key 1 is shorter", "one longer key per line")),
    ):
        with monkeypatch.context() as patch, refused(*output):
            patch.setattr(launcher, "find_server", None)
            run(replace(job, **changes))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if find_spec("pytriton"):
        with monkeypatch.context() as patch, refused("3.99", "use Python 3.11 or 3.12"):
            patch.setattr(sys, "version_info", (3, 99))
            run(job)
    monkeypatch.setattr(triton_server.importlib.util, "find_spec", lambda name: None)
    with refused("Triton Inference Server is not here", "pip install"):
        run(job)


@needs_triton
def test_a_bundle_that_does_not_load(bundle_of, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("lookup"), folder)
    file = next(folder.glob("target.*"))
    file.write_bytes(file.read_bytes()[:-1])
    with triton(folder, tmp_path / "log") as server:
        assert server.process.wait(180) == 2
    last = server.err.strip().splitlines()[-1]
    assert "was changed after the build" in last
    assert ".py" not in last, "frames of Python"
    assert " ERROR serve: " in last
    assert not server.regions()


@needs_triton
def test_a_launcher_that_is_killed_while_the_bundle_loads_takes_everything_along(roomy_bundle, tmp_path):
    server = triton(roomy_bundle, tmp_path / "log", "--policy", "autoregressive")
    wait_until(lambda: server.children("triton_python_backend_stub"))
    time.sleep(1)
    below = server.children("triton")
    server.kill()
    assert "serve: serving" not in server.err
    wait_until(lambda: not any(map(psutil.pid_exists, below)))


@needs_triton
def test_a_backend_that_dies_while_it_loads_is_noticed(roomy_bundle, tmp_path):
    with triton(roomy_bundle, tmp_path / "log", "--policy", "autoregressive") as server:
        killed = False
        while not killed:
            [loading, *_] = wait_until(lambda: server.children("triton_python_backend_stub"))
            time.sleep(0.5)
            with contextlib.suppress(ProcessLookupError):  # Triton's first one ends by itself, and another loads
                os.kill(loading, signal.SIGKILL)
                killed = True
        assert server.process.wait(180) == 1
    last = server.err.strip().splitlines()[-1]  # Triton notices one that dies before it has said a word by itself
    assert "died while it loaded the bundle" in last or "Triton did not start" in last
    assert not server.regions()


def test_only_regions_and_folders_without_an_owner_are_removed(tmp_path):
    own, other, gone = (f"{triton_server.PREFIX}{pid}-a" for pid in (os.getpid(), 1, 4999999))
    elsewhere = f"echo-trt-1-{os.getpid()}-a"  # of another namespace, where this process id is somebody else's
    for name in (own, other, gone, elsewhere, "triton_python_backend_shm_region_x"):
        (tmp_path / name).touch()
    triton_server.remove_regions(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {other, elsewhere, "triton_python_backend_shm_region_x"}
    folders = tmp_path / "folders"
    for name in (own, other, gone, "echo-trt-faults-x"):
        (folders / name / "1").mkdir(parents=True)
    triton_server.remove_folders(folders)
    assert {path.name for path in folders.iterdir()} == {own, other, "echo-trt-faults-x"}
