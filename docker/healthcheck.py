"""Healthy is whose engine works: a probe, of one token, must come back.

``healthcheck.py triton|gateway|worker|frontend PORT``; a frontend is NVIDIA Dynamo's, and must know a worker.
"""

import json
import sys
import urllib.request

SECONDS = 20
#: The priority by which the server knows a probe: it answers however full its queue and its places are.
FIRST = -(2**31)


def gateway(port: str) -> bool:
    """Its /health asks the engine for a token."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS) as reply:
        return reply.status == 200


def triton(port: str) -> bool:
    """Triton's own health endpoint stays ready while its backend is dead."""
    wanted = {"input_ids": [0], "max_tokens": 1, "ignore_eos": True, "priority": FIRST}
    url = f"http://127.0.0.1:{port}/v2/models/echo/generate"
    with urllib.request.urlopen(url, json.dumps(wanted).encode(), timeout=SECONDS) as reply:
        return "output_ids" in json.load(reply)


def frontend(port: str) -> bool:
    """Its own health endpoint is content without a worker."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=SECONDS) as reply:
        return bool(json.load(reply)["data"])


if __name__ == "__main__":
    checks = {"triton": triton, "gateway": gateway, "worker": gateway, "frontend": frontend}
    try:
        healthy = checks[sys.argv[1]](sys.argv[2])
    except (OSError, ValueError) as error:
        sys.exit(f"no answer: {error}")
    sys.exit(0 if healthy else "the engine did not answer the probe")
