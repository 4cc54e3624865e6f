"""Requests and answers, as the OpenAPI document shows them and as requests are checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MaskForm = Literal["rle", "polygons", "png"]


class Asking(BaseModel):
    """What a request may hold beside its image."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    expressions: list[str] | None = Field(None, description="Which objects, in words. One answer for each.")
    expression: str | None = Field(None, description="The same for one.")
    model: str | None = Field(None, description="A name of /v1/models. The first of them, where it is not given.")
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="A pixel is in the mask if its probability is above it; the model's own is 0.5."
    )
    masks: MaskForm = Field(
        "rle", description="COCO's compressed RLE, COCO's polygons, or a PNG of 0 and 255 in base64."
    )
    location: bool = Field(False, description="Whether to tell where the system looked, if it has such a map.")


class JsonRequest(Asking):
    """A request as JSON."""

    image: str = Field(
        description="An encoded image (JPEG, PNG, ...) in base64: also with line ends, as a data URI, URL-safe."
    )


class Rle(BaseModel):
    """COCO's compressed run-length encoding: pycocotools.mask.decode reads it."""

    size: tuple[int, int] = Field(description="Height, width.")
    counts: str


class Polygons(BaseModel):
    """COCO's polygons `[x0, y0, x1, y1, ...]` in pixels, one a piece."""

    size: tuple[int, int] = Field(description="Height, width.")
    polygons: list[list[float]]


class Png(BaseModel):
    """A grey PNG in base64."""

    size: tuple[int, int] = Field(description="Height, width.")
    png: str


class Answer(BaseModel):
    """The answer to one expression."""

    index: int = Field(description="Which of the request's expressions.")
    score: float = Field(description="How sure the system is, 0..1; 0 for an empty mask.")
    area: int = Field(description="Pixels in the mask; 0 says that nothing was found.")
    cut: bool = Field(description="Whether the expression was longer than the system reads, and its end not heard.")
    mask: Rle | Polygons | Png
    location: Png | None = Field(
        None, description="Where it looked, black 0 to white 1, over the whole image, often smaller."
    )


class Trouble(BaseModel):
    """What is wrong."""

    code: str
    message: str
    problems: list[str] | None = None


class Unanswered(BaseModel):
    """An expression that cannot be answered; the others are."""

    index: int
    error: Trouble


class Refused(BaseModel):
    """A request that is not answered."""

    error: Trouble


class ModelInfo(BaseModel):
    """A model as it was loaded; it stays the same until the service is started again."""

    name: str
    system: str
    uri: str | None = Field(description="Of the registry, by its version; null for a folder.")
    weights_sha256: str
    uses_threshold: bool = Field(
        description="Whether it has a map to threshold; one that chooses among proposals has none."
    )
    dataset: str = Field(description="What it was trained on; empty where nothing says so.")


class Models(BaseModel):
    """The models that are served, the first of them by default."""

    models: list[ModelInfo]


class Size(BaseModel):
    """Pixels of the image as it was read: upright, where its EXIF data says what that is."""

    height: int
    width: int


class Answered(BaseModel):
    """The answers to a request, in the order of its expressions."""

    model: ModelInfo
    image: Size
    answers: list[Answer | Unanswered]
