"""What the launcher and the Triton model agree on."""

from __future__ import annotations

MODEL = "echo"


#: A probe's priority, by which it is known: before everyone else in the queue.
FIRST = -(2**31)
