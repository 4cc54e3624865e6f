"""The routes of the service, as a FastAPI application."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines.service.desk import Desk
from pipelines.service.engine import Engine, Served
from pipelines.service.guard import Guard
from pipelines.service.limits import Limits
from pipelines.service.refusal import CODES, Refusal
from pipelines.service.schema import Answered, Asking, JsonRequest, Models, Refused

HERE = Path(__file__).parent
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
DESCRIPTION = """
Give a picture and phrases; get, for each phrase, the mask of what it means.

Errors are `{"error": {"code", "message", "problems"}}`; each status below names its codes. With a token set, everything but
the page, `/health` and `/ready` wants `Authorization: Bearer TOKEN`.
"""


def create_app(
    models: Sequence[Served],
    limits: Limits = Limits(),  # noqa: B008  # it is frozen
    token: str | None = None,
    loaded: Callable[[Engine], object] = lambda _: None,
) -> FastAPI:
    """Make the application; its models are loaded when it starts. `app.state.desk` is its Desk.

    Raises WeightsError for a folder that holds no model, ConfigError for two of one name.
    """
    desk = Desk(models, limits, loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.start()
        yield
        await run_in_threadpool(desk.stop)

    app = FastAPI(
        title="Referring image segmentation",
        version=version("ris"),
        description=DESCRIPTION,
        docs_url=None,  # FastAPI's page of documents loads scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=_documented("unauthorized", "internal"),
    )
    app.state.desk = desk
    app.add_middleware(Guard, max_body=limits.max_body, token=token, metrics=desk.metrics)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    _add_routes(app, desk)
    return app


def _add_routes(app: FastAPI, desk: Desk) -> None:
    @app.post(
        "/v1/segment",
        summary="Mark what expressions mean in a picture",
        response_model=Answered,
        responses=_documented(*(code for code in CODES if code not in ("not_found", "method_not_allowed", "gone"))),
        openapi_extra={"requestBody": {"required": True, "content": _bodies()}},
    )
    async def segment(request: Request) -> Response:
        return _json(await desk.segment(request))

    @app.get("/v1/models", summary="List the models that are served", response_model=Models)
    async def models() -> Response:
        return _json({"models": [engine.info.model_dump() for engine in desk.engines.values()]})

    @app.get("/health", summary="Tell that the process lives")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Tell whether all models answer", responses=_documented("not_ready"))
    async def ready() -> dict[str, str]:
        desk.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", summary="Give metrics in Prometheus' text format", response_class=Response)
    async def metrics() -> Response:
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4")

    for path, (name, media) in PAGE.items():
        app.add_api_route(path, _file(name, media), methods=["GET", "HEAD"], include_in_schema=False)


def _file(name: str, media: str) -> Callable[[], FileResponse]:
    def file() -> FileResponse:
        return FileResponse(HERE / name, media_type=media)

    return file


def _json(content: dict[str, Any]) -> Response:
    """Write what is known to be right, without looking at it again."""
    return Response(json.dumps(content, allow_nan=False, separators=(",", ":")), media_type="application/json")


def _documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Describe refusals for the OpenAPI document."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status, words = CODES[code]
        described = found.setdefault(status, {"model": Refused, "description": ""})
        described["description"] = f"{described['description']}\n\n`{code}`: {words}".strip()
    return found


def _bodies() -> dict[str, Any]:
    form = Asking.model_json_schema()
    form["properties"] = {
        "image": {"type": "string", "format": "binary", "description": "The image's file."},
        "expression": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Which object; may come several times.",
        },
        **{name: form["properties"][name] for name in ("model", "threshold", "masks", "location")},
    }
    form["required"] = ["image", "expression"]
    return {
        "application/json": {"schema": JsonRequest.model_json_schema()},
        "multipart/form-data": {"schema": form},
    }


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Give what Starlette refuses in the form of the rest."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        response = Refusal("method_not_allowed", "this address is there for another HTTP method").response()
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return Refusal("not_found", "there is nothing at this address; /openapi.json says what there is").response()
    return Refusal("malformed", "the request cannot be read").response()


async def _gone(request: Request, error: Exception) -> Response:
    return Refusal("gone", "the client hung up").response()
