"""The discovery folder: what is wrong with it is said, and an entry that was lost comes back."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from refusal import refused
from waiting import wait_until

from echo_trt.adapters.dynamo.discovery import Lease, check_name, folder_of
from echo_trt.adapters.dynamo.environment import completed, grace_of, of_worker

WORKER = 5996717552136530566


def write(folder: Path, index: str, name: str, **entry: object) -> Path:
    file = folder / "v1" / index / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entry))
    return file


def test_entries_of_this_process_come_back_and_those_of_others_do_not(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as ours:
        port, lost = ours.getsockname()[1], []
        files = [
            write(tmp_path, "mdc", "a%2Fb", instance_id=WORKER, card_json={}),
            write(tmp_path, "event_sources", "c", metadata={"worker": {"worker_id": WORKER}}),
            write(tmp_path, "event_channels", "d", instance_id=7, transport={"endpoint": f"tcp://127.0.0.1:{port}"}),
        ]
        others = [
            write(tmp_path, "mdc", "e", instance_id=WORKER + 1),
            write(tmp_path, "event_channels", "f", instance_id=8, transport={"endpoint": "tcp://127.0.0.1:9"}),
        ]
        before = [file.read_bytes() for file in files]
        lease = Lease(tmp_path, 0.2, lost.append)
        lease.keep(WORKER)
        wait_until(lambda: len(lease._entries) == 3)
        shutil.rmtree(tmp_path / "v1")
        wait_until(lambda: all(file.exists() for file in files))
        assert [file.read_bytes() for file in files] == before
        assert not any(file.exists() for file in others)
        assert sum(lost) == 3
        lease.close()
        files[0].unlink()
        time.sleep(1.5)
        assert not files[0].exists()


def test_a_name_that_another_bundle_has_is_refused(tmp_path):
    write(tmp_path, "mdc", "a", card_json={"display_name": "echo", "source_path": "/bundles/one"})
    (tmp_path / "v1" / "mdc" / "b").write_text("no JSON")
    check_name(tmp_path, "echo", Path("/bundles/one"))
    check_name(tmp_path, "other", Path("/bundles/two"))
    with refused("/bundles/one", "'echo'", "/bundles/two", "--name"):
        check_name(tmp_path, "echo", Path("/bundles/two"))


def test_a_user_s_settings_come_before_ours(tmp_path):
    plain = of_worker({}, 40, 9191, 60)
    assert plain["DYN_FILE_KV"] == str(folder_of({}))
    assert (plain["DYN_ENGINE_REQUEST_LIMIT"], plain["DYN_SYSTEM_PORT"]) == ("40", "9191")
    assert plain["DYN_TCP_RPC_HOST"] == "127.0.0.1"
    assert float(plain["DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT"]) > 60  # else Dynamo ends it in the middle of its drain
    given = {"DYN_DISCOVERY_BACKEND": "etcd", "DYN_ENGINE_REQUEST_LIMIT": "3", "DYN_SYSTEM_PORT": "9090"}
    many = of_worker(given, 40, 0, 60)
    assert many.items() >= given.items()
    assert "DYN_TCP_RPC_HOST" not in many  # other machines must reach it
    assert grace_of({}) == grace_of(plain) == 0.5
    for text in ("soon", "-1", "nan"):
        with refused("GRACE_PERIOD_SECS", text):
            grace_of({"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": text})
    with refused("DYN_DISCOVERY_BACKEND", "'files'", "file, etcd"):
        completed({"DYN_DISCOVERY_BACKEND": "files"})


@pytest.mark.parametrize("folder", [None, "/x"])
def test_dynamo_s_own_folder_is_used(folder):
    assert str(folder_of({"DYN_FILE_KV": folder} if folder else {})).endswith(folder or "dynamo_store_kv")
