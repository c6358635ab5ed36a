"""Leave for web pages of other origins to ask, as browsers check it (CORS)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp


class Cors(CORSMiddleware):
    """The outermost layer: a browser's question before a request (preflight) has no key, and refusals are readable.

    No cookies are read here, so an origin is let in without credentials.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request, and leave its body unread: its end may be unclear (``edge``)."""
        response = super().preflight_response(request_headers)
        if "content-length" in request_headers or "transfer-encoding" in request_headers:
            response.headers["Connection"] = "close"
        return response
