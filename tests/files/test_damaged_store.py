"""Whatever becomes of a store's folder, it opens, returns no wrong block, and goes on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from damage import INSIDE, PLACED, damage, gone

from echo_trt.errors import UserError
from echo_trt.files import store as stores
from echo_trt.files.store import FAILURES, Store, no_room

SCOPE = b"a" * 16
KEYS = [i.to_bytes(16, "big") for i in range(60)]
FILES = ("index.db", "index.db-wal", "blocks", "lock")


def write(store: Store, keys: list[bytes]) -> None:
    for position, key in enumerate(keys):
        store.write(key, position % 2, position, key * 60, 1.0)
    store.commit()


def right(store: Store) -> int:
    """Count the blocks that it has, all of which are right."""
    found = [(key, store.read(key, entry)) for key in KEYS if (entry := store.find(key))]
    assert all(content in (None, key * 60) for key, content in found)
    return sum(content is not None for _, content in found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a folder with a store as a server leaves it ("closed"), and as a kill does, with its log of writes."""
    folder = tmp_path_factory.mktemp("stores")
    store = Store(folder / "store", 100_000, SCOPE)
    write(store, KEYS[:40])
    store.keep_state("learnt", bytes(9_000))
    shutil.copytree(folder / "store", folder / "killed")
    store.close()
    shutil.copytree(folder / "store", folder / "closed")
    return folder


def used(folder: Path, size: int = 100_000) -> None:
    """Open a store, use it, and open it once more."""
    store = Store(folder, size, SCOPE)
    right(store)
    assert store.state("learnt") in (None, b"", bytes(9_000))
    write(store, KEYS[50:55])
    assert right(store) >= 5
    store.close()
    store = Store(folder, size, SCOPE)
    assert right(store) >= 5
    store.close()


@pytest.mark.parametrize("way", [*INSIDE, *PLACED], ids=lambda way: way.__name__)
def test_damage_before_a_start(way, whole, tmp_path, caplog):
    for number, (state, name) in enumerate((state, name) for state in ("killed", "closed") for name in FILES):
        folder = Path(shutil.copytree(whole / state, tmp_path / f"{state}-{name}"))
        path = folder / name
        if path.exists() and (way in PLACED or path.is_file()):
            way(path, random.Random(number))
            caplog.clear()
            used(folder)
            said = [record.getMessage() for record in caplog.records]
            assert len(said) <= 2, said
            assert all(str(folder) in text and text.endswith(".") and "\n" not in text for text in said)
            if name == "blocks" or (way in PLACED and name == "index.db"):
                assert any("thrown away" in text or "computed again" in text for text in said)


def test_blocks_that_are_something_else(whole, tmp_path):
    for seed in range(10):
        folder, draw = Path(shutil.copytree(whole / "closed", tmp_path / str(seed))), random.Random(seed)
        for file in draw.sample(sorted((folder / "blocks").iterdir()), 10):
            damage(file, draw)
        used(folder, draw.choice((100_000, 20_000)))


def test_damage_while_it_is_open(whole, tmp_path):
    """A page, a file or the whole folder between two writes: the store fails at most once, and is made anew."""
    failed = 0
    for seed in range(30):
        folder, draw = Path(shutil.copytree(whole / "closed", tmp_path / str(seed))), random.Random(seed)
        store = Store(folder, draw.choice((100_000, 20_000)), SCOPE)
        for _ in range(2):
            places = [folder / "index.db", folder / "blocks"]
            damage(draw.choice([path for path in places if os.path.lexists(path)]), draw)
            right(store)
            try:
                write(store, draw.sample(KEYS, 3))
                store.touch(KEYS[:3], 1.0)
                store.drop(KEYS[4])
                store.keep_state("learnt", b"")
                store.state("learnt")
            except FAILURES as error:
                failed += not no_room(error)
                store.renew(error)
                write(store, KEYS[:3])
                assert right(store) == 3
                break
        store.close()
        used(folder)
    assert failed > 10


@pytest.mark.parametrize("way", [*INSIDE, *PLACED], ids=lambda way: way.__name__)
def test_damage_is_shown_and_cleared_without_a_traceback(way, whole, tmp_path):
    folder = Path(shutil.copytree(whole / "closed", tmp_path / "store"))
    way(folder / "index.db", random.Random(0))
    refusals = []
    for use in (stores.inspect, stores.clear):
        try:
            use(folder)
        except UserError as refusal:
            refusals.append(str(refusal))
    assert len(refusals) <= 1 + (way is gone)
    assert not any("\n" in refusal for refusal in refusals)
    used(folder)


#: As somebody without rights opens a folder that is his to read, and nothing else.
READER = """
import os, sys
from pathlib import Path
from echo_trt.errors import UserError
from echo_trt.files.store import Store
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    Store(Path(sys.argv[1]), 1000, b"a" * 16)
except UserError as refusal:
    print(refusal)
"""


def test_without_rights_it_is_refused_with_a_sentence(whole):
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        folder = Path(shutil.copytree(whole / "closed", Path(above) / "store"))
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", READER, folder], capture_output=True, text=True, check=True)
        assert f"store {folder} cannot be used (Permission denied); give another folder." in done.stdout
        assert len(list((folder / "blocks").iterdir())) == 40


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of 200 KB, as root alone can."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", mounted]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def fill(store: Store) -> None:
    for i in range(1000):
        write(store, [i.to_bytes(16, "big")])


def test_a_disk_that_fills_up_and_has_room_again(disk):
    store = Store(disk / "store", 10**9, SCOPE)
    with pytest.raises(FAILURES) as caught:
        fill(store)
    assert no_room(caught.value)
    store.close()
    store = Store(disk / "store", 10**9, SCOPE)
    assert right(store) > 0
    subprocess.run(["mount", "-o", "remount,size=400k", disk], check=True)
    write(store, KEYS[:3])
    store.close()
    with pytest.raises(OSError, match="No space left"):
        (disk / "other").write_bytes(bytes(10**6))
    with pytest.raises(UserError, match=r"cannot be used .*; give another folder"):
        Store(disk / "new", 40_000, SCOPE)
    (disk / "other").unlink()
    used(disk / "new")
