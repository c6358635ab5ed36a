"""``echo-trt serve`` as a process, and clients that talk to it as users do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pytest
from waiting import wait_until

from echo_trt.adapters.triton.inputs import INPUTS
from echo_trt.adapters.triton.server import PREFIX

needs_triton = pytest.mark.skipif(
    not (find_spec("pytriton") and find_spec("tritonclient")),
    reason="nvidia-pytriton and tritonclient are not installed",
)
TYPES = {tensor.name: tensor.datatype for tensor in INPUTS}
NUMPY = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BYTES": object, "BOOL": bool}


def free_ports(number: int) -> list[int]:
    """Choose ports without a listener, below the range of ports that the system gives to clients.

    Each process of a test run has a range of its own: a server that is started again finds its port free.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    own = range(10_000 + 2_750 * worker, 10_000 + 2_750 * (worker + 1))
    ports: list[int] = []
    while len(ports) < number:
        port = secrets.choice(own)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports


class Served:
    """A running server. ``err`` is what its launcher has said."""

    def __init__(self, bundle: Path, log: Path, *options: object, gateway: bool = True, triton: bool = False):
        """``triton``: whether Triton hosts the engine, and ``gateway``: whether there is one then."""
        self.http, self.grpc, self.metrics_port, self.openai = free_ports(4)
        ports: list[object] = ["--openai-port", self.openai if gateway else 0]
        if triton:
            ports += ["--triton", "--http-port", self.http, "--grpc-port", self.grpc]
            ports += ["--metrics-port", self.metrics_port]
        words = [sys.executable, "-m", "echo_trt.cli.app", "serve", bundle, *ports, *options]
        self._log, self._metrics = log, self.metrics_port if triton else self.openai
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                list(map(str, words)), stdout=out, stderr=out, env={**os.environ, "COLUMNS": "400"}
            )

    @property
    def err(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, again: int = 1) -> Self:
        """Return once the launcher has said ``text``, or has said it ``again`` and again."""
        try:
            wait_until(
                lambda: self.err.count(text) >= again or self.process.poll() is not None, reported=lambda: self.err
            )
            assert self.err.count(text) >= again, self.err
        except AssertionError:
            self.kill()
            raise
        return self

    def stop(self, seconds: float = 180) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def children(self, name: str) -> list[int]:
        """List processes below the launcher whose command holds ``name``."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in next(iter(process.cmdline()), ""):
                    found.append(process.pid)
        return found

    def regions(self) -> list[str]:
        return [path.name for path in Path("/dev/shm").glob(f"{PREFIX}{self.process.pid}-*")]

    # -- HTTP ----------------------------------------------------------------------------------------------------

    def complete(self, prompt: str, **body: Any) -> str:
        """Return the text that OpenAI's API completes greedily."""
        whole = {"model": "echo", "prompt": prompt, "temperature": 0, "ignore_eos": True, **body}
        _, answer = _posted(self.openai, "/v1/completions", json.dumps(whole).encode(), 180)
        return json.loads(answer)["choices"][0]["text"]

    def post(self, path: str, body: bytes, seconds: float = 180, below: str = "models/echo/") -> tuple[int, bytes]:
        """Post to Triton's HTTP endpoint."""
        return _posted(self.http, f"/v2/{below}{path}", body, seconds)

    def generate(self, **request: Any) -> dict[str, Any]:
        return json.loads(self.post("generate", json.dumps(request).encode())[1])

    def generate_stream(self, **request: Any) -> list[dict[str, Any]]:
        _, body = self.post("generate_stream", json.dumps({"stream": True, **request}).encode())
        return [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line.strip()]

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self._metrics, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        lines = text.replace('{model_name="echo"}', "").replace('model_name="echo",', "")
        return {name: float(value) for name, value in re.findall(r"^(echo_\S+) (\S+)$", lines, re.MULTILINE)}

    def wait_metrics(self, fits: Callable[[dict[str, float]], bool], seconds: float = 120) -> dict[str, float]:
        reported = lambda: {name: value for name, value in self.metrics().items() if "_bucket" not in name}  # noqa: E731
        return wait_until(lambda: (found := self.metrics()) and fits(found) and found, seconds, reported)

    def rest(self) -> dict[str, float]:
        """Return the metrics once nothing runs and nothing waits, and all of them from one flush."""
        time.sleep(0.6)  # they are a moment old
        read: list[dict[str, float]] = [{}]

        def at_rest(metrics: dict[str, float]) -> bool:
            read.append({name: value for name, value in metrics.items() if not name.startswith("echo_gateway_")})
            busy = any(metrics[f"echo_{name}"] for name in ("running", "queued", "blocks_used"))
            return read[-2] == read[-1] and not busy

        return self.wait_metrics(at_rest)

    # -- gRPC ----------------------------------------------------------------------------------------------------

    def stream(self, id: str = "", error_codes: bool = False, **request: Any) -> GrpcStream:
        return GrpcStream(self.grpc, request, id, {"error_codes": True} if error_codes else None)


def triton(bundle: Path, log: Path, *options: object) -> Served:
    """Return a server whose engine Triton hosts, without a gateway."""
    return Served(bundle, log, *options, gateway=False, triton=True)


def _posted(port: int, path: str, body: bytes, seconds: float) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


class GrpcStream:
    """One request over stream_infer; iterating gives its responses as dictionaries, an error as {"error": text}."""

    def __init__(self, port: int, request: dict[str, Any], id: str = "", parameters: dict | None = None):
        import tritonclient.grpc as client

        self._replies: queue.SimpleQueue = queue.SimpleQueue()
        self._client = client.InferenceServerClient(f"127.0.0.1:{port}")
        self._client.start_stream(lambda result, error: self._replies.put((result, error)))
        inputs = [grpc_input(name, value) for name, value in {"stream": True, **request}.items()]
        options = {"request_id": id, "parameters": parameters, "enable_empty_final_response": True}
        self._client.async_stream_infer("echo", inputs, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            result, error = self._replies.get(timeout=180)
            if error is not None:
                yield {"error": error.message()}
                break
            response = result.get_response()
            if response.outputs:
                yield {o.name: _plain(o.name, result.as_numpy(o.name)) for o in response.outputs}
            if response.parameters["triton_final_response"].bool_param:
                break
        self.close()

    def next(self) -> dict[str, Any]:
        return next(iter(self))

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def grpc_input(name: str, value: Any):
    import tritonclient.grpc as client

    kind = TYPES[name]
    values = value if isinstance(value, list) else [value]
    array = np.array([[v.encode() if isinstance(v, str) else v for v in values]], NUMPY[kind])
    tensor = client.InferInput(name, array.shape, kind)
    tensor.set_data_from_numpy(array)
    return tensor


def _plain(name: str, array: np.ndarray) -> Any:
    values = array.reshape(-1).tolist()
    if name in ("output_ids", "output_log_probs"):
        return values
    return values[0].decode() if isinstance(values[0], bytes) else values[0]


def joined(pieces: list[dict[str, Any]]) -> tuple[str, list[int]]:
    """Text and token ids of a streamed answer; HTTP writes a list of one as that one."""
    assert "error" not in pieces[-1], pieces[-1]
    assert [p["sequence_index"] for p in pieces] == list(range(len(pieces)))
    return "".join(p["text_output"] for p in pieces), joined_lists(pieces, "output_ids")


def joined_lists(pieces: list[dict[str, Any]], name: str) -> list[Any]:
    values: list[Any] = []
    for piece in pieces:
        values += piece[name] if isinstance(piece[name], list) else [piece[name]]
    return values
