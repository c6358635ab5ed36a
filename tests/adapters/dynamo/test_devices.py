"""Workers of one machine have GPUs of their own."""

import pytest

from echo_trt.adapters.dynamo.devices import VARIABLE, divided, visible_devices


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
    assert [own[VARIABLE] for own in divided(list(devices), workers, each)] == wanted


def test_a_worker_that_has_too_few_devices_says_so_by_itself():
    assert divided(["0"], 2, 2) == [{}, {}]
    assert divided([], 2, 1) == [{}, {}]


def test_the_users_choice_of_devices_is_kept(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert visible_devices("torch", {}) == ["0", "1", "2"]
    assert visible_devices("tensorrt", {VARIABLE: " GPU-8a1, 5"}) == ["GPU-8a1", "5"]
    assert visible_devices("torch", {VARIABLE: ""}) == []
    assert visible_devices("openvino", {}) == []
