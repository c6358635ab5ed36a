"""The service that answers requests, and what its hosts, the launcher and the API server agree on."""

MODEL = "echo"
#: Of a snapshot's fields: it changes with a name, a unit or a meaning, not with a field that is added.
SNAPSHOT_FORMAT = 1
