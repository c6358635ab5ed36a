"""What the supervisor of several workers does without them: it chooses ports, and asks the frontend."""

from __future__ import annotations

import os
import threading
import urllib.request
from pathlib import Path

import pytest
from answering import answering
from engine.service.served import free_ports as others

from echo_trt.adapters.dynamo import replicas
from echo_trt.adapters.dynamo.replicas import VISIBLE_DEVICES, divided, visible_devices
from echo_trt.supervision.options import ServeOptions
from echo_trt.supervision.process import ProcessLog


def test_workers_get_ports_of_their_own_and_not_the_frontend_s(monkeypatch):
    ports = others(4)
    monkeypatch.setattr(replicas, "PORTS", ports)
    for reserved in ports:
        assert set(replicas.free_ports(3, reserved)) == {*ports} - {reserved}


ODD = [b"", b"{", b"[]", b'{"detail": "starting"}', b'{"data": 1}', b"\xff"]


@pytest.mark.parametrize(("body", "names"), [(b'{"data": [{"id": "echo"}]}', ["echo"]), *((body, []) for body in ODD)])
def test_the_frontend_is_asked_without_a_proxy_and_may_say_anything(body, names, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)
    log = ProcessLog(os.open(os.devnull, os.O_WRONLY))
    with answering(body) as port:
        frontend = replicas.Frontend(ServeOptions(Path("bundle"), replicas=1, openai_port=port), {}, log, [])
        assert [name for name in ("echo", "another") if frontend.lists(name)] == names
    log.close()


def test_the_address_that_is_printed_can_be_opened(bundle_of, monkeypatch):
    log, stop = ProcessLog(os.open(os.devnull, os.O_WRONLY)), threading.Event()
    monkeypatch.setattr(replicas.Frontend, "lists", lambda self, model: True)
    job = ServeOptions(bundle_of("lookup"), replicas=1, host="::1", openai_port=9000)
    supervisor = replicas.replicas(job, {}, stop, log)
    assert "http://[::1]:9000/v1" in supervisor._announcement()
    log.close()


# -- GPUs of one machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "workers", "each", "wanted"),
    [
        ("0123", 4, 1, ["0", "1", "2", "3"]),
        ("0123", 2, 2, ["0,1", "2,3"]),
        ("0123", 1, 4, ["0,1,2,3"]),
        ("012", 3, 2, ["0,1", "0,1", "0,1"]),  # the third device cannot hold a worker
        ("01", 3, 1, ["0", "1", "0"]),
    ],
)
def test_devices_are_divided(devices, workers, each, wanted):
    assert [own[VISIBLE_DEVICES] for own in divided(list(devices), workers, each)] == wanted


def test_a_worker_that_has_too_few_devices_says_so_by_itself():
    assert divided(["0"], 2, 2) == [{}, {}]
    assert divided([], 2, 1) == [{}, {}]


def test_the_users_choice_of_devices_is_kept(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert visible_devices("torch", {}) == ["0", "1", "2"]
    assert visible_devices("tensorrt", {VISIBLE_DEVICES: " GPU-8a1, 5"}) == ["GPU-8a1", "5"]
    assert visible_devices("torch", {VISIBLE_DEVICES: ""}) == []
    assert visible_devices("openvino", {}) == []
