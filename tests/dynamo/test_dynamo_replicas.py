"""``echo-trt serve --replicas``: one command that starts, supervises and drains Dynamo's frontend and its workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from served import free_ports

pytestmark = [pytest.mark.needs_dynamo, pytest.mark.slow]
SECONDS = 240
MODEL = "echo"


class Launched:
    """The command as a process, and what it has said."""

    def __init__(self, log: Path, *words: object):
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
        with log.open("wb") as out:
            command = [sys.executable, "-m", "echo_trt", *map(str, words)]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env={**environment, "COLUMNS": "400"})

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + SECONDS
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.1)

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for task in children for pid in task.read_text().split()]
        return [pid for pid in pids if b"\0worker\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_one_command_serves_heals_and_drains(worker_bundle, tmp_path):
    [port] = free_ports(1)
    launched = Launched(tmp_path / "log", "serve", worker_bundle, "--replicas", 2, "--openai-port", port)
    try:
        launched.wait_for("serving\n")
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0, "ignore_eos": True}
        before = httpx.post(url, json=body, timeout=60).json()
        assert before["usage"]["completion_tokens"] == 400

        killed, _ = launched.workers()
        os.kill(killed, signal.SIGKILL)
        assert httpx.post(url, json=body, timeout=60).json()["choices"] == before["choices"]
        launched.wait_for("has died; starting it again")
        launched.wait_for("serving again")
        assert len(launched.workers()) == 2

        answers = []
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=60).json()))
        thread.start()
        time.sleep(0.2)
        launched.process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0]["choices"] == before["choices"]
        assert launched.process.wait(60) == 0
        assert not re.search("Traceback|panicked", launched.said)
    finally:
        launched.process.kill()
        launched.process.wait()
