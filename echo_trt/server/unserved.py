"""Paths of OpenAI's and Ollama's APIs that are not served, and what to run instead."""

from __future__ import annotations

_EMBEDDINGS = "this model gives no embeddings; run a server of an embedding model beside it, such as vLLM or Infinity"
_IMAGES = "this model reads and writes text alone; run a server of an image model beside it"
_AUDIO = "this model reads and writes text alone; run a server of a speech model beside it"
_STORED = "nothing is stored here; keep messages, files and jobs at the client, and send them with each request"
_FIXED = "this server has the one model that it was started with; use echo-trt build and echo-trt serve for another"
#: Beginning of a path -> why it is not served, and the remedy.
UNSERVED = {
    "/v1/embeddings": _EMBEDDINGS,
    "/api/embed": _EMBEDDINGS,  # and /api/embeddings
    "/v1/rerank": "this model ranks no documents; run a server of a ranking model beside it, such as vLLM or Infinity",
    "/v1/moderations": "this model moderates nothing; run a server of a guard model beside it, and ask it as a chat",
    "/v1/images/": _IMAGES,
    "/v1/videos": _IMAGES,
    "/v1/audio/": _AUDIO,
    "/v1/realtime": _AUDIO,
    "/v1/messages/batches": _STORED,
    **dict.fromkeys(("/v1/files", "/v1/uploads", "/v1/batches", "/v1/vector_stores"), _STORED),
    **dict.fromkeys(("/v1/assistants", "/v1/threads", "/v1/conversations", "/v1/evals"), _STORED),
    "/v1/responses/compact": "nothing is compacted here; leave out the items that the model need not read again",
    **dict.fromkeys(("/v1/responses/", "/v1/chat/completions/", "/v1/containers"), _STORED),
    "/v1/fine_tuning/": "nothing is trained here; train with the model's own tools, and build a bundle of the result",
    **dict.fromkeys((f"/api/{name}" for name in ("pull", "push", "create", "copy", "delete", "blobs")), _FIXED),
}


def refusal(path: str) -> str | None:
    """Return why an API's path is not served; None: no API that is known here has it."""
    return next((why for begin, why in UNSERVED.items() if path.startswith(begin)), None)
