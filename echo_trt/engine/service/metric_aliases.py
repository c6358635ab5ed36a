"""The engine's series by names that dashboards, gateways and autoscalers know from other servers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

#: Prefixes of names: of vLLM's, and of TensorRT-LLM's Triton backend.
VLLM, TENSORRT_LLM = "vllm:", "nv_trt_llm_"
#: Own series, without echo_ -> its other names, without _total.
ALIASES = {
    "queued": 'vllm:num_requests_waiting nv_trt_llm_request_metrics{request_type="waiting"}',
    "running": "vllm:num_requests_running "
    'nv_trt_llm_request_metrics{request_type="scheduled"} nv_trt_llm_request_metrics{request_type="active"}',
    "slots": 'nv_trt_llm_request_metrics{request_type="max"}',
    "requests": "vllm:request_success",
    "preemptions": "vllm:num_preemptions",
    "kv_usage": "vllm:kv_cache_usage_perc vllm:gpu_cache_usage_perc "
    'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction"}',
    "kv_cache_info": "vllm:cache_config_info",
    "blocks": 'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max"}',
    "blocks_used": 'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used"}',
    "blocks_free": 'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free"}',
    "block_size": 'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per"}',
    "asked_tokens": "vllm:prompt_tokens vllm:prefix_cache_queries vllm:gpu_prefix_cache_queries",
    "cached_tokens": "vllm:prefix_cache_hits vllm:gpu_prefix_cache_hits",
    "emitted_tokens": "vllm:generation_tokens",
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "accepted_tokens_per_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
    "queue_seconds": "vllm:request_queue_time_seconds",
    "prefill_seconds": "vllm:request_prefill_time_seconds",
    "decode_seconds": "vllm:request_decode_time_seconds",
    "time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "inter_token_seconds": "vllm:inter_token_latency_seconds vllm:time_per_output_token_seconds",
    "request_seconds": "vllm:e2e_request_latency_seconds",
    "request_prompt_tokens": "vllm:request_prompt_tokens",
    "request_emitted_tokens": "vllm:request_generation_tokens",
}
#: Labels that all series of a prefix have beside, own labels by other names, and reasons by outcome.
FIXED = {VLLM: {"engine": "0"}, TENSORRT_LLM: {"version": "1"}}
LABELS = {VLLM: {"outcome": "finished_reason", "blocks": "num_gpu_blocks"}, TENSORRT_LLM: {"model_name": "model"}}
REASONS = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "abort", "failed": "error"}
_ALIAS = re.compile(r'([\w:]+)(?:{(\w+)="(\w+)"})?')


def aliased(own: Iterable[Metric], prefix: str) -> Iterator[Metric]:
    """Yield the ``own`` series that have other names with ``prefix``. Outcomes of one reason add up."""
    families: dict[str, Metric] = {}
    for metric in own:
        for alias in ALIASES.get(metric.name.removeprefix("echo_"), "").split():
            [(name, label, value)] = _ALIAS.findall(alias)
            if not name.startswith(prefix):
                continue
            family = families.setdefault(name, Metric(name, metric.documentation, metric.type))
            sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
            for sample in metric.samples:
                if (outcome := sample.labels.get("outcome", "stop")) not in REASONS:
                    continue
                given = sample.labels | ({"outcome": REASONS[outcome]} if "outcome" in sample.labels else {})
                labels = {LABELS[prefix].get(key, key): each for key, each in given.items()} | FIXED[prefix]
                labels |= {label: value} if label else {}
                sums[name + sample.name.removeprefix(metric.name), tuple(labels.items())] += sample.value
            for (sample_name, pairs), total in sums.items():
                family.add_sample(sample_name, dict(pairs), total)
    yield from families.values()
