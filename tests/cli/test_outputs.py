"""Files and standard output that cannot take what a command has to say."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest
from refusal import refused
from rich.console import Console

from echo_trt.cli.outputs import files_first, output_file


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_each_write_replaces_the_last_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "a.json"
    with output_file("--json", file) as write:
        write(b"first, and longer")
        write(b"second")
    assert file.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [file]


def test_two_commands_that_write_one_file_leave_each_other_alone(tmp_path, monkeypatch):
    """The other begins and ends while this one has written its content and not yet put it in its place."""
    file, replace = tmp_path / "a.json", Path.replace

    def late(partial, target):
        monkeypatch.setattr(Path, "replace", replace)
        with output_file("--json", file) as other:
            other(b"the other's")
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", late)
    with output_file("--json", file) as write:
        write(b"its own")
    assert file.read_bytes() == b"its own"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    link, file = tmp_path / "link", tmp_path / "elsewhere.json"
    link.symlink_to(file)
    for content in (b"new", b"replaced"):
        with output_file("--json", link) as write:
            write(content)
        assert link.is_symlink()
        assert file.read_bytes() == content


def test_a_pipe_stays_and_gets_the_last_of_what_is_written(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with output_file("--json", pipe) as write:
        write(b"first")
        write(b"second")
    reader.join(60)
    assert pipe.is_fifo()
    assert read == [b"second"]


@pytest.mark.parametrize("name", ["a" * 300, "file/a.json", "none/a.json"])
def test_a_place_that_cannot_be_is_refused_at_once(name, tmp_path):
    (tmp_path / "file").touch()
    words = f"--json {tmp_path / name}", "cannot be written", "folder that exists"
    with refused(*words), output_file("--json", tmp_path / name):
        raise AssertionError("the work has begun")


def test_a_disk_that_is_full_is_told_and_the_file_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_bytes(b"before")

    def fail(path, content):
        raise OSError(28, "No space left on device")

    with refused(f"--json {file}", "No space left", "has room"), output_file("--json", file) as write:
        monkeypatch.setattr(type(file), "write_bytes", fail)
        write(b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_printing_fails_after_the_work():
    out, done = Console(file=Full()), []

    def work() -> None:
        with files_first(out):
            out.print("one")
            out.print("two")
            done.append("the files")

    with pytest.raises(OSError, match="No space left"):
        work()
    assert done == ["the files"]


def test_a_file_that_the_command_reads_is_not_overwritten(tmp_path):
    file, link = tmp_path / "prompts.jsonl", tmp_path / "link"
    file.write_bytes(b"mine")
    link.symlink_to(file)
    for index in (file, link, tmp_path / "." / "prompts.jsonl"):
        with refused(f"--json {index}", "reads", "another file"), output_file("--json", index, [None, file]):
            raise AssertionError("the work has begun")
    assert file.read_bytes() == b"mine"
    with output_file("--json", tmp_path / "answers.json", [file]) as write:
        write(b"new")
