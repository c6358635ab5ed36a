"""Write what the package's registries say elsewhere.

    python scripts/parameter_tables.py

Sampling parameters (``echo_trt/engine/params.py``) are the inputs of model_repo/echo/config.pbtxt, and tables of
docs/triton-api.md and docs/openai-api.md; families (``echo_trt/models/families``) are the table of docs/models.md;
metric names (``echo_trt/engine/service/metric_aliases.py``) are a table of docs/operations.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from echo_trt.engine.params import PARAMETERS, Counters
from echo_trt.engine.process.inputs import ALIASES, INPUTS, Tensor
from echo_trt.engine.service.metric_aliases import ALIASES as SERIES
from echo_trt.engine.service.metric_aliases import TENSORRT_LLM, VLLM
from echo_trt.engine.service.metrics import EngineMetrics, Statistics
from echo_trt.models.families import FAMILIES
from echo_trt.models.families.family import ENGINES
from echo_trt.server.schemas import ChatRequest, CompletionRequest

ROOT = Path(__file__).parents[1]


def table(*rows: Iterable[str]) -> str:
    head, *rest = (f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)
    return "\n".join((head, "|---" * len(rows[0]) + "|", *rest)) + "\n"


def written(value: Any) -> str:
    """Return a default as JSON has it; nothing for one that stands for nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else ""


def config_line(tensor: Tensor) -> str:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    size = -1 if tensor.many else 1
    return f'{{ name: "{tensor.name}" data_type: TYPE_{kind} dims: [ {size} ] optional: true }}'


def triton_table() -> str:
    types = {"BYTES": "string"}
    return table(
        ("input", "type", "default", "values", ""),
        *(
            (
                f"`{tensor.name}`",
                types.get(tensor.datatype, tensor.datatype.lower()) + " [n]" * tensor.many,
                written(tensor.default),
                tensor.values,
                tensor.doc,
            )
            for tensor in INPUTS
            if tensor.name not in ALIASES
        ),
    )


def openai_table() -> str:
    """Return the fields of both endpoints that are sampling parameters: their bounds as the API server checks them."""
    kinds = [CompletionRequest, ChatRequest]
    completion, chat = (kind.model_json_schema()["properties"] for kind in kinds)
    spelt = {
        "max_tokens": "`max_tokens`, `max_completion_tokens`",
        "logprobs": "`logprobs`, in chats `logprobs: true` and `top_logprobs`",
    }
    rows = []
    for name, known in PARAMETERS.items():
        if name in completion:
            schema = completion[name]
            kind, bounds = type_and_bounds(schema)
            rows.append((spelt.get(name, f"`{name}`"), kind, written(schema.get("default")), bounds, known.doc))
    for own, other in (("max_tokens", "max_completion_tokens"), ("logprobs", "top_logprobs")):
        assert type_and_bounds(chat[other]) == type_and_bounds(completion[own])
    return table(("field", "type", "default", "values", ""), *rows)


def type_and_bounds(schema: dict[str, Any]) -> tuple[str, str]:
    schema = next((each for each in schema.get("anyOf", ()) if each["type"] != "null"), schema)
    if schema["type"] == "array":
        kind, bounds = type_and_bounds(schema["items"])
        return f"list of {kind}s", bounds
    if schema["type"] == "object":
        kind, bounds = type_and_bounds(schema["additionalProperties"])
        return f"{kind} by token id", bounds
    powers = {2**31 - 1: "2^31 - 1", 2**63 - 1: "2^63 - 1", -(2**63): "-2^63"}
    low, high = (
        next((powers.get(schema[key], f"{schema[key]:,}") for key in keys if key in schema), "")
        for keys in (("minimum", "minLength", "exclusiveMinimum"), ("maximum", "maxLength"))
    )
    if "exclusiveMinimum" in schema:
        return schema["type"], f"above {low}, up to {high}"
    return schema["type"], f"{low} to {high}{' characters' * (schema['type'] == 'string')}" if high else ""


def metrics_table() -> str:
    """Return the series that have names of other servers, with those names."""
    metrics = EngineMetrics("echo")
    metrics.flush(Statistics(0, 0, 1, 1, 0, 0, "echo", 1, Counters(accepted=Counter({1: 1})), {}, {"stop": 1}))  # type: ignore
    rows = []
    for metric in metrics.collect():
        if theirs := SERIES.get(metric.name.removeprefix("echo_"), "").split():
            total = "_total" * (metric.type == "counter")
            names = [
                [f"`{each}{total}`" for each in theirs if each.startswith(start)] for start in (VLLM, TENSORRT_LLM)
            ]
            rows.append((f"`{metric.name}{total}`", *map(", ".join, names)))
    return table(("series", "vLLM's name", "name on Triton's port"), *rows)


def config_inputs() -> str:
    return ",\n".join(f"  {config_line(tensor)}" for tensor in INPUTS) + "\n"


def models_table() -> str:
    return table(
        ("family", "models", "files", "engines", "drafts", "tools", "thinking", "compared with"),
        *(
            (
                f"`{family.name}`",
                family.models,
                "safetensors, FP8" + f", GGUF (`{family.gguf}`)" * bool(family.gguf),
                "all" if family.engines == ENGINES else ", ".join(f"`{name}`" for name in family.engines),
                family.drafts,
                family.tools,
                family.thinking,
                f"`{family.architecture}`",
            )
            for family in FAMILIES.values()
        ),
    )


#: File -> what its text lies between (a group each before and behind), and who writes it.
WRITTEN = {
    "model_repo/echo/config.pbtxt": (r"(^input \[\n)(?:.*?\n)(\]$)", config_inputs),
    "docs/triton-api.md": (r"(^)\| input \|(?:[^\n]*\n\|)*[^\n]*\n()", triton_table),
    "docs/operations.md": (r"(^)\| series \|(?:[^\n]*\n\|)*[^\n]*\n()", metrics_table),
    "docs/openai-api.md": (r"(^)\| field \| type \|(?:[^\n]*\n\|)*[^\n]*\n()", openai_table),
    "docs/models.md": (r"(^)\| family \|(?:[^\n]*\n\|)*[^\n]*\n()", models_table),
}


def rewritten(name: str) -> str:
    """Return the text of a file as it should be."""
    pattern, write = WRITTEN[name]
    found = re.search(pattern, text := (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    return text[: found.end(1)] + write() + text[found.start(2) :]


if __name__ == "__main__":
    for name in WRITTEN:
        (ROOT / name).write_text(rewritten(name))
