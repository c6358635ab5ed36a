"""The log's form: one line per line, whatever is in it; the same as text and as JSON; and lines of other programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from echo_trt.files.log import line, read, written

BEGINS = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR|CRITICAL) [a-z]+: "
HOSTILE = 'a\n2026-01-01T00:00:00.000Z ERROR serve: forged\r\x1b[2J\u2028" status=200 é'


def test_a_line_as_text_and_as_json():
    made = line("INFO", "server", "request finished", 0.25, request_id="a b", status=200, key=None, error="")
    assert written(made, "text") == '1970-01-01T00:00:00.250Z INFO server: request finished request_id="a b" status=200'
    assert json.loads(written(made, "json")) == made
    assert made == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "INFO",
        "process": "server",
        "message": "request finished",
        "request_id": "a b",
        "status": 200,
    }


def test_nothing_begins_a_line_of_its_own():
    made = line("ERROR", "server", HOSTILE, path=HOSTILE, user_agent=HOSTILE)
    text = written(made, "text")
    assert text.isprintable()
    assert "é" in text
    assert text.count(" status=200") == text.count('\\" status=200') + 1  # the message itself is no field
    assert len(written(made, "json").splitlines()) == 1
    assert json.loads(written(made, "json")) == made


def test_a_traceback_is_lines_with_the_same_beginning():
    made = line("ERROR", "engine", "it failed", request_id="1", traceback="Traceback:\n  File\nValueError: x")
    first, *rest = written(made, "text").splitlines()
    assert first.endswith(" ERROR engine: it failed request_id=1")
    assert [each.partition(" ERROR engine: ")[2] for each in rest] == ["Traceback:", "  File", "ValueError: x"]


@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        ("a word", "INFO", "a word"),
        ("error: no such bundle.", "ERROR", "no such bundle."),
        ('{"time": "2026', "INFO", '{"time": "2026'),
        ('{"time": 1}', "INFO", ""),
    ],
)
def test_lines_of_other_programs_get_time_and_level(text, level, message):
    found = read(text, "another")
    assert (found["level"], found["process"], found["message"]) == (level, "another", message)
    assert written(found, "text")


def test_a_line_of_our_own_stays_as_it_is():
    made = line("WARNING", "engine", "careful", request_id="a")
    assert read(written(made, "json"), "another") == made


PROGRAM = """
import logging, threading, warnings
from echo_trt.files.log import REQUEST_ID, configure
configure("engine", {form!r})
REQUEST_ID.set("of this task")
logging.getLogger("a").info("one\\ntwo %s", "three")
logging.info("of another", extra={{"request_id": "other", "fields": {{"status": 200}}}})
warnings.warn("mind this")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("the end")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_all_that_a_process_says_has_the_form(form):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(form=form)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    if form == "text":
        assert all(re.match(BEGINS, each) for each in done.stderr.splitlines()), done.stderr
        assert "INFO engine: one\\ntwo three request_id=" in done.stderr
        return
    lines = [json.loads(each) for each in done.stderr.splitlines()]
    assert [each["level"] for each in lines] == ["INFO", "INFO", "WARNING", "CRITICAL", "CRITICAL"]
    assert [each.get("request_id") for each in lines][:2] == ["of this task", "other"]
    assert lines[1]["status"] == 200
    assert lines[3]["message"] == "ended by ZeroDivisionError: division by zero"
    assert lines[4]["traceback"].startswith("Traceback")
