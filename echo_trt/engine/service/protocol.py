"""What the engine's hosts, the launcher and the API server agree on."""

from __future__ import annotations

MODEL = "echo"

#: A probe's priority, by which it is known: before everyone else in the queue.
FIRST = -(2**31)
PROBE = {"input_ids": [0], "max_tokens": 1, "ignore_eos": True, "priority": FIRST}

#: Of a snapshot's fields: it changes with a name, a unit or a meaning, not with a field that is added.
SNAPSHOT_FORMAT = 1
