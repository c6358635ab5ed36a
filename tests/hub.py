"""A hub on this machine: repositories of real files, behind the few routes that the hub's client asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """``url`` is what HF_ENDPOINT takes; ``fetched`` names what was fetched, as OWNER/NAME/FILE."""

    url: str
    fetched: list[str] = field(default_factory=list)


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """Serve the repositories ``folder``/OWNER/NAME."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"] and (repository := folder / parts[2] / parts[3]).is_dir():
                names = {path: path.relative_to(repository).as_posix() for path in repository.rglob("*")}
                if parts[4:5] == ["tree"]:
                    about: object = [
                        {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
                        for path, name in names.items()
                    ]
                else:
                    files = [{"rfilename": name} for name in names.values()]
                    about = {"id": "/".join(parts[2:4]), "sha": REVISION, "siblings": files}
                return self._answer(200, json.dumps(about).encode(), Content_Type="application/json")
            if parts[2:3] == ["resolve"] and (file := folder.joinpath(*parts[:2], *parts[4:])).is_file():
                if self.command == "GET":
                    served.fetched.append("/".join((*parts[:2], *parts[4:])))
                return self._answer(200, file.read_bytes(), ETag=f'"{_digest(file)}"', X_Repo_Commit=REVISION)
            return self._answer(404, b"", X_Error_Code="RepoNotFound" if parts[0] == "api" else "EntryNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
