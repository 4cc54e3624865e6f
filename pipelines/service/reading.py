"""A request's body, JSON or a form, read into what is asked, or refused with all that is wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from pipelines.service.limits import MAX_TEXT, Limits
from pipelines.service.refusal import Refusal
from pipelines.service.schema import Asking, JsonRequest
from ris_core.data.images import BadImage, from_base64, opened
from ris_core.errors import SHOWN_PROBLEMS, DataError, short

FORM_FIELDS = {"image", "expression", "model", "threshold", "masks", "location"}
CHARSET = re.compile(r'charset\s*=\s*"?([^;"\s]*)')
MAX_PART = 64 * 1024  # bytes of a form's field that is no file
# What JSON of a request has beside its image's text: quotes, commas and brackets. More of them cost memory before they can
# be refused, a hundred bytes each.
MARKS = (b'"', b",", b"[", b"{")


@dataclass(frozen=True)
class Asked:
    """A request that can be answered. digest: of the image. wrong: for expressions that cannot, their error."""

    image: bytes
    digest: bytes
    texts: Sequence[tuple[int, str]]
    wrong: Mapping[int, dict[str, str]]
    options: Asking


async def read(request: Request, limits: Limits) -> Asked:
    """Read a request. Raises Refusal with what is wrong with it, or with its image as far as its header tells."""
    media, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    media = media.strip()
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal("unsupported_media_type", "the body is compressed: send it as it is")
    if media == "application/json":
        return await run_in_threadpool(_from_json, await request.body(), limits)
    if media == "multipart/form-data":
        if set(CHARSET.findall(parameters)) - {"utf-8", "utf8"}:  # Python knows others that raise errors of many kinds
            raise Refusal("unsupported_media_type", "a form's text must be UTF-8")
        try:
            async with request.form(
                max_files=1, max_fields=limits.max_expressions + len(FORM_FIELDS), max_part_size=MAX_PART
            ) as form:
                file = form.get("image")
                content = await file.read() if isinstance(file, UploadFile) else None
                return await run_in_threadpool(_from_form, form, content, limits)
        except HTTPException as error:  # in words of the parser's own
            raise Refusal("malformed", f"the form cannot be read: {error.detail}") from None
    raise Refusal("unsupported_media_type", "send application/json or multipart/form-data")


def _from_json(body: bytes, limits: Limits) -> Asked:
    if sum(map(body.count, MARKS)) > 4 * MAX_TEXT * (limits.max_expressions + 1):
        raise Refusal("invalid", "the JSON has far more parts than a request can have")
    try:
        found = JsonRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            raise Refusal("malformed", f"the body is no JSON: {problems[0]['msg']}") from None
        raise _invalid(problems) from None
    # Of a field that is given twice, the parser above takes the last and does not say so.
    json.loads(body, object_pairs_hook=_without_twins, parse_int=str, parse_float=str)
    try:
        image = from_base64(found.image)
    except DataError as error:
        raise Refusal("bad_image", str(error)) from None
    return _asked(image, found, limits)


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Refusal("invalid", "a field is given twice")
    return found


def _from_form(form: FormData, content: bytes | None, limits: Limits) -> Asked:
    """Read fields; `expression` may come several times. content: of the file `image`."""
    problems = [f"{short(name)}: there is no such field" for name in dict.fromkeys(form) if name not in FORM_FIELDS]
    if content is None:
        problems.append("image: send a file in the field `image`")
    texts, given = form.getlist("expression"), {}
    for name in ("model", "threshold", "masks", "location"):
        values = form.getlist(name)
        if len(values) > 1:
            problems.append(f"{name}: it is given {len(values)} times")
        if values:
            given[name] = values[0]
    files = [
        name for name in FORM_FIELDS - {"image"} if any(isinstance(each, UploadFile) for each in form.getlist(name))
    ]
    problems += [f"{name}: a file, where text is expected" for name in files]
    if problems:
        raise Refusal("invalid", "the form cannot be answered", problems)
    try:
        options = Asking.model_validate_strings(given, strict=False).model_copy(update={"expressions": texts})
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_context=False, include_input=False)) from None
    assert content is not None
    return _asked(content, options, limits)


def _invalid(problems: Sequence[Mapping[str, Any]]) -> Refusal:
    """Tell what pydantic found, each by its place."""
    told = [
        ": ".join([*([_place(each["loc"])] if each["loc"] else []), each["msg"]]) for each in problems[:SHOWN_PROBLEMS]
    ]
    return Refusal("invalid", "the request cannot be answered", told)


def _place(parts: Sequence[int | str]) -> str:
    """Name a field, which may be one of the client's own making, of any length."""
    return ".".join(str(part) if isinstance(part, int) else short(part)[1:-1] for part in parts)


def _asked(image: bytes, options: Asking, limits: Limits) -> Asked:
    if (options.expression is None) == (not options.expressions):
        raise Refusal("invalid", "give `expressions`, a list of one or more texts, or `expression`, one text")
    texts = [options.expression] if options.expression is not None else options.expressions
    assert texts is not None
    if len(texts) > limits.max_expressions:
        raise Refusal("invalid", f"{len(texts)} expressions were given; {limits.max_expressions} are the most at once")
    _check_image(image, limits)
    wrong = {index: error for index, text in enumerate(texts) if (error := _wrong_with(text))}
    right = [(index, text) for index, text in enumerate(texts) if index not in wrong]
    return Asked(image, hashlib.sha256(image).digest(), right, wrong, options)


def _wrong_with(text: str) -> dict[str, str] | None:
    if not text.strip():
        return {"code": "blank_expression", "message": "the expression is blank"}
    if len(text) > MAX_TEXT:
        return {
            "code": "long_expression",
            "message": f"the expression has {len(text)} characters; {MAX_TEXT} are the most",
        }
    return None


def _check_image(image: bytes, limits: Limits) -> None:
    """Look at an image's header, which costs little, before it waits for its turn."""
    try:
        with opened(io.BytesIO(image), f"an image of {len(image)} bytes") as picture:
            width, height = picture.size
    except BadImage as error:
        raise Refusal("bad_image", str(error)) from None
    if width * height > limits.max_pixels:
        raise Refusal(
            "bad_image",
            f"the image has {width}x{height} pixels; {limits.max_pixels / 1e6:.3g} million are the most: send a smaller copy",
        )
