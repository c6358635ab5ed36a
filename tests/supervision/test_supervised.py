"""What the launcher does with processes, shown with small ones: no Triton, and waits of no time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from socket import AF_INET
from urllib.request import Request

import pytest
from refusal import refused
from served import free_ports
from waiting import wait_until

from echo_trt.cli import serve as launcher
from echo_trt.cli.serve import ApiServer
from echo_trt.errors import StartFailed
from echo_trt.files.log import Line
from echo_trt.supervision import process, supervised
from echo_trt.supervision.options import ServeOptions
from echo_trt.supervision.probe import open_directly, responds
from echo_trt.supervision.process import Process, ProcessLog
from echo_trt.supervision.supervised import LivenessThread, Supervised, Supervisor

LISTENS = "import sys; from http.server import *; HTTPServer(('127.0.0.1', int(sys.argv[1])), SimpleHTTPRequestHandler)"
SERVES = f"{LISTENS}.serve_forever()"
DRAINS = f"""
import pathlib, threading, time
def drain():
    while not pathlib.Path({{folder!r}}, "drain").exists():
        time.sleep(0.02)
    pathlib.Path({{folder!r}}, "drained").touch()
threading.Thread(target=drain, daemon=True).start()
{SERVES}
"""


class LogLine(ProcessLog):
    """A log that can be read."""

    def __init__(self):
        self.lines: list[str] = []

    def write(self, line: Line) -> None:
        self.lines.append(line["message"])


class Small(Supervised):
    """A small server; ``programs`` are those of the next starts, SERVES from then on."""

    name = "the small one"

    def __init__(self, port: int, *programs: str):
        super().__init__(LogLine(), "127.0.0.1", {"--small-port": port}, start_seconds=120)
        self.port, self.programs, self.starts = port, list(programs), []
        self.folder = Path("none")  # of the files by which it is told to drain, and tells that it has

    def _spawn(self) -> Process:
        self.starts.append(time.monotonic())
        program = self.programs.pop(0) if self.programs else SERVES
        return Process("small", [sys.executable, "-c", program, str(self.port)], dict(os.environ), LogLine())

    def _ready(self) -> bool:
        return responds(f"http://127.0.0.1:{self.port}/", 20)

    _lives = _ready

    def until(self, fits: Callable[[], object]) -> None:
        wait_until(lambda: fits() or self.step(), reported=lambda: self.output)

    def drain(self) -> None:
        (self.folder / "drain").touch()

    @property
    def drained(self) -> bool:
        return (self.folder / "drained").exists()

    def end(self) -> None:
        self.process.terminate()

    @property
    def output(self) -> list[str]:
        return self._log.lines


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(supervised, "WAITS", (0, 0, 0))
    monkeypatch.setattr(supervised, "PROBE_EVERY", 0.2)
    monkeypatch.setattr(supervised, "AGAIN", 0.2)
    made: list[Small] = []

    def make(*programs: str) -> Small:
        made.append(Small(free_ports(1)[0], *programs))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.mark.parametrize("reader", ["gone", "stalled", "disk full"])
def test_a_child_writes_on_whatever_happens_to_the_log(reader):
    read, write = os.pipe()
    if reader == "disk full":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    if reader == "gone":
        os.close(read)
    log = ProcessLog(write, maximum=100)
    try:
        child = Process("child", [sys.executable, "-c", "for i in range(30_000): print(i)"], dict(os.environ), log)
        assert child.wait(120), "it stands still"
        child.reason()  # waits for the last line
        assert child.lines[-1] == "29999"
        log.say("has died; starting it again")
        log.close(0.1)
    finally:
        for descriptor in (write, read)[: 1 if reader == "gone" else 2]:
            os.close(descriptor)


@pytest.mark.parametrize(("limit", "more"), [(None, ""), (2 * 10**9, ", as the kernel does where .* 2.0 GB, .*")])
def test_who_was_killed_under_a_container_s_limit_is_said_to_have_reached_it_perhaps(limit, more, monkeypatch):
    monkeypatch.setattr(process, "memory_limit", lambda: limit)
    child = Process("child", ["sh", "-c", "kill -9 $$"], dict(os.environ), ProcessLog(1))
    assert child.wait(60)
    assert re.fullmatch(f"signal 9 ended it{more}", child.reason())
    assert re.fullmatch(f"signal 9, Killed{more}", child.ended)


def test_a_first_start_that_fails_says_why(small):
    with refused("no such bundle"):
        each = small("print('error: no such bundle.'); raise SystemExit(2)")
        each.until(lambda: each.serving)
    with refused("the small one did not start: no more room", kind=StartFailed):
        each = small("raise SystemExit('error: no more room')")
        each.until(lambda: each.serving)
    with refused("the small one did not start: signal 9 ended it", kind=StartFailed):
        each = small("import os; print('hello'); os.kill(os.getpid(), 9)")
        each.until(lambda: each.serving)


def test_who_answers_on_its_port_is_not_taken_for_it(small):
    each = small("import time; time.sleep(1); raise SystemExit(1)")
    other = Process("other", [sys.executable, "-c", SERVES, str(each.port)], dict(os.environ), LogLine())
    try:
        wait_until(lambda: responds(f"http://127.0.0.1:{each.port}/", 20))
        with refused(f"--small-port {each.port} on 127.0.0.1", "in use", "give another port"):
            each.until(lambda: each.serving)
    finally:
        other.kill()


def test_failures_of_a_restart_are_restarts_too(small):
    each = small(SERVES, "raise SystemExit('error: shot again')", f"{LISTENS}; raise SystemExit(1)")
    each.until(lambda: each.serving)
    os.kill(each.process.pid, signal.SIGKILL)
    each.until(lambda: not each.serving)
    each.until(lambda: each.serving)
    assert each.output[0] == "the small one has died (signal 9, Killed); starting it again"
    assert "the small one did not start: shot again; starting it again" in each.output
    assert len(each.starts) == 4
    assert re.fullmatch(r"serving again after \d+\.\d s", each.output[-1])


def test_who_has_served_is_never_given_up(small):
    each = small(SERVES, *["raise SystemExit(2)"] * 9)
    each.until(lambda: each.serving)
    os.kill(each.process.pid, signal.SIGKILL)
    each.until(lambda: len(each.starts) > 1 and each.serving)
    assert len(each.starts) == 11


def test_old_restarts_are_forgotten_but_not_in_the_midst_of_failures(small, monkeypatch):
    monkeypatch.setattr(supervised, "RESTARTS_WITHIN", 0.0)
    monkeypatch.setattr(supervised, "WAITS", (0, 0.01, 0.02))
    each = small()
    for _ in range(3):
        each.until(lambda: each.serving)
        os.kill(each.process.pid, signal.SIGKILL)
        each.until(lambda: not each.serving)
        assert each.output[-1] == "the small one has died (signal 9, Killed); starting it again"
    each.programs = ["raise SystemExit(1)"] * 4
    each.until(lambda: each.serving)
    waits = [re.findall("starting it again(?: in (.+) s)?$", line) for line in each.output[-5:-1]]
    assert waits == [["0.01"], ["0.02"], ["0.02"], ["0.02"]]


def test_the_waits_are_those_that_the_docs_name():
    assert supervised.WAITS == (0, 1, 4, 16, 60)


@pytest.mark.parametrize(("answers", "silent"), [([False, False, True] * 9, False), ([False] * 3, True)])
def test_one_answer_that_does_not_come_is_no_hang(monkeypatch, answers, silent):
    monkeypatch.setattr(supervised, "PROBE_EVERY", 0)
    monkeypatch.setattr(supervised, "AGAIN", 0)
    asked = threading.Event()

    def lives() -> bool:
        if len(answers) == 1:
            asked.set()
        return answers.pop(0) if answers else True

    watch = LivenessThread(lives)
    assert asked.wait(60)
    if silent:
        wait_until(lambda: watch.silent)
    assert watch.silent == silent
    watch.stop()


@pytest.fixture
def gateway(monkeypatch) -> Iterator[ApiServer]:
    """Return a real one with keys and 64 descriptors, without an engine."""
    monkeypatch.setattr(supervised, "PROBE_EVERY", 0.2)
    monkeypatch.setattr(launcher, "ANSWER_SECONDS", 5)  # within which a busy machine answers
    few = "import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
    few += "runpy.run_module('echo_trt.server', run_name='__main__', alter_sys=True)"
    words = [sys.executable, "-c", few]
    monkeypatch.setattr(launcher, "Process", lambda name, command, *more: Process(name, words + command[3:], *more))
    with tempfile.TemporaryDirectory() as folder:
        (keys := Path(folder, "keys")).write_text(f"{KEY}\n")
        keys.chmod(0o600)
        options = ServeOptions(Path("none"), openai_port=free_ports(1)[0], api_keys=keys)
        gateway = ApiServer(options, LogLine(), Path(folder, "engine"))
        yield gateway
        gateway.stop()


KEY = "sk-0123456789abcdef"
UNREAD = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100


def test_a_crowd_without_keys_neither_ends_the_server_nor_keeps_others_out(gateway):
    wait_until(lambda: gateway.serving or gateway.step())
    first, port, statuses = gateway.process, gateway._job.openai_port, []

    def attack(stack: ExitStack) -> None:
        """Hold twice as many connections as there may be, and read nothing."""
        for _ in range(64):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(60)
            with contextlib.suppress(OSError):  # it was sent away
                connection.connect(("127.0.0.1", port))
                connection.sendall(UNREAD)

    for _ in range(2):
        with ExitStack() as stack:
            attack(stack)
            for _ in range(3):
                request = Request(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
                with open_directly(request, timeout=60) as reply:
                    statuses.append(reply.status)
                gateway.step()
                time.sleep(0.1)
    assert statuses == [200] * 6
    assert gateway.process is first
    assert gateway.serving
    assert not [line for line in gateway._log.lines if "API server" in line]


def test_a_gateway_that_hangs_is_replaced(gateway, monkeypatch):
    monkeypatch.setattr(supervised, "AGAIN", 0.2)
    monkeypatch.setattr(launcher, "ANSWER_SECONDS", 2)
    wait_until(lambda: gateway.serving or gateway.step())
    hung = gateway.process
    os.kill(hung.pid, signal.SIGSTOP)
    wait_until(lambda: not gateway.serving or gateway.step())
    wait_until(lambda: gateway.serving or gateway.step())
    assert not hung.alive
    assert gateway._log.lines[0] == "the API server does not answer; starting it again"
    assert gateway._log.lines[-1].startswith("serving again after")


class Pair(Supervisor):
    """An engine that drains at once, and a gateway, both small, as one service."""

    def __init__(self, engine: Small, gateway: Small):
        self.stop, self.log, self.engine, self.gateway = threading.Event(), LogLine(), engine, gateway
        super().__init__([[engine, gateway]], self.stop, self.log, 60, lambda: "serving")

    def when_serving(self, act: Callable[[], None]) -> threading.Thread:
        """Act on a thread of its own once both serve."""

        thread = threading.Thread(target=lambda: (wait_until(lambda: "serving" in self.log.lines), act()))
        thread.start()
        return thread


@pytest.fixture
def pair(small, tmp_path) -> Pair:
    pair = Pair(small(DRAINS.format(folder=str(tmp_path))), small())
    pair.engine.folder = tmp_path
    return pair


def test_an_engine_is_drained_where_the_gateway_does_not_start(pair, tmp_path):
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.1)"
    pair.gateway.programs = [f"{waits}\nraise SystemExit('error: no room')"]
    begun = threading.Thread(target=lambda: wait_until(lambda: pair.engine.serving) and (tmp_path / "go").touch())
    begun.start()
    with refused("the small one did not start: no room", kind=StartFailed):
        pair.run()
    begun.join()
    assert (tmp_path / "drained").exists()
    assert pair.log.lines[-1] == "stopping; requests in flight are finished"


def test_a_stop_in_the_midst_of_a_restart_is_no_return(pair):
    pair.engine.programs.append("import time; time.sleep(60)")

    def shoot_and_stop() -> None:
        os.kill(pair.engine.process.pid, signal.SIGKILL)
        wait_until(lambda: len(pair.engine.starts) == 2)
        pair.stop.set()

    shooter = pair.when_serving(shoot_and_stop)
    assert pair.run() == 0
    shooter.join()
    assert pair.engine.output == ["the small one has died (signal 9, Killed); starting it again"]


DRAINING = """
import contextlib, signal, sys
from echo_trt.supervision import supervised

