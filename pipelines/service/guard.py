"""What stands before every handler: the token, the most bytes of a body, headers for browsers, the counting, and faults."""

from __future__ import annotations

import hmac
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.service.metrics import Metrics
from pipelines.service.refusal import Refusal

# For everybody: whether it lives, and the page, which asks for the token.
OPEN = {"/", "/page.css", "/page.js", "/health", "/ready"}
COUNTED = OPEN | {"/v1/segment", "/v1/models", "/metrics", "/openapi.json"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware around the whole service.

    max_body: bytes, counted as they come, whatever Content-Length says. token: what a client must send, if anything.
    """

    def __init__(self, app: ASGIApp, max_body: int, token: str | None, metrics: Metrics):
        self.app, self.max_body, self.metrics = app, max_body, metrics
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, path, read, answering = time.perf_counter(), scope["path"], 0, False

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise self._too_large()
            return message

        async def told(message: Message) -> None:
            nonlocal answering
            if message["type"] == "http.response.start":
                answering = True
                MutableHeaders(scope=message).update(HEADERS)
                known = path if path in COUNTED else "other"
                self.metrics.requests.labels(known, str(message["status"])).inc()
                self.metrics.seconds.labels(known).observe(time.perf_counter() - start)
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, limited, told)
        except Refusal as refusal:
            await refusal.response()(scope, receive, told)
        except Exception:
            if not answering:
                fault = Refusal("internal", "the service has made a fault; its log says which")
                await fault.response()(scope, receive, told)
            raise  # for the log

    def _check(self, scope: Scope) -> None:
        """Raise Refusal of a request without the token, or with a body that is said to be too large."""
        headers = dict(scope["headers"])
        if self.token is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                raise Refusal("unauthorized", "this service wants its token: send `Authorization: Bearer TOKEN`")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and len(length) < 20 and int(length) > self.max_body:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(
            "body_too_large", f"the body is larger than the {self.max_body / 2**20:g} MiB that are taken here"
        )
