"""What a request of Dynamo's frontend asks: a prompt, sampling parameters, priority and deadline."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from echo_trt.adapters.dynamo.answers import DynamoAnswer
from echo_trt.adapters.dynamo.migration import Boundary, boundary_of, migrated
from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.params import SINGLE, SamplingParams
from echo_trt.engine.request import FIRST, Request
from echo_trt.engine.service.job import Job
from echo_trt.errors import UserError, shown

#: Key of a request's metadata, which a client sends as the header x-dynamo-meta-deadline-ms.
DEADLINE = "deadline-ms"
LATENCY = "latency"  # of its targets, JSON or a class's name
HEALTH_CHECK = "_HEALTH_CHECK"  # Dynamo's mark of a probe
INT32, INT63 = 2**31 - 1, 2**63
#: Fields that Dynamo's frontend understands and this engine does not: field -> what it is.
REFUSED = {
    "multi_modal_data": "images, audio and video",
    "multi_modal_uuids": "images, audio and video",
    "mm_processor_kwargs": "images, audio and video",
    "mm_routing_info": "images, audio and video",
    "encoder_result": "images, audio and video",
    "prompt_embeds": "a prompt of embeddings",
    "prefill_result": "prefill on another worker",
    "bootstrap_info": "prefill on another worker",
}
REFUSED_IN = {
    "sampling_options": ("use_beam_search", "length_penalty", "include_stop_str_in_output"),
    "routing": ("lora_name", "cache_salt"),
}
#: Sampling options that are parameters by the same name.
NUMBERS = tuple(name for name, known in SINGLE.items() if known.kind is float or known.changes == "limits")
KINDS = ("json", "regex", "choice", "grammar")


def read(
    request: Mapping[str, Any],
    metadata: Mapping[str, str],
    recommended: Mapping[str, float],
    eos: Sequence[int],
    classes: LatencyClasses | None = None,
) -> DynamoAnswer:
    """Read a request as Dynamo's ``GenerateRequest`` has it.

    metadata     what came in headers x-dynamo-meta-*
    recommended  sampling parameters of requests that leave them out (``Manifest.sampling``)
    eos          the model's own end tokens, which the frontend sends along as stop tokens
    classes      of latency targets
    Raises UserError for what this engine cannot do.
    """
    _refuse_unknown(request)
    tokens, boundary = list(request["token_ids"]), boundary_of(request)
    requested, stops, wanted = (
        request.get(key) or {} for key in ("sampling_options", "stop_conditions", "output_options")
    )
    for name in ("n", "best_of"):
        if (requested.get(name) or 1) != 1:  # a backend's stream ends with its first choice that is finished
            raise UserError(
                f"{name} is {requested[name]}, but Dynamo reads one choice of a backend; send more requests."
            )
    length = boundary.prompt_tokens if boundary else len(tokens)
    prompt, prior_tokens = tokens[:length], tokens[length:]
    given: dict[str, Any] = dict(recommended)
    given |= {name: _written(value) for name in NUMBERS if (value := requested.get(name)) is not None}
    given.setdefault("temperature", 1.0)  # OpenAI's own default
    lost = [name for name in ("presence_penalty", "frequency_penalty") if given.get(name)]
    lost += ["thinking_token_budget"] if stops.get("max_thinking_tokens") is not None else []
    if lost and migrated(request) and not boundary:  # all of these count from where the answer begins
        raise UserError(
            f"{lost[0]} is given, and where the answer begins was lost with its worker because Dynamo traces requests; "
            "send the request again."
        )
    seed, limit = boundary.seed if boundary else requested.get("seed"), stops.get("max_tokens")
    first = secrets.randbits(63) if seed is None else seed % INT63
    params = SamplingParams(
        # The frontend has taken off what was said; what the engine counts from the beginning includes it.
        max_tokens=INT32 if limit is None else min(len(prior_tokens) + limit, INT32),
        min_tokens=len(prior_tokens) + (stops.get("min_tokens") or 0) if stops.get("min_tokens") else 0,
        stop=tuple(stops.get("stop") or ()),
        stop_token_ids=_stop_tokens(stops, eos),
        ignore_eos=bool(stops.get("ignore_eos")),
        seed=first,
        logprobs=wanted.get("logprobs"),
        prompt_logprobs=wanted.get("prompt_logprobs"),
        structured=_structured(requested.get("guided_decoding")),
        latency=(classes or LatencyClasses()).read(metadata.get(LATENCY, "")),
        thinking_token_budget=stops.get("max_thinking_tokens"),
        **given,
    )
    urgency = int((request.get("routing") or {}).get("priority") or 0)  # higher where Dynamo serves it first
    priority = FIRST if request.get(HEALTH_CHECK) else -max(min(urgency, INT32), -INT32)
    ours = Request(-1, np.asarray(prompt, np.int64), params, prior_tokens, priority=priority)
    job = Job(ours, seconds=_seconds(metadata.get(DEADLINE)))
    return DynamoAnswer(job=job, boundary=Boundary(length, first))


def _refuse_unknown(request: Mapping[str, Any]) -> None:
    for name, what in REFUSED.items():
        if request.get(name):
            raise UserError(f"{name} is given, but this engine has no {what}; send text alone.")
    for group, names in REFUSED_IN.items():
        for name in names:
            if (request.get(group) or {}).get(name):
                raise UserError(f"{name} is not supported by this engine; leave it out.")


def _written(value: float) -> float:
    """Return the number that a client wrote: it has been a float32 on its way here."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _stop_tokens(stops: Mapping[str, Any], eos: Sequence[int]) -> tuple[int, ...]:
    keys = ("stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden")
    given = (token for key in keys for token in stops.get(key) or ())
    return tuple(dict.fromkeys(token for token in given if token not in eos))


def _structured(guided: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the answer must fit, as the engine has it."""
    requested = {name: value for name, value in (guided or {}).items() if value is not None and name != "backend"}
    if not requested:
        return None
    unknown = next((name for name in requested if name not in KINDS), None)
    if unknown or len(requested) > 1:
        what = unknown or " and ".join(requested)
        raise UserError(f"guided_decoding has {what}; give one of {', '.join(KINDS)}.")
    [(kind, value)] = requested.items()
    if kind == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError("guided_json is not JSON; give a schema.") from None
    return {kind: value}


def _seconds(deadline: str | None) -> float | None:
    if deadline is None:
        return None
    if not (deadline.isascii() and deadline.isdigit() and 1 <= int(deadline) <= INT32):
        raise UserError(
            f"the header x-dynamo-meta-{DEADLINE} is {shown(deadline)}; give whole milliseconds from 1 to {INT32}."
        )
    return int(deadline) / 1000
