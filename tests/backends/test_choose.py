"""What is chosen from logits on a device, where that device is a CPU: the host's own choice."""

from __future__ import annotations

import numpy as np
import torch
from plugins.test_sampling_kernels import choice_of, rows_of

from echo_trt.backends.cuda import device_rows
from echo_trt.backends.cuda.device_rows import DeviceLogits
from echo_trt.speculation.sampling.draw import choose


def test_few_rows_best_tokens_are_searched_for_at_once(monkeypatch):
    """A pass of many rows takes no more memory than one of a few, and a row's result depends on no other row."""
    monkeypatch.setattr(device_rows, "_AT_ONCE", 10 * 4 * 90)
    logits, count = rows_of(2, 35, 90), 35
    on_card, choice = DeviceLogits(torch.from_numpy(logits)), choice_of(4, 35)
    assert on_card.choose(np.arange(count), choice).tolist() == choose(logits, choice).tolist()
    whole = DeviceLogits(torch.from_numpy(logits[:10])).log_probabilities(np.arange(10), np.arange(10), 3)
    parts = on_card.log_probabilities(np.arange(count), np.arange(count), 3)
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(one[:10], other)
