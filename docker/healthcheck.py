"""Healthy is whose engine works: a probe, of one token, must come back.

``healthcheck.py gateway|worker|frontend PORT``; a frontend is NVIDIA Dynamo's, and must know a worker.
"""

import json
import sys
import urllib.request

SECONDS = 20


def gateway(port: str) -> bool:
    """Its /health asks the engine for a token."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS) as reply:
        return reply.status == 200


def frontend(port: str) -> bool:
    """Its own health endpoint is content without a worker."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=SECONDS) as reply:
        return bool(json.load(reply)["data"])


if __name__ == "__main__":
    checks = {"gateway": gateway, "worker": gateway, "frontend": frontend}
    try:
        healthy = checks[sys.argv[1]](sys.argv[2])
    except (OSError, ValueError) as error:
        sys.exit(f"no answer: {error}")
    sys.exit(0 if healthy else "the engine did not answer the probe")
