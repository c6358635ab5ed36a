"""The thread that keeps a worker's metrics: whatever goes wrong there, the engine's death is noticed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_dynamo


def test_an_error_of_the_publisher_does_not_end_the_watch_over_the_engine(open_llm):
    pytest.importorskip("dynamo.common")
    from echo_trt.adapters.dynamo.engine import EchoEngine
    from echo_trt.adapters.dynamo.options import WorkerOptions
    from echo_trt.engine.service.service import Service

    stopped = threading.Event()

    class Quiet(WorkerOptions):
        def stop(self) -> None:
            stopped.set()

    class Broken:
        """A publisher that takes nothing."""

        calls = 0

        def publish(self, *load: object) -> None:
            self.calls += 1
            raise ValueError("no such field")

    engine, publisher = EchoEngine(Quiet(Path("bundle"), name="echo")), Broken()
    engine.attach_snapshot_publisher(publisher)
    engine._service = service = Service(open_llm("close"))
    beats = threading.Thread(target=engine._beat, daemon=True)
    beats.start()
    try:
        while publisher.calls < 2:
            assert beats.is_alive()
            beats.join(0.05)
        service.close(0)  # the engine's thread has ended
        assert stopped.wait(30)
        assert engine.died
    finally:
        engine._stop.set()
        beats.join(30)
