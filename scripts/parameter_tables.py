"""Write what the code says elsewhere, as tables; ``tests/test_parameters.py`` compares them.

    python scripts/parameter_tables.py

Sampling parameters (``echo_trt/engine/params.py``) are the inputs of model_repo/echo/config.pbtxt, and tables of
docs/triton-api.md, docs/openai-api.md and docs/python-api.md; families (``echo_trt/models/families``) are the table of
docs/models.md; metrics, errors of the API server and environment variables have tables, too. Sources of tokens
(``echo_trt/speculation/sources.py``) are shown on the live page and told in docs/openai-api.md.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from echo_trt.adapters.triton.inputs import ALIASES, INPUTS, Tensor
from echo_trt.backends.kind import engine_kinds
from echo_trt.engine.params import PARAMETERS, Counters
from echo_trt.engine.service.metrics import EngineMetrics, Statistics
from echo_trt.models.families import FAMILIES
from echo_trt.models.families.family import Family
from echo_trt.models.hybrid_config import RecurrentConfig
from echo_trt.server.metrics import ServerMetrics
from echo_trt.server.schemas import ChatRequest, CompletionRequest
from echo_trt.speculation.sources import DRAFT_SOURCES, TARGET

ROOT = Path(__file__).parents[1]
ALL_SOURCES = TARGET, *DRAFT_SOURCES


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
    """Return the inputs that OpenAI's API has not, or with another name or default."""
    types = {"BYTES": "string"}
    same = openai_table()
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
            and not re.search(rf"`{tensor.name}`[^|]* \| [^|]* \| {written(tensor.default)} ?\|", same)
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


def python_table() -> str:
    """Return the fields of SamplingParams that OpenAI's API has not, or with another default."""
    same = openai_table()
    rows = (
        (f"`{name}`", "" if known.default is None else f"`{known.default!r}`", known.values, known.doc)
        for name, known in PARAMETERS.items()
        if not re.search(rf"`{name}`[^|]* \| [^|]* \| {written(known.default)} ?\|", same)
    )
    return table(("field", "default", "values", ""), *rows)


def type_and_bounds(schema: dict[str, Any]) -> tuple[str, str]:
    kinds = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if any("$ref" in each for each in kinds):
        return "object", ""
    if {each["type"] for each in kinds} == {"string", "object"}:  # a name, or what it stands for
        return "string or object", ""
    schema = next(iter(kinds), schema)
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


def config_inputs() -> str:
    return ",\n".join(f"  {config_line(tensor)}" for tensor in INPUTS) + "\n"


def engines_of(family: Family) -> str:
    """Name the engines that run a family: only some keep the states of delta-net layers."""
    hybrid = issubclass(family.config, RecurrentConfig)
    fitting = [kind for kind in engine_kinds() if kind.states or not hybrid]
    return "all" if fitting == engine_kinds() else ", ".join(f"`{kind.name}`" for kind in fitting)


def models_table() -> str:
    return table(
        ("family", "models", "files", "engines", "drafts", "tools", "thinking"),
        *(
            (
                f"`{family.name}`",
                family.models,
                "safetensors, FP8" + f", GGUF (`{family.gguf}`)" * bool(family.gguf),
                engines_of(family),
                family.drafts,
                family.tools,
                family.thinking,
            )
            for family in FAMILIES.values()
        ),
    )


def metrics_list(text: str) -> str:
    """Return a line for each family of Prometheus' text; the label that all of the engine's have is left out."""
    rows = []
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created") or not family.name.startswith("echo_"):
            continue
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le", "model_name"})
        name = family.name + "_total" * (family.type == "counter") + f"{{{', '.join(labels)}}}" * bool(labels)
        rows.append(f"- `{name}`: {family.documentation.rstrip('.')}\n")
    return "".join(sorted(rows))


def measured() -> EngineMetrics:
    """Return an engine's metrics with a value for every label."""
    metrics = EngineMetrics("echo")
    metrics.refuse("refused")
    counters = Counters(reached=Counter({0: 1}), accepted=Counter({1: 1}))
    kept = {"interactive": (1, {"both": 1})}
    ended = {"stop": 1}
    metrics.flush(Statistics(0, 0, 1, 1, 0, 0, "goodput", 1, counters, {}, ended, latency=kept))
    return metrics


def engine_metrics() -> str:
    return metrics_list(generate_latest(measured().registry).decode())


def server_metrics() -> str:
    metrics = ServerMetrics()
    metrics.requests.labels("/health", "200")
    return metrics_list(metrics.text())


