"""The store in a folder: what it keeps, what it gives up first, and what it makes of damage."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echo_trt.errors import UserError
from echo_trt.files import store as stores
from echo_trt.files.store import Store

SCOPE, OTHER = b"a" * 16, b"b" * 16
KEYS = [bytes([i]) * 16 for i in range(8)]
#: Writes blocks whose content tells their key, and says how many are committed.
WRITER = """
import sys
from itertools import count
from pathlib import Path
from echo_trt.files.store import Store
store = Store(Path(sys.argv[1]), 200_000, b"a" * 16)
for i in count(int(sys.argv[2])):
    key = (i % 400).to_bytes(16, "big")
    store.write(key, i % 2, i, key * 64, 1.0)
    store.commit()
    print(i, flush=True)
"""


def opened(folder: Path, size: int = 10_000, scope: bytes = SCOPE) -> Store:
    return Store(folder, size, scope)


def write(store: Store, *keys: bytes, price: float = 1.0) -> None:
    for position, key in enumerate(keys):
        store.write(key, 0, position, key * 60, price)
    store.commit()


def content(store: Store, key: bytes) -> bytes | None:
    entry = store.find(key)
    return entry and store.read(key, entry)


def kept(store: Store) -> list[int]:
    return [i for i, key in enumerate(KEYS) if content(store, key) == key * 60]


def test_blocks_and_states_outlive_the_store_and_belong_to_their_scope(tmp_path):
    folder = tmp_path / "new" / "store"
    with_others = [(SCOPE, KEYS[:3]), (OTHER, KEYS[2:5])]
    for scope, keys in with_others:
        store = opened(folder, scope=scope)
        write(store, *keys)
        store.keep_state("learner", scope)
        store.close()
    for scope, keys in with_others:
        store = opened(folder, scope=scope)
        assert kept(store) == [KEYS.index(key) for key in keys]
        assert store.state("learner") == scope
        assert store.state("other") is None
        store.close()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert [row[1:] for row in stores.inspect(folder)] == 2 * [("blocks", 3, 2880), ("learner", 1, 16)]
    stores.clear(folder)
    assert stores_empty(folder)


def stores_empty(folder: Path) -> bool:
    store = opened(folder)
    found = kept(store)
    store.close()
    return not found and not any((folder / "blocks").iterdir())


def test_what_is_worth_least_goes_first_and_of_a_text_its_end(tmp_path):
    store = opened(tmp_path, 4 * 960)
    write(store, *KEYS[:4])
    store.touch(KEYS[:1], 1.0)
    write(store, KEYS[4])  # as young as the others, whose last block goes
    assert kept(store) == [0, 1, 2, 4]
    write(store, KEYS[5], price=5.0)
    write(store, KEYS[6], KEYS[7])
    assert kept(store) == [0, 5, 6, 7]
    for _ in range(3):  # what nobody asks for any more ages, whatever it was worth
        for key in KEYS[1:5]:
            write(store, key)
            store.touch([key], 1.0)
    assert 0 not in kept(store)
    store.close()
    store = opened(tmp_path, 2 * 960)
    assert len(kept(store)) == 2
    store.close()


def test_damage_costs_the_block_alone(tmp_path):
    store = opened(tmp_path)
    write(store, *KEYS[:4])
    files = {i: next((tmp_path / "blocks").glob(store._name(KEYS[i]).hex())) for i in range(4)}
    flipped = bytearray(files[0].read_bytes())
    flipped[500] ^= 4
    files[0].write_bytes(flipped)
    files[1].write_bytes(files[2].read_bytes())  # another block's, whole
    assert kept(store) == [2, 3]
    assert store.damaged == 2
    assert store.find(KEYS[0]) is None
    store.drop(KEYS[0])
    store.close()
    files[2].write_bytes(files[2].read_bytes()[:100])
    files[3].unlink()
    (tmp_path / "blocks" / "half").write_bytes(b"")
    store = opened(tmp_path)
    assert [store.find(key) for key in KEYS[2:4]] == [None, None]
    assert {file.name for file in (tmp_path / "blocks").iterdir()} == {files[1].name}
    store.close()


@pytest.mark.parametrize("damage", ["garbage", "zeros", "another format"])
def test_an_index_that_cannot_be_read_is_made_anew(tmp_path, damage):
    store = opened(tmp_path)
    write(store, *KEYS)
    store.close()
    index = tmp_path / "index.db"
    if damage == "another format":
        with sqlite3.connect(index) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        index.write_bytes(os.urandom(50_000) if damage == "garbage" else b"\0" * index.stat().st_size)
    assert stores_empty(tmp_path)


def test_a_folder_that_cannot_be_used_is_refused_with_a_sentence(tmp_path):
    store = opened(tmp_path / "used")
    for use in (lambda: opened(tmp_path / "used"), lambda: stores.clear(tmp_path / "used")):
        with pytest.raises(UserError, match=r"is in use by another server; stop that one"):
            use()
    assert stores.inspect(tmp_path / "used") == []
    store.close()
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(UserError, match="is a file; give a folder"):
        opened(file)
    with pytest.raises(UserError, match="holds other files; give an empty folder"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"cannot be used \(File name too long\)"):
        opened(tmp_path / ("a" * 300))
    for use in (stores.inspect, stores.clear):
        with pytest.raises(UserError, match="is no store; name the folder"):
            use(tmp_path)
    assert file.read_text() == "text"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    store = opened(tmp_path)
    write(store, *KEYS[:2])
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # a file ends as on a disk that fills up
    try:
        with pytest.raises(OSError, match="No space left on device"):
            store.write(KEYS[2], 0, 2, KEYS[2] * 60, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    write(store, KEYS[3])
    assert kept(store) == [0, 1, 3]
    assert len(list((tmp_path / "blocks").iterdir())) == 3
    store.close()


def test_a_kill_in_midst_of_writing_leaves_no_wrong_block(tmp_path):
    """Every time it is another place: blocks are evicted and written over all the time."""
    reached = 0
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(reached)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if (written := int(line)) >= reached + 150:
                    break
            time.sleep(written % 7 / 1e4)
            process.kill()
            reached = max([written, *map(int, process.stdout.read().split("\n")[:-1])])
        store = opened(tmp_path, 200_000)
        keys = [i.to_bytes(16, "big") for i in range(400)]
        found = {key: content(store, key) for key in keys}
        assert all(text in (None, key * 64) for key, text in found.items())
        assert store.damaged == 0
        assert found[(reached % 400).to_bytes(16, "big")] is not None  # a commit is not lost with its process
        store.close()
