"""What is stored as a version: the model's folder, what it was scored for, and the code it answers with.

The library travels under a name of its own content (`ris_core_<digest>`), so that one process can load versions with different
code, beside whatever `ris_core` is installed there.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

from pipelines.versions import EVALUATION, MODEL

LIBRARY, SERVED = "ris_core", "serving_model.py"
ROOT = Path(__file__).parent.parent
_NAMED = re.compile(rf"\b{LIBRARY}\b")

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "image"), ColSpec("string", "text")]),
    outputs=Schema(
        [
            ColSpec("string", "counts", required=False),
            ColSpec("long", "height", required=False),
            ColSpec("long", "width", required=False),
            ColSpec("double", "score", required=False),
            ColSpec("string", "error", required=False),
        ]
    ),
    params=ParamSchema([ParamSpec("threshold", "double", 0.5)]),
)
NEEDED = (
    "mlflow",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "numpy",
    "pandas",
    "pyarrow",
    "pillow",
    "pycocotools",
    "omegaconf",
    "safetensors",
    "scikit-image",
    "contourpy",
    "cachetools",
)


def requirements() -> list[str]:
    """List what the packaged model needs, at the versions it was tested with."""
    return [f"{name}=={version(name)}" for name in NEEDED]


def example() -> pd.DataFrame:
    """Give a request that the model answers: a grey picture and an expression."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), 127, np.uint8)).save(buffer, "PNG")
    return pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode()], "text": ["the red star"]})


def write_code(place: Path) -> tuple[Path, Path]:
    """Write the library under the name of its content, and the model's source that imports it, into `place`; their paths."""
    sources = sorted(
        path for path in (ROOT / LIBRARY).rglob("*") if path.is_file() and path.parent.name != "__pycache__"
    )
    known = hashlib.sha256()
    for path in sources:
        known.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    name = f"{LIBRARY}_{known.hexdigest()[:12]}"
    for path in sources:
        copy = place / name / path.relative_to(ROOT / LIBRARY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            copy.write_text(_NAMED.sub(name, path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(path, copy)
    model = place / SERVED
    model.write_text(_NAMED.sub(name, (ROOT / "pipelines" / SERVED).read_text(encoding="utf-8")), encoding="utf-8")
    return place / name, model


@contextmanager
def importable(package: Path) -> Iterator[None]:
    """Let a package be imported inside the block; nothing is left of it afterwards, as its folder goes away."""
    place = str(package.parent.absolute())
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(place)
        for name in [name for name in sys.modules if name.split(".")[0] == package.name]:
            del sys.modules[name]


def log(run_id: str, name: str, folder: Path, tags: Mapping[str, str], place: Path) -> str:
    """Log a model's folder and what it was scored for (`place`/evaluation) as a pyfunc model of a run; its version, registered.

    `place` is a folder that goes away afterwards.
    """
    copy = shutil.copytree(folder, place / MODEL)  # MLflow refuses links, which DVC's cache may make
    library, source = write_code(place)
    with importable(library), mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(source),
            artifacts={MODEL: str(copy), EVALUATION: str(place / EVALUATION)},
            code_paths=[str(library)],
            signature=SIGNATURE,
            model_config={"allow_paths": False},  # who loads the model in process may set it, a client may not
            input_example=example(),
            pip_requirements=requirements(),
        )
    print(f"logged {logged.model_uri}", file=sys.stderr)
    return str(mlflow.register_model(logged.model_uri, name, tags=dict(tags)).version)
