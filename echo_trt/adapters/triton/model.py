"""The model that Triton's Python backend runs: it reads requests and hands them to the service.

Requests are answered on other threads (``replies``), so ``execute`` returns at once and Triton's queue stays empty; the
service has the queue. Beside Triton's API it hosts the same socket as an engine process (``engine.process.host``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from echo_trt.adapters.triton.inputs import INPUTS
from echo_trt.adapters.triton.replies import FINAL, Replies, failed
from echo_trt.adapters.triton.request import Reader
from echo_trt.engine.host_memory import bytes_in
from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.llm import LLM
from echo_trt.engine.process.host import Host
from echo_trt.engine.process.pending import refusal
from echo_trt.engine.service.kv_events import publish_kv_events
from echo_trt.engine.service.metrics import EngineMetrics
from echo_trt.engine.service.service import Service
from echo_trt.engine.stored_prefixes import keep_prefixes
from echo_trt.engine.text.prompts import PromptReader
from echo_trt.errors import UserError
from echo_trt.files.log import configure
from echo_trt.speculation.policies import load_policies

log = logging.getLogger(__name__)

QUEUE = 256
_MANY = {tensor.name for tensor in INPUTS if tensor.many}


class TritonPythonModel:
    """What Triton calls: initialize once, execute for each batch of requests, finalize at the end."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle; under the policy goodput, costs that are not known yet are measured here."""
        config = json.loads(args["model_config"])
        configure("engine", _setting(config, "log_format") or "text")
        self._inputs = [each["name"] for each in config["input"]]
        bundle = Path(_setting(config, "bundle"))
        if not bundle.name:
            raise UserError("no bundle is named; set ECHO_TRT_BUNDLE, or the parameter bundle in config.pbtxt.")
        batch, queue = _whole(config, "batch"), _whole(config, "queue")
        memory, costs = _setting(config, "kv_cache_memory"), _setting(config, "costs")
        if file := _setting(config, "policy_file"):
            load_policies(Path(file))
        llm = LLM(
            bundle,
            _setting(config, "policy") or None,
            batch,
            note=pb_utils.Logger.log_info,
            prefix_cache=False if _truth(config, "no_prefix_cache") else None,
            kv_cache_memory=bytes_in("kv_cache_memory", memory) if memory else None,
            costs=Path(costs) if costs else None,
            learn_answers=_truth(config, "learn_answers"),
        )
        (log.warning if llm.pool.warning else log.info)(llm.pool.warning or llm.pool.sentence)
        classes = LatencyClasses(_setting(config, "latency_classes"))
        special = _truth(config, "special_tokens_in_content")
        prompts = PromptReader(bundle, llm.loop.batch.context, special)
        self._reader = Reader(prompts, llm.manifest.sampling.given(), classes)
        publish_kv_events(llm.loop.batch.blocks.cache, _setting(config, "kv_events_config"))
        store = _setting(config, "store")
        prefixes = keep_prefixes(llm, Path(store) if store else None, _setting(config, "store_size"))
        self._service = Service(llm, queue or QUEUE, prefixes)
        signals = os.environ.get("ECHO_TRT_SIGNALS")
        name, self._metrics = args["model_name"], EngineMetrics(args["model_name"])
        self._replies = Replies(self._service, self._metrics, name, Path(signals) if signals else None)
        if socket := os.environ.get("ECHO_TRT_SOCKET"):
            host = Host(self._service, bundle, self._metrics, classes, special)
            serve = host.serve(Path(socket), asyncio.Event())  # it ends with the service
            threading.Thread(target=asyncio.run, args=(serve,), name="host", daemon=True).start()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Hand the requests on; their answers come from other threads, in any number of responses."""
        for request in requests:
            self._take(request)

    def finalize(self) -> None:
        """Triton calls this once no request is open."""
        self._service.close(0)
        self._replies.close()

    def _take(self, request: pb_utils.InferenceRequest) -> None:
        arrived, sender, coded = time.monotonic(), request.get_response_sender(), _wants_codes(request)

        def queue() -> None:
            request_id = _checked_id(request)
            found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
            given = {name: _plain(name, tensor.as_numpy()) for name, tensor in found.items() if tensor is not None}
            reply = self._reader.read(given)
            reply.arrived, reply.sender, reply.coded, reply.job.request_id = arrived, sender, coded, request_id
            reply.job.on_event = lambda event: self._replies.put(reply, event)
            self._service.submit(reply.job)
            self._replies.put(reply, None)

        if failure := refusal(self._metrics, queue):
            sender.send(failed(failure, coded), flags=FINAL)


def _checked_id(request: pb_utils.InferenceRequest) -> str:
    """Return the client's id. Raises UserError for one that is no text."""
    try:
        return str(request.request_id())
    except UnicodeDecodeError as error:
        raise UserError(f"id is not UTF-8 (byte {error.start}); send text in UTF-8.") from None


def _plain(name: str, tensor: np.ndarray) -> Any:
    """Return an input [1, n]: a number, bool or text, or a list of them. Raises UserError."""
    values = [_value(each, name) for each in tensor.reshape(-1)]
    if name in _MANY:
        return values
    if len(values) != 1:
        raise UserError(f"{name} has {len(values)} values; give one.")
    return values[0]


def _value(each: Any, name: str) -> Any:
    if isinstance(each, np.floating):
        return float(str(each))  # the number that was written: 0.7, not 0.699999988
    try:
        return each.decode("utf-8") if isinstance(each, bytes) else each.item()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); send text in UTF-8.") from None


def _wants_codes(request: pb_utils.InferenceRequest) -> bool:
    """Fields that are no tensors come as parameters, so those may hold anything."""
    try:
        parameters = json.loads(request.parameters() or "{}")
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or a nest of lists
        return False
    return bool(parameters.get("error_codes", False))


def _setting(config: dict, name: str) -> str:
    """Return the configuration's parameter, or else the environment's ECHO_TRT_<NAME>."""
    given = config.get("parameters", {}).get(name, {}).get("string_value", "")
    return given or os.environ.get(f"ECHO_TRT_{name.upper()}", "")


def _whole(config: dict, name: str) -> int | None:
    text = _setting(config, name)
    try:
        number = int(text or 1)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{name} is {text!r}; give a whole number of 1 or more.")
    return number if text else None


def _truth(config: dict, name: str) -> bool:
    text = _setting(config, name)
    if text.lower() not in ("", "true", "false"):
        raise UserError(f"{name} is {text!r}; give true or false.")
    return text.lower() == "true"
