"""The folder in which Dynamo's processes of one machine find each other: checked, and kept up to date.

A file is an entry, and a file that was not touched for ten seconds is an entry whose lease has ended: everyone removes
it. Dynamo touches its files, but does not write one anew that was removed, as happens to a process that was stopped for
a while or whose folder was emptied: it would serve on unseen. ``Lease`` does that.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from echo_trt.errors import UserError
from echo_trt.supervision.process import listening_ports

FOLDER, BACKEND = "DYN_FILE_KV", "DYN_DISCOVERY_BACKEND"
CARDS = "v1/mdc"
KEPT = (CARDS, "v1/instances", "v1/event_channels", "v1/event_sources")
PORT = re.compile(r":(\d{2,5})\b")  # of an address
LOOK = 1.0  # seconds between two looks; larger: a lost entry is missing longer


def folder_of(environment: Mapping[str, str]) -> Path:
    return Path(environment.get(FOLDER) or Path(tempfile.gettempdir()) / "dynamo_store_kv")


def check_folder(folder: Path) -> None:
    """Make the folder, and refuse one that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        next(folder.iterdir(), None)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"the discovery folder {folder} cannot be used ({reason}); set {FOLDER} to one that can."
        ) from error


def entries(folder: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    with suppress(OSError):
        for file in sorted((folder / kind).iterdir()):
            with suppress(OSError, ValueError):
                value = json.loads(file.read_text())
                if isinstance(value, dict):
                    yield file, value


def check_name(folder: Path, name: str, bundle: Path) -> None:
    """Refuse a name under which workers serve another bundle: the frontend would send this worker nothing."""
    for _, entry in entries(folder, CARDS):
        card = entry.get("card_json") or {}
        if card.get("display_name") == name and card.get("source_path") != str(bundle):
            raise UserError(
                f"workers serve {card.get('source_path')} as {name!r} already, and this bundle is {bundle}; give "
                "--name another name, or use the same bundle at the same path."
            )


class Lease:
    """Writes this process's entries anew where they were removed.

    Dynamo removes a worker's entries when the worker is told to stop; ``close`` must follow in ``patience`` seconds.
    """

    def __init__(self, folder: Path, patience: float, lost: Callable[[int], None] = lambda number: None):
        """``lost`` is called with the number of entries that had to be written anew."""
        self._folder, self._patience, self._lost = folder, patience, lost
        self._entries: dict[Path, bytes] = {}
        self._missing: dict[Path, float] = {}  # time.monotonic() of the first look without it
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, worker_id: int) -> None:
        """Begin, for a worker of this process."""
        self._worker_id = worker_id
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let entries go: Dynamo is about to remove them, or has."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK):
            now = time.monotonic()
            self._missing = {file: self._missing.get(file, now) for file in self._entries if not file.exists()}
            overdue = [file for file, since in self._missing.items() if now - since > self._patience]
            for file in overdue:
                self._write(file)
            if overdue:
                self._lost(len(overdue))
            ports = listening_ports(os.getpid())
            for kind in KEPT:
                for file, entry in entries(self._folder, kind):
                    if file not in self._entries and self._owns(entry, ports):
                        with suppress(OSError):
                            self._entries[file] = file.read_bytes()

    def _owns(self, entry: Mapping[str, Any], ports: set[int]) -> bool:
        """Event channels name no worker, but a port on which this process listens."""
        text = json.dumps(entry)
        return str(self._worker_id) in text or not ports.isdisjoint(
            map(int, PORT.findall(json.dumps(entry.get("transport"))))
        )

    def _write(self, file: Path) -> None:
        draft = self._folder / f".{os.getpid()}-{file.name[-40:]}"
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(self._entries[file])
            draft.rename(file)
