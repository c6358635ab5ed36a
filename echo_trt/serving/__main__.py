"""``python -m echo_trt.serving``: the engine's process, which ``echo-trt serve`` starts beside the door."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from echo_trt.decoding.policies import load_policies
from echo_trt.errors import UserError
from echo_trt.runtime.llm import LLM
from echo_trt.serving.host import Host
from echo_trt.serving.metrics import EngineMetrics
from echo_trt.serving.protocol import MODEL
from echo_trt.serving.request import Reader
from echo_trt.serving.service import Service

log = logging.getLogger("engine")


def run(
    bundle: Annotated[Path, typer.Option(help="A folder that echo-trt build made.")],
    path: Annotated[Path, typer.Option("--socket", help="Path of the socket to listen on.")],
    policy: Annotated[str | None, typer.Option(help="How to speculate.")] = None,
    policy_file: Annotated[Path | None, typer.Option(help="A Python file with policies.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests running at once.")] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 256,
    kv_cache_memory: Annotated[int | None, typer.Option(help="Bytes of the KV pool.")] = None,
    special_tokens_in_content: Annotated[bool, typer.Option(help="Read control tokens in messages.")] = False,
) -> None:
    """Open a bundle and answer on a socket until SIGTERM; open answers finish."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if policy_file:
        load_policies(policy_file)
    llm = LLM(bundle, policy, batch, note=log.info, kv_cache_memory=kv_cache_memory)
    log.info(llm.pool.warning or llm.pool.sentence)
    reader = Reader(bundle, llm.loop.state.context, special_tokens_in_content, llm.manifest.sampling.given())
    service = Service(llm, queue)
    gc.freeze()  # what was loaded lives as long as the process

    async def serve() -> bool:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        return await Host(service, reader, EngineMetrics(MODEL)).serve(path, stop)

    sound = asyncio.run(serve())
    service.close(0)
    raise typer.Exit(0 if sound else 1)


def main() -> None:
    try:
        typer.run(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
