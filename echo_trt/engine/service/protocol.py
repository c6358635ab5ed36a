"""What the engine's hosts, the launcher and the API server agree on."""

from __future__ import annotations

MODEL = "echo"

#: The priority of a probe, a request of one token, by which it is known: before everyone else in the queue.
FIRST = -(2**31)

#: Of a snapshot's fields: it changes with a name, a unit or a meaning, not with a field that is added.
SNAPSHOT_FORMAT = 1