def raised_errors() -> Iterator[tuple[int, str, str]]:
    """(status, type, code) of the errors that the API server's code makes."""
    none = ast.Constant("")
    for path in sorted((ROOT / "echo_trt/server").glob("**/*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "ApiError":
                continue
            given = {word.arg: word.value for word in call.keywords}
            given |= dict(zip(("status", "message", "kind"), call.args, strict=False))
            status, kind, code = (given.get(name, none) for name in ("status", "kind", "code"))
            if isinstance(status, ast.Constant) and isinstance(kind, ast.Constant):
                for each in (code.body, code.orelse) if isinstance(code, ast.IfExp) else (code,):
                    assert isinstance(each, ast.Constant)
                    yield status.value, kind.value or "invalid_request_error", each.value or ""


def errors_table() -> str:
    rows = [
        (f"{status} `{code or kind}`", NOTES["errors"][f"{status} {code}".strip()])
        for status, kind, code in sorted(set(raised_errors()))
    ]
    return table(("status and `code`, else `type`", "remedy"), *rows)


def names(title: str) -> str:
    return ", ".join(f"`{name}`" for name in NOTES["variables"][title])


def variables_table(title: str) -> str:
    rows = ((f"`{name}`", *text.rsplit("; ", 1)) for name, text in NOTES["variables"][title].items())
    return table(("variable", "sets", "default"), *((*row, "")[:3] for row in rows))


def page_sources() -> str:
    fields = ("name", "label", "about")
    rows = (", ".join(f"{field}: {json.dumps(getattr(source, field))}" for field in fields) for source in ALL_SOURCES)
    return "".join(f"  {{ {row} }},\n" for row in rows)


def page_colours(theme: int, indent: str) -> str:
    return "".join(f"{indent}--{source.name}: {source.texts[theme]};\n" for source in DRAFT_SOURCES)


def page_lines() -> str:
    thick = {each.name: f" border-bottom-width: {each.thickness}px;" * bool(each.thickness) for each in DRAFT_SOURCES}
    return "".join(
        f".s-{each.name} {{ --ink: var(--{each.name}); border-bottom-style: {each.line};{thick[each.name]} }}\n"
        for each in DRAFT_SOURCES
    )


def sources_table() -> str:
    return table(("`source`", "proposer of the token"), *((f"`{each.name}`", each.about) for each in ALL_SOURCES))


def source_numbers() -> str:
    return ", ".join(f"{number} {source.name}" for number, source in enumerate(DRAFT_SOURCES))


def section(title: str) -> str:
    """Return the pattern of the table below a heading."""
    return rf"(^## {re.escape(title)}\n(?:(?!\n##|\n\|).)*\n)\|(?:[^\n]*\n\|)*[^\n]*\n()"


def lines(title: str) -> str:
    """Return the pattern of the list below a heading."""
    return section(title).replace(r"\|", "- ")


#: Sentences about errors and environment variables, which the code alone does not say.
NOTES = yaml.safe_load((ROOT / "scripts/reference_notes.yaml").read_text())
#: Variables that are listed without a sentence each -> the sentence that they stand in.
NAMED = {
    "Options of serve": "Those that set the option of `serve` with the same name; a switch takes `true`",
    "Dynamo's own": "Set, too, in their own meaning",
}
#: File -> what its text lies between (a group each before and behind), and who writes it.
WRITTEN: dict[str, list[tuple[str, Callable[[], str]]]] = {
    "model_repo/echo/config.pbtxt": [(r"(^input \[\n)(?:.*?\n)(\]$)", config_inputs)],
    "docs/triton-api.md": [(r"(^)\| input \|(?:[^\n]*\n\|)*[^\n]*\n()", triton_table)],
    "docs/models.md": [(r"(^)\| family \|(?:[^\n]*\n\|)*[^\n]*\n()", models_table)],
    "docs/python-api.md": [(section("Sampling parameters"), python_table)],
    "docs/metrics.md": [
        (lines("The engine's"), engine_metrics),
        (lines("The API server's"), server_metrics),
    ],
    "docs/openai-api.md": [
        (r"(^)\| field \| type \|(?:[^\n]*\n\|)*[^\n]*\n()", openai_table),
        (r"(^)\| `source` \|(?:[^\n]*\n\|)*[^\n]*\n()", sources_table),
    ],
    "echo_trt/engine/service/snapshots.py": [(r"(^    source: )[^;\n]*(; 0 at the root)", source_numbers)],
    "echo_trt/server/page/dom.js": [(r"(^export const SOURCES = \[\n)(?:  \{[^\n]*\n)*(\];)", page_sources)],
    "echo_trt/server/page/style.css": [
        (r"(^)  --head: [^\n]*\n(?:  --\w+: #\w+;\n)*?(  --bar-root)", partial(page_colours, 0, "  ")),
        (r"(^)    --head: [^\n]*\n(?:    --\w+: #\w+;\n)*?(    --bar-root)", partial(page_colours, 1, "    ")),
        (r"(^)(?:\.s-(?!target)\w+ [^\n]*\n)+()", page_lines),
    ],
    "docs/troubleshooting.md": [(section("The API server's answers"), errors_table)],
    "docs/environment.md": [
        *((section(title), partial(variables_table, title)) for title in NOTES["variables"] if title not in NAMED),
        *((rf"(^{re.escape(sentence)}: )[^.]*(\.)", partial(names, title)) for title, sentence in NAMED.items()),
    ],
}


def rewritten(name: str) -> str:
    """Return the text of a file as it should be."""
    text = (ROOT / name).read_text()
    for pattern, write in WRITTEN[name]:
        found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
        assert found, f"{name} has no place for {pattern}"
        text = text[: found.end(1)] + write() + text[found.start(2) :]
    return text


if __name__ == "__main__":
    for name in WRITTEN:
        (ROOT / name).write_text(rewritten(name))
