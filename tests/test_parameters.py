"""What the docs say of the code is compared with it: sampling parameters, metrics, errors and environment variables."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from refusal import refused

from echo_trt.adapters.triton.inputs import ALIASES
from echo_trt.bundle.recipe import Sampling
from echo_trt.engine.params import PARAMETERS, SamplingParams

ROOT = Path(__file__).parents[1]
REFERENCE = runpy.run_path(str(ROOT / "scripts/reference.py"))
TABLES = runpy.run_path(str(ROOT / "scripts/parameter_tables.py"))


@pytest.mark.parametrize("name", TABLES["WRITTEN"])
def test_what_is_written_elsewhere_is_the_table_s(name):
    assert TABLES["rewritten"](name) == (ROOT / name).read_text(), "run python scripts/parameter_tables.py"


@pytest.mark.parametrize("name", REFERENCE["PAGES"])
def test_the_reference_is_the_code_s(name):
    assert REFERENCE["written"](name) == (ROOT / name).read_text(), "run python scripts/reference.py"


def test_the_docs_name_every_variable_that_the_package_reads():
    """By a method of ``os.environ`` or of a mapping so named, or as a constant; the value may be the package's own."""
    read = set()
    for path in [*ROOT.glob("echo_trt/**/*.py"), *ROOT.glob("lab/**/*.py")]:
        text = path.read_text()
        read |= set(re.findall(r"environ(?:\.get\(|\.pop\(|\.setdefault\(|\[)\"(\w+)\"", text))
        read |= set(re.findall(r"\b(?:ECHO_TRT|DYN|HF|CUDA_VISIBLE)_[A-Z_]*[A-Z]\b", text))
    model = (ROOT / "echo_trt/adapters/triton/model.py").read_text()
    read |= {f"ECHO_TRT_{name.upper()}" for name in re.findall(r"_(?:setting|whole|truth)\(config, \"(\w+)\"", model)}
    assert read - {"HF_HUB_CACHE"} == read & {name for names in TABLES["NOTES"]["variables"].values() for name in names}


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


def test_what_a_checkpoint_may_recommend_is_said_once():
    assert set(Sampling.model_fields) == {name for name, known in PARAMETERS.items() if known.recommended}


@pytest.mark.parametrize("name", PARAMETERS)
def test_values_at_a_bound_are_taken_and_those_beyond_refused_by_a_sentence_with_both(name):
    known = PARAMETERS[name]
    assert SamplingParams() == SamplingParams(**{name: known.default})
    with refused(name, known.remedy.format(SamplingParams())):
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
        assert bound in known.remedy
