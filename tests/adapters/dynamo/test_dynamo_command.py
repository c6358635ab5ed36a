"""What is wrong with a worker's start is told in one sentence, and ends it with exit code 2."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from engine.service.served import free_ports
from refusal import refused

from echo_trt.adapters.dynamo import environment, replicas
from echo_trt.adapters.dynamo.command import run
from echo_trt.adapters.dynamo.options import WorkerOptions
from echo_trt.cli.app import app
from echo_trt.supervision.options import ServeOptions


@pytest.fixture(autouse=True)
def discovery(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    return tmp_path / "discovery"


@pytest.fixture
def bundle(bundle_of) -> Path:
    return bundle_of("lookup")


def test_build_writes_the_card_s_files(bundle):
    config = json.loads((bundle / "config.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert config["architectures"]
    assert config["model_type"]
    assert config["eos_token_id"] == manifest["eos_token_ids"]
    assert config["max_position_embeddings"] == manifest["recipe"]["limits"]["context"]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= manifest["files"].keys()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_bundle_without_the_frontend_s_files_is_refused(bundle, tmp_path, name):
    part = shutil.copytree(bundle, tmp_path / "part")
    (part / name).unlink()
    with refused(part, name, "build the bundle again"):
        run(WorkerOptions(part))
    with refused(part, name, "build the bundle again"):
        replicas.run(ServeOptions(part, replicas=2))


def test_a_bundle_of_another_version_is_refused(bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with refused("format is 1"):
        run(WorkerOptions(other))


def test_ports_in_use_are_refused(bundle, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with refused("--system-port", port, "free it"):
            run(WorkerOptions(bundle, system_port=port))
        with refused("--openai-port", port, "free it"):
            replicas.run(ServeOptions(bundle, replicas=2, openai_port=port))
        for name in ("DYN_SYSTEM_PORT", "DYN_TCP_RPC_PORT", "DYN_TCP_RESPONSE_STREAM_PORT"):
            with monkeypatch.context() as patch, refused(name, port, "free it"):
                patch.setenv(name, str(port))
                run(WorkerOptions(bundle))
    monkeypatch.setenv("DYN_TCP_RPC_PORT", "many")
    with refused("DYN_TCP_RPC_PORT", "'many'", "65535"):
        run(WorkerOptions(bundle))


def test_a_folder_and_a_name_that_cannot_be_used_are_refused(bundle, discovery):
    discovery.write_text("")
    with refused(discovery, "DYN_FILE_KV"):
        run(WorkerOptions(bundle))
    discovery.unlink()
    (discovery / "v1" / "mdc").mkdir(parents=True)
    card = {"card_json": {"display_name": "lookup", "source_path": "/bundles/another"}}
    (discovery / "v1" / "mdc" / "a").write_text(json.dumps(card))
    with refused("/bundles/another", "'lookup'", "--name"):
        run(WorkerOptions(bundle))


def test_dynamo_missing_or_of_another_version_is_said(bundle, monkeypatch):
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(environment, "version", missing)
    with refused("ai-dynamo is not installed", "--no-deps ai-dynamo==1.6.1"):
        run(WorkerOptions(bundle))
    monkeypatch.setattr(environment, "version", lambda package: "1.7.0")
    with refused("ai-dynamo is 1.7.0", "1.6.1"):
        run(WorkerOptions(bundle))
    with refused("ai-dynamo is 1.7.0", "1.6.1"):
        replicas.run(ServeOptions(bundle, replicas=2, openai_port=free_ports(1)[0]))


@pytest.mark.needs_dynamo
def test_a_parser_that_dynamo_lacks_is_refused(bundle):
    with refused("--tool-call-parser", "'mine'", "hermes"):
        run(WorkerOptions(bundle, tool_call_parser="mine"))


OPTIONS = "--http-port=80 --grpc-port=81 --metrics-port=82 --openai-port=0 --api-keys-file=keys"
OPTIONS += " --no-page --no-request-log"


@pytest.mark.parametrize("option", OPTIONS.split())
def test_options_that_have_no_meaning_with_replicas_are_refused(option):
    with refused(option.partition("=")[0], "--replicas", "leave it out"):
        app(["serve", "nowhere", "--replicas", "2", option], exit_on_error=False)


@pytest.mark.parametrize("words", [["worker", "nowhere"], ["serve", "nowhere", "--replicas", "2"]])
def test_mistakes_end_with_exit_code_2(words):
    done = subprocess.run([sys.executable, "-m", "echo_trt", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
