"""Healthy is who answers: one token is asked for and must come back. ``healthcheck.py triton|gateway PORT``"""

import json
import sys
import urllib.error
import urllib.request

SECONDS = 20
#: Before all clients, so that a long queue is no illness.
FIRST = -(2**31)


def gateway(port: str) -> bool:
    """Its /health asks the engine for a token."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS) as reply:
        return reply.status == 200


def triton(port: str) -> bool:
    """Triton's own health endpoint stays ready while its backend is dead."""
    wanted = {"input_ids": [0], "max_tokens": 1, "ignore_eos": True, "priority": FIRST}
    url = f"http://127.0.0.1:{port}/v2/models/echo/generate"
    try:
        with urllib.request.urlopen(url, json.dumps(wanted).encode(), timeout=SECONDS) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        return b"queue is full" in error.read()  # busy, and the launcher watches that it moves on
    return "output_ids" in answer or "queue is full" in str(answer.get("error"))


if __name__ == "__main__":
    try:
        healthy = {"triton": triton, "gateway": gateway}[sys.argv[1]](sys.argv[2])
    except (OSError, ValueError) as error:
        sys.exit(f"no answer: {error}")
    sys.exit(0 if healthy else "the engine gave no token")
