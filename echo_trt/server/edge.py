"""The outermost layers: web pages of other origins (CORS), keys, the size of bodies, and the count of answers."""

from __future__ import annotations

from collections.abc import Container, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_trt.server.errors import ApiError
from echo_trt.server.keys import Keys
from echo_trt.server.metrics import ServerMetrics

#: Paths for machines that watch over us, without a key.
OPEN = ("/health", "/ping", "/metrics", "/version")
#: Answered by the engine.
ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate")
#: Others are "other": no endless labels.
COUNTED = (
    *OPEN,
    *ANSWERED,
    "/v1/forecast",
    "/v1/models",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/live",
)


class AuthMiddleware:
    """Around the application: keys and body sizes are looked at before anything is read; every answer is counted."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        largest_body: int,
        metrics: ServerMetrics,
        without_key: Container[str] = OPEN,
    ):
        self._without_key = without_key
        self.app, self.keys, self.largest_body, self.metrics = app, keys, largest_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["path"] = _origin_form(scope["path"])
        path = scope["path"] if scope["path"] in COUNTED else "other"
        headers = dict(scope["headers"])
        began = False

        async def counted_send(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        if path in ANSWERED:
            self.metrics.running.inc()
        if self.keys:
            given = headers.get(b"authorization") or b"Bearer " + headers.get(b"x-api-key", b"")
            scope["latency"] = self.keys.latency(given)
        try:
            self._admit(scope["path"], headers)
            await self.app(scope, self._measured(receive), counted_send)
        except ApiError as error:
            if not began:
                await error.response(scope)(scope, receive, counted_send)
        except Exception:  # answered further out
            if not began:
                self.metrics.requests.labels(path, 500).inc()
            raise
        finally:
            if path in ANSWERED:
                self.metrics.running.dec()

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Before a byte of the body is read. Raises ApiError."""
        if b"content-length" in headers and b"transfer-encoding" in headers:
            message = "The request has both Content-Length and Transfer-Encoding; send one."
            raise ApiError(400, message, headers={"Connection": "close"})  # where the next request begins is unclear
        given = headers.get(b"authorization", b""), b"Bearer " + headers.get(b"x-api-key", b"")  # Anthropic's clients
        if self.keys and path not in self._without_key and not any(map(self.keys.allow, given)):
            message = "A valid API key is needed, as in Authorization: Bearer KEY."
            raise ApiError(401, message, "authentication_error", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.largest_body:
            raise self._too_large()

    def _measured(self, receive: Receive) -> Receive:
        size = 0

        async def measured() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.largest_body:
                raise self._too_large()
            return message

        return measured

    def _too_large(self) -> ApiError:
        message = f"The body is larger than {self.largest_body} bytes; send a shorter prompt."
        return ApiError(413, message, code="request_too_large")


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
            expose_headers=("Retry-After", "X-Request-Id"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request, and leave its body unread: its end may be unclear (``AuthMiddleware``)."""
        response = super().preflight_response(request_headers)
        if "content-length" in request_headers or "transfer-encoding" in request_headers:
            response.headers["Connection"] = "close"
        return response


def _origin_form(target: str) -> str:
    """Return the path of a target that may be a whole URL, as clients send it to proxies: ``http://host/health``."""
    scheme, separator, rest = target.partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        return target
    return "/" + rest.partition("/")[2]
