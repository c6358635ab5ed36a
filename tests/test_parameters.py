"""A sampling parameter is defined once: what Triton's configuration, the docs and the command line say is compared."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from refusal import refused

from echo_trt.bundle.manifest import Sampling
from echo_trt.cli import generate
from echo_trt.runtime.params import PARAMETERS, SamplingParams
from echo_trt.serving.inputs import ALIASES, INPUTS, Tensor

ROOT = Path(__file__).parents[1]


def table(*rows: Iterable[str]) -> str:
    head, *rest = (f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)
    return "\n".join((head, "|---" * len(rows[0]) + "|", *rest)) + "\n"


def written(value: Any) -> str:
    """A default as JSON has it; nothing for one that stands for nothing."""
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
    """The fields of both endpoints that are sampling parameters: their bounds as the gateway checks them."""
    schemas = pytest.importorskip("echo_trt.gateway.schemas", reason="needs starlette: pip install -e '.[serve]'")
    kinds = [schemas.CompletionRequest, schemas.ChatRequest]
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


def test_triton_s_configuration_has_these_inputs():
    config = (ROOT / "model_repo/echo/config.pbtxt").read_text()
    [inputs] = re.findall(r"^input \[\n(.*?)^\]", config, re.MULTILINE | re.DOTALL)
    assert inputs == ",\n".join(f"  {config_line(tensor)}" for tensor in INPUTS) + "\n"


@pytest.mark.parametrize(("page", "expected"), [("triton-api", triton_table), ("openai-api", openai_table)])
def test_the_docs_have_this_table(page, expected):
    assert expected() in (ROOT / f"docs/{page}.md").read_text()


def test_the_docs_name_every_alias_of_an_input():
    page = (ROOT / "docs/triton-api.md").read_text()
    [sentence] = re.findall(r"^TensorRT-LLM's llmapi model has.*?\.\n\n", page, re.MULTILINE | re.DOTALL)
    sentence = " ".join(sentence.split())
    prefixed = sentence.partition("`sampling_param_` before ")[2]
    for alias, name in ALIASES.items():
        if alias == f"sampling_param_{name}":
            assert f"`{name}`" in prefixed
        else:
            assert f"`{alias}` for `{name}`" in sentence


def test_the_command_line_has_the_same_defaults():
    options = inspect.signature(generate).parameters
    shared = [name for name in PARAMETERS if name in options]
    assert len(shared) == 10
    for name in shared:
        own = options[name].default
        recommended = own is None and name in Sampling.model_fields  # the model's own, else the parameter's default
        assert recommended or (own or ()) == (PARAMETERS[name].default or ()), name


@pytest.mark.parametrize("name", PARAMETERS)
def test_values_at_a_bound_are_taken_and_those_beyond_refused_by_a_sentence_with_both(name):
    known = PARAMETERS[name]
    assert SamplingParams() == SamplingParams(**{name: known.default})
    with refused(name, known.rule.format(SamplingParams())):
        SamplingParams(**{name: object()})
    if known.kind in (bool, dict):
        return

    def one(number: int) -> Any:
        value = "x" * number if known.kind is str else known.kind(number)
        if isinstance(known.default, dict):
            return {5: value}
        return (value,) if isinstance(known.default, tuple) else value

    high = SamplingParams().max_tokens if name == "min_tokens" else known.high
    for number in (known.low + known.above, high):
        assert getattr(SamplingParams(**{name: one(number)}), name) == one(number)
    for number in (known.low - (not known.above), high + 1):
        if known.kind is not str or number >= 0:
            with refused(name):
                SamplingParams(**{name: one(number)})
    bounds = re.findall(r"-?\d+(?:\^\d+ - 1)?", known.values.replace(",", ""))
    assert len(bounds) == 2
    for bound in bounds[: 1 if name == "min_tokens" else 2]:
        assert bound in known.rule
