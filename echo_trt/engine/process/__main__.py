"""``python -m echo_trt.engine.process``: the engine's process, beside the API server of ``echo-trt serve``."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.llm import LLM
from echo_trt.engine.options import HostedOptions, LogFormat, command, run_alone
from echo_trt.engine.process.host import Host
from echo_trt.engine.service import MODEL
from echo_trt.engine.service.kv_events import publish_kv_events
from echo_trt.engine.service.metrics import EngineMetrics
from echo_trt.engine.service.service import Service
from echo_trt.engine.stored_prefixes import keep_prefixes
from echo_trt.files.log import configure
from echo_trt.speculation.policies import policy_named

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HostOptions(HostedOptions):
    """What the engine's process is asked to do."""

    socket: Annotated[Path, Parameter(help="Path of the socket to listen on.")]
    log_format: LogFormat = "text"


@command
def run(options: HostOptions) -> int:
    """Open a bundle and answer on a socket until SIGTERM; requests in flight finish."""
    configure("engine", options.log_format)
    if options.policy:
        policy_named(options.policy, "--policy")
    bundle, memory = options.bundle, options.kv_cache_memory
    llm = LLM(
        bundle,
        options.policy,
        options.batch,
        note=log.info,
        prefix_cache=False if options.no_prefix_cache else None,
        kv_cache_memory=memory,
        costs=options.costs,
        learn_answers=options.learn_answers,
    )
    (log.warning if llm.pool.warning else log.info)(llm.pool.warning or llm.pool.sentence)
    classes = LatencyClasses(options.latency_classes)
    publish_kv_events(llm.loop.batch.blocks.cache, options.kv_events_config)
    prefixes = keep_prefixes(llm, options.store, options.store_size)
    service = Service(llm, options.queue, prefixes)
    gc.freeze()  # what was loaded lives as long as the process

    async def serve() -> bool:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        host = Host(service, bundle, EngineMetrics(MODEL), classes, options.special_tokens_in_content)
        return await host.serve(options.socket, stop)

    sound = asyncio.run(serve())
    service.close(0)
    return 0 if sound else 1


def main() -> None:
    """Run, and end the process without the destructors of libraries, which take time and have crashed."""
    try:
        run_alone(run)
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main()
