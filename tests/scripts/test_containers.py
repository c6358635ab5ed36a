"""The battery of containers: its steps and what they take of docker/; the steps themselves are run by hand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
STEPS = runpy.run_path(str(PROJECT / "scripts/proofs/containers"))["STEPS"]

from containers_parts import images, run, steps  # noqa: E402  the script has made them known


def test_every_step_can_be_called_and_every_proxy_has_one():
    assert all(callable(step) for step in STEPS.values())
    assert {name.removeprefix("behind ") for name in STEPS if name.startswith("behind ")} == set(steps.PROXIES)
    assert {file for file, *_ in steps.PROXIES.values()} == {x.name for x in (PROJECT / "docker/proxies").iterdir()}


def test_stand_ins_are_those_of_images_that_are_named():
    files = ("Dockerfile.cpu", "compose.yaml", "compose.dynamo.yaml")
    named = "".join((PROJECT / "docker" / name).read_text() for name in files)
    stages = re.findall(r"AS (\w+)", (Path(images.__file__).parent / "stand_ins/Dockerfile").read_text())
    for stage, image in images.OFFICIAL.items():
        assert image in named
        assert stage in stages


def test_modules_that_are_killed_are_those_that_serve_starts():
    source = "".join(path.read_text() for path in (PROJECT / "echo_trt").rglob("*.py"))
    for module in (run.ENGINE, run.API):
        assert f'"-m", "{module}"' in source


def test_a_stream_that_is_cut_or_refused_is_missed():
    streams = run.Streams(0, 2, once=True)
    with streams:  # at port 0 nobody listens
        pass
    with pytest.raises(run.Missed, match="2 of 2 answers: status 0, ended after 0 pieces"):
        streams.check()
