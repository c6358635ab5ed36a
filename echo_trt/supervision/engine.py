"""The engine's process, by itself."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from echo_trt.supervision.options import ServeOptions
from echo_trt.supervision.probe import engine_works
from echo_trt.supervision.process import Process, ProcessLog
from echo_trt.supervision.supervised import Supervised


class EngineProcess(Supervised):
    """The engine's process, which serves once a real inference was answered at its ``socket``."""

    name = "the engine"

    def __init__(self, job: ServeOptions, work: Path, log: ProcessLog):
        super().__init__(log, job.host, {}, job.start_seconds)
        self.socket = work / "engine"
        self._job = job

    def _spawn(self) -> Process:
        job = self._job
        self.socket.unlink(missing_ok=True)
        words = [str(job.bundle.resolve()), "--socket", str(self.socket), "--log-format=json", *job.words]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        return Process("engine", [sys.executable, "-m", "echo_trt.engine.process", *words], environment, self._log)

    def _ready(self) -> bool:
        return self.socket.exists() and asyncio.run(engine_works(self.socket))

    def _lives(self) -> bool:
        return asyncio.run(engine_works(self.socket, patient=True))

    @property
    def drained(self) -> bool:
        """Whether it has ended in good order."""
        return self.process is None or self.process.exit_code == 0
