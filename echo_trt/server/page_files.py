"""The live page's files: static, the same for everyone, and without a secret."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
#: No script, style, picture or connection from elsewhere or written into the page; scripts cannot make HTML of text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",  # asked again each time, and sent where it has changed
}
INDEX, FOLDER = "/", "/page/"


class PageFiles:
    """The page's files by path, and ``build``, a digest by which an open page finds out that the server has others."""

    def __init__(self) -> None:
        found = [each for each in files("echo_trt.server").joinpath("page").iterdir() if each.is_file()]
        contents = {each.name: each.read_bytes() for each in sorted(found, key=lambda each: each.name)}
        self.files = {INDEX if name == "index.html" else FOLDER + name: content for name, content in contents.items()}
        self.build = hashlib.sha256(b"\0".join(contents.values())).hexdigest()[:12]

    async def show(self, request: Request) -> Response:
        """GET / and /page/NAME."""
        path = request.url.path
        content = self.files[path]
        headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        kind = "html" if path == INDEX else path.rpartition(".")[2]
        return Response(content, media_type=f"{TYPES[kind]}; charset=utf-8", headers=headers)
