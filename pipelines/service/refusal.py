"""Every way in which the service refuses: a code for programs, its HTTP status, and words for people."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import JSONResponse

from ris_core.errors import SHOWN_PROBLEMS

# code: status, when it is given. The OpenAPI document is made of this, and clients may rely on it.
CODES = {
    "malformed": (400, "The body is not the JSON or the form that its content type says."),
    "unauthorized": (401, "The service wants a token: send `Authorization: Bearer TOKEN`."),
    "not_found": (404, "There is nothing at this address."),
    "unknown_model": (404, "No model of that name is served; the message names those that are."),
    "method_not_allowed": (405, "This address is there for another HTTP method."),
    "too_slow": (408, "The body did not arrive whole within the time limit."),
    "body_too_large": (413, "The body has more bytes than the service takes."),
    "unsupported_media_type": (415, "Send application/json or multipart/form-data, not compressed."),
    "invalid": (422, "Fields are missing, unknown, or of a wrong type or range; `problems` names them all."),
    "bad_image": (422, "The image cannot be decoded, or has more pixels than the service takes."),
    "queue_full": (
        429,
        "As many requests as the service takes at once are in it: try again after Retry-After seconds.",
    ),
    "gone": (499, "The client hung up: nobody receives this, but the metrics count it."),
    "internal": (500, "A fault of the service's own; its log has the reason."),
    "not_ready": (503, "A model is still being loaded: try again after Retry-After seconds."),
    "overdue": (503, "The answer was not there within the time limit: try again later, or ask for less at once."),
    "shutting_down": (503, "The service is ending: try again after Retry-After seconds."),
}
RETRY_AFTER = {"queue_full": 1, "not_ready": 2, "overdue": 5, "shutting_down": 5}  # seconds
MOST = 400  # characters of a message, which may hold a decoder's words


class Refusal(Exception):
    """A request that is not answered. `code` is one of CODES; `problems` are all that is wrong, where there is more than one."""

    def __init__(self, code: str, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.code, self.message = code, message[:MOST]
        self.problems = [problem[:MOST] for problem in problems[:SHOWN_PROBLEMS]]
        self.status = CODES[code][0]

    def response(self) -> JSONResponse:
        """Give it as HTTP."""
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.problems:
            error["problems"] = self.problems
        headers = {}
        if self.code in RETRY_AFTER:
            headers["Retry-After"] = str(RETRY_AFTER[self.code])
        if self.code == "unauthorized":
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": error}, self.status, headers)
