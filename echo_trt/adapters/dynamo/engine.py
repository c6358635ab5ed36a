"""The engine that Dynamo's worker drives: tokens in, tokens out, by the service that answers behind Triton, too.

This module imports Dynamo, so it is imported once the command knows that it is there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.common.backend.metrics import register_engine_registry
from dynamo.common.backend.publisher import ComponentSnapshot, PushSource
from dynamo.llm import FpmDirectPublisher
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument, Unknown

from echo_trt.adapters.dynamo.answers import DynamoAnswer
from echo_trt.adapters.dynamo.discovery import Lease
from echo_trt.adapters.dynamo.events import BlockEvents
from echo_trt.adapters.dynamo.options import WorkerOptions
from echo_trt.adapters.dynamo.request import read
from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.llm import LLM
from echo_trt.engine.service.job import Overloaded
from echo_trt.engine.service.metrics import EngineMetrics, Statistics
from echo_trt.engine.service.service import Service
from echo_trt.engine.stored_prefixes import keep_prefixes
from echo_trt.engine.text.stream import AnswerText
from echo_trt.errors import UserError
from echo_trt.models.token_texts import TokenTexts
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt.speculation.pack import BLOCK

log = logging.getLogger(__name__)
BEAT = 0.25  # seconds between two updates of metrics; larger: the router knows a worker's load later
TELLING = 5.0  # seconds for answers that are handed on to say so; larger: a reader that hangs holds up the end longer


class EchoEngine(LLMEngine):  # type: ignore[misc, unused-ignore]
    """A bundle's engine.

    failure  the user's mistake for which it could not start; None: there is none
    died     whether the engine's thread has ended while the worker served
    """

    def __init__(self, job: WorkerOptions, lease: Lease | None = None):
        """``lease`` keeps the worker's discovery entries; None: Dynamo's backend keeps them."""
        self._job, self._lease = job, lease
        self._service: Service | None = None
        self._open: dict[DynamoAnswer, Any] = {}  # with their contexts
        self._snapshots: Any = None
        self._passes: Any = None
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None
        self._closing = False
        self.failure: UserError | None = None
        self.died = False
        self.metrics = EngineMetrics(job.name)

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any:
        """Refuse Dynamo's own way to make an engine, which wants one: ``command.run`` has read the options."""
        raise TypeError(f"{cls.__name__} is made by echo-trt worker.")

    # -- Dynamo's lifecycle ----------------------------------------------------------------------------------------

    async def start(self, worker_id: int) -> EngineConfig:
        self._worker_id = worker_id
        if self._lease:
            self._lease.keep(worker_id)
        try:
            await asyncio.to_thread(self._load)
        except UserError as mistake:
            self.failure = mistake
            raise
        assert self._service
        state, loop = self._service.loop.batch, self._service.loop
        self._beats = threading.Thread(target=self._beat, name="beats", daemon=True)
        self._beats.start()
        return EngineConfig(
            model=str(self._job.bundle),
            served_model_name=self._job.name,
            llm=LlmRegistration(
                context_length=state.context,
                kv_cache_block_size=BLOCK,
                total_kv_blocks=state.blocks.count,
                max_num_seqs=state.count,
                max_num_batched_tokens=loop.chunk,
                enable_eagle=True,
            ),
        )

    def _load(self) -> None:
        job = self._job
        llm = LLM(
            job.bundle,
            job.policy,
            job.batch,
            note=log.info,
            kv_cache_memory=job.kv_cache_memory,
            costs=job.costs,
            learn_answers=job.learn_answers,
        )
        log.info(llm.pool.sentence)
        self._tokenizer = load_tokenizer(job.bundle)  # the engine's thread uses another
        self._texts, self._recommended = TokenTexts(self._tokenizer), llm.manifest.sampling.given()
        self._classes = LatencyClasses(job.latency_classes)
        prefixes = keep_prefixes(llm, job.store, job.store_size)
        self._service = Service(llm, job.queue, prefixes)

    async def on_endpoint_ready(self, endpoint: Any) -> None:
        self._passes = FpmDirectPublisher(endpoint, str(self._worker_id))

    async def kv_event_sources(self) -> list[PushSource]:
        assert self._service
        cache = self._service.loop.batch.blocks.cache
        return [PushSource(on_ready=self._publish_to)] if cache.enabled else []

    def _publish_to(self, publisher: Any) -> None:
        assert self._service
        self._service.loop.batch.blocks.cache.listener = BlockEvents(publisher)

    def component_metrics_dp_ranks(self) -> list[int]:
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        self._snapshots = publisher

    async def register_prometheus(self, metrics: Any) -> None:
        register_engine_registry(metrics, self.metrics.registry)

    async def health_check_payload(self) -> dict[str, Any]:
        """Return a probe: one token, before all others in the queue."""
        payload: dict[str, Any] = build_health_check_payload(bos_token_id=0)
        return payload

    async def cleanup(self) -> None:
        """Let requests in flight finish for ``drain_seconds``; other workers go on with the rest."""
        self._closing = True
        if self._lease:
            self._lease.close()
        service, self._service = self._service, None
        self._stop.set()
        if self._beats:
            await asyncio.to_thread(self._beats.join)
        if service:
            await asyncio.to_thread(service.close, self._job.drain_seconds)
            await self._handed_on()
            service.loop.batch.blocks.cache.listener = None
        if self._passes:
            self._passes.shutdown()
            self._passes = None

    async def _handed_on(self) -> None:
        """Wait until the answers that were cut off have told so: Dynamo's runtime, which ends next, would end them."""
        end = time.monotonic() + TELLING
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.05)

    # -- requests --------------------------------------------------------------------------------------------------

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        service, arrived = self._service, time.monotonic()
        if service is None:
            raise EngineShutdown("the worker is shutting down; send the request to another one.")
        with self._refusals():
            eos, metadata = service.loop.scheduler.eos, dict(context.metadata.items())
            answer = read(request, metadata, self._recommended, eos, self._classes)
            ours = answer.job.request
            if ours.params.stop:
                answer.text = AnswerText(self._tokenizer.backend_tokenizer, ours.params, ours.generated)
        self._open[answer] = context
        answer.arrived = arrived
        try:
            with self._refusals():
                answer.submit(service)
            async for chunk, event in answer.chunks(self._texts):
                answer.observe(event, self.metrics)
                if event.reason == "invalid":
                    raise InvalidArgument(event.message)
                if event.reason == "failed":
                    raise Unknown(event.message) if service.alive else EngineShutdown(event.message)
                if event.reason == "cancelled" and self._closing:
                    chunk.pop("finish_reason")
                    chunk.pop("completion_usage", None)
                    if chunk["token_ids"]:
                        yield chunk
                    raise EngineShutdown("the worker is shutting down; another one goes on.")
                yield chunk
        finally:
            del self._open[answer]
            answer.cancel()  # nothing happens where it has ended

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raise as Dynamo has it: InvalidArgument is the client's mistake, EngineShutdown another worker's turn."""
        try:
            yield
        except UserError as mistake:
            self.metrics.refuse("invalid")
            raise InvalidArgument(str(mistake)) from None
        except Overloaded as full:
            self.metrics.refuse("refused")
            raise EngineShutdown(str(full)) from None

    async def abort(self, context: Any) -> None:
        for answer, theirs in list(self._open.items()):
            if theirs.id() == context.id() and (theirs.is_stopped() or theirs.is_killed()):
                answer.cancel()

    # -- the thread of metrics -------------------------------------------------------------------------------------

    def _beat(self) -> None:
        before: Statistics | None = None
        complained = False
        while not self._stop.wait(BEAT):
            service = self._service
            if service is None:
                return
            try:
                now = service.statistics()
                self.metrics.flush(now)
                with suppress(RuntimeError):  # a runtime that is shutting down takes nothing
                    self._publish(service, now, before or now)
                before = now
            except Exception:  # the engine is watched all the same
                if not complained:
                    log.exception("the worker's metrics could not be told")
                complained = True
            if not service.alive:
                self.died = True
                self._job.stop()
                return

    def _publish(self, service: Service, now: Statistics, before: Statistics) -> None:
        """Tell the router the worker's load, and the planner its forward passes since ``before``."""
        counters, old, state = now.counters, before.counters, service.loop.batch
        if self._snapshots:
            requested = counters.asked_tokens
            self._snapshots.publish(
                0,
                ComponentSnapshot(
                    kv_used_blocks=now.blocks_used,
                    kv_total_blocks=now.blocks,
                    gpu_cache_usage=now.kv_usage,
                    kv_cache_hit_rate=counters.cached_tokens / requested if requested else None,
                    dp_rank=0,
                ),
            )
        passes = counters.iterations - old.iterations
        if self._passes and passes:
            decoding = state.active & (state.length - state.committed == 1)
            prefilling = state.active & ~decoding
            seconds = sum(counters.seconds.values()) - sum(old.seconds.values())
            self._passes.publish(
                dp_rank=0,
                scheduled_num_prefill_requests=int(prefilling.sum()),
                scheduled_sum_prefill_tokens=(counters.prompt_tokens - old.prompt_tokens) // passes,
                scheduled_sum_prefill_kv_tokens=int(state.committed[prefilling].sum()),
                scheduled_num_decode_requests=int(decoding.sum()),
                scheduled_sum_decode_kv_tokens=int(state.length[decoding].sum()),
                queued_num_prefill_requests=now.queued,
                queued_sum_prefill_tokens=now.queued_tokens,
                queued_num_decode_requests=0,
                queued_sum_decode_kv_tokens=0,
                wall_time_secs=seconds / passes,
            )
