"""The layers behind the log: web pages of other origins (CORS), keys, the size of bodies, the count of answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_trt.server.errors import ApiError, full, shown
from echo_trt.server.keys import Key, Keys
from echo_trt.server.metrics import ServerMetrics

#: Paths for machines that watch over us, without a key.
OPEN = ("/health", "/ping", "/metrics", "/version")
#: Answered by the engine.
ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate")
#: Others are "other": no endless labels.
COUNTED = (
    *OPEN,
    *ANSWERED,
    *("/v1/models", "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/live"),
)
#: Names of this machine, as an HTTP Host has them.
_LOCAL = re.compile(r"(.+\.)?localhost|127(\.\d{1,3}){3}|\[::1\]")


class AuthMiddleware:
    """Around the application: hosts, keys and body sizes are looked at before anything is read; answers are counted.

    hosts    taken beside this machine's names, * for all; None: no host and no origin is looked at
    origins  web pages of other origins that may ask, * for all
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        largest_body: int,
        metrics: ServerMetrics,
        without_key: Container[str] = OPEN,
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
    ):
        self._without_key, self._hosts, self._origins = without_key, hosts, origins
        self.app, self.keys, self.largest_body, self.metrics = app, keys, largest_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["path"] = _origin_form(scope["path"])
        path = scope["path"] if scope["path"] in COUNTED else "other"
        headers = dict(scope["headers"])
        began = 0

        async def counted_send(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = message["status"]
            await send(message)

        if path in ANSWERED:
            self.metrics.running.inc()
        scope["key"] = self._key(headers)
        try:
            self._admit(scope, headers)
            await self.app(scope, self._measured(receive), counted_send)
        except ApiError as error:
            if not began:
                await error.response(scope)(scope, receive, counted_send)
        except Exception:  # answered further out
            began = 500
            raise
        finally:
            if began:  # at the end, since a stream may fail behind its headers
                self.metrics.requests.labels(path, scope.get("failed", began)).inc()
            if path in ANSWERED:
                self.metrics.running.dec()

    def _key(self, headers: dict[bytes, bytes]) -> Key | None:
        given = headers.get(b"authorization", b""), b"Bearer " + headers.get(b"x-api-key", b"")  # Anthropic's clients
        return next(filter(None, map(self.keys.find, given)), None) if self.keys else None

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Before a byte of the body is read. Raises ApiError."""
        if self._hosts is not None:
            self._check_host(headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1"))
        if b"content-length" in headers and b"transfer-encoding" in headers:
            message = "The request has both Content-Length and Transfer-Encoding; send one."
            raise ApiError(400, message, headers={"Connection": "close"})  # where the next request begins is unclear
        key = scope["key"]
        if self.keys and not key and scope["path"] not in self._without_key:
            message = "A valid API key is needed, as in Authorization: Bearer KEY."
            raise ApiError(401, message, "authentication_error", code="invalid_api_key")
        if scope.get("full") and not key and scope["path"] not in OPEN:
            raise full()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.largest_body:
            raise self._too_large()

    def _check_host(self, host: str, origin: str) -> None:
        """Refuse what a web page of another site may have sent, also one whose name leads here. Raises ApiError."""
        name = re.sub(r":\d*$", "", host).lower()
        if name and not _LOCAL.fullmatch(name) and not {"*", name} & set(self._hosts or ()):
            raise _foreign(f"Host is {shown(name)}, and only this machine may ask; name it in --allowed-hosts.")
        site = origin.startswith(("http://", "https://", "null"))  # others are of programs, which no page can claim
        if site and origin.partition("://")[2] != host and not {"*", origin} & set(self._origins):
            raise _foreign(f"Origin is {shown(origin)}, whose pages may not ask; name it in --allowed-origins.")

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


def _foreign(message: str) -> ApiError:
    return ApiError(403, message, "permission_error", code="forbidden")


class Cors(CORSMiddleware):
    """The first of them: a browser's question before a request (preflight) has no key, and refusals are readable.

    No cookies are read here, so an origin is let in without credentials.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After", "X-Fields-Ignored", "X-Request-Id", "X-Tools-Left-Out"),
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
