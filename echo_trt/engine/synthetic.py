"""What takes the place of the networks' choices, so that speed can be measured without trained weights."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.speculation.drafts import Draft


class SyntheticText(Protocol):
    """A text, and a draft that knows it; ``echo_trt_lab.synthetic_text`` has one.

    rates     acceptance: ``text`` as given, ``words`` for another process, and the ``sentence`` of outputs
    keys      int64 [m], ``InputBatch.text_key`` of requests
    previous  int64 [m], the tokens before ``positions`` int64 [m] of their texts
    """

    rates: Any

    def next_tokens(self, keys: np.ndarray, previous: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the target's tokens at ``positions``: int64 [m]."""

    def draft(self, draft: Draft, batch: InputBatch, slots: np.ndarray) -> Draft:
        """Return a draft for ``slots`` that computes as ``draft`` does, and proposes the text."""

    def placed(self, xp: Any, device: Any) -> Any:
        """Return the text on a ``device`` of ``xp``, whose ``propose`` is called in drafts of several levels."""