class Drains:
    def __init__(self, stop):
        self.stop = stop

    def run(self):
        signal.raise_signal(signal.SIGINT)
        assert self.stop.is_set()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            return 0
        return 7

sys.exit(supervised.supervise("echo-trt-test-", "text", lambda folder, stop, log: Drains(stop)))
"""


def test_a_second_ctrl_c_waits_for_no_answer():
    """In a process of its own: these are real signals."""
    done = subprocess.run([sys.executable, "-c", DRAINING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr


def test_a_temporary_folder_with_too_long_a_path_is_the_users_mistake(tmp_path, monkeypatch, capfd):
    (long := tmp_path / ("t" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert supervised.supervise("echo-trt-test-", "text", lambda *_: pytest.fail("it began")) == 2
    assert re.search(f"ERROR .*TMPDIR leads to {long}.*set it to a short one", capfd.readouterr().err)


def test_the_servers_get_an_address_and_a_name_that_has_none_is_refused(monkeypatch, bundle_of):
    jobs: list[ServeOptions] = []
    monkeypatch.setattr(launcher, "service", lambda job, *_: jobs.append(job))
    monkeypatch.setattr(launcher, "supervise", lambda prefix, form, make: make(Path(), threading.Event(), LogLine()))
    options = ServeOptions(bundle_of("lookup"), openai_port=free_ports(1)[0])
    for host, found in (("localhost", ("127.0.0.1", "::1")), ("0.0.0.0", ("0.0.0.0",)), ("::1", ("::1",))):
        launcher.run(replace(options, host=host))
        assert jobs[-1].host in found
    assert launcher._address("localhost", AF_INET) == "127.0.0.1"  # Triton's
    for name in ("no.such.host.invalid", "a" * 70):
        with refused(f"--host is '{name}'", "which is no address", "such as 0.0.0.0"):
            launcher.run(replace(options, host=name))


STOPPED = """
import signal
import echo_trt.cli.app
from echo_trt.__main__ import main

def run():
    try:
        signal.raise_signal(signal.{name})
    finally:
        print("cleaned up")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which these tests may run, ignores it
echo_trt.cli.app.main = run
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_command_that_is_stopped_cleans_up(number):
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.format(name=number.name)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (128 + number, "cleaned up"), done.stderr
