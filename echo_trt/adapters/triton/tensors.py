"""Triton's tensors as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from echo_trt.engine.process.inputs import INPUTS
from echo_trt.errors import UserError

_MANY = {tensor.name for tensor in INPUTS if tensor.many}


def plain_values(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return inputs by name: numbers, bools and text, or lists of them. Raises UserError.

    tensors  by name, each [1, n]
    """
    return {name: _plain(name, tensor) for name, tensor in tensors.items()}


def _plain(name: str, tensor: np.ndarray) -> Any:
    values = [_value(each, name) for each in tensor.reshape(-1)]
    if name in _MANY:
        return values
    if len(values) != 1:
        raise UserError(f"{name} has {len(values)} values; give one.")
    return values[0]


def _value(each: Any, name: str) -> Any:
    if isinstance(each, np.floating):
        return float(str(each))  # the number that was written: 0.7, not 0.699999988
    try:
        return each.decode("utf-8") if isinstance(each, bytes) else each.item()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); send text in UTF-8.") from None
