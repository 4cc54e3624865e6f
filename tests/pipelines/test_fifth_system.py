"""A fifth system, on a text encoder of its own: one folder and one section, and every stage takes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pipelines_world import REPOSITORY, Workplace

SYSTEM = '''
"""Words, each a number of its own, meet a few convolutions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ris_core.models.contract import MapSystem, Role, SystemConfig
from ris_core.models.losses import LossParams, segmentation_loss


@dataclass(frozen=True)
class WordsConfig(SystemConfig):
    width: int = 8
    vocabulary: int = 100


class Words(MapSystem[torch.Tensor, torch.Tensor]):
    config_class = WordsConfig
    stride, context_length = 8, 9

    def __init__(self, clip: object, config: WordsConfig) -> None:
        super().__init__(None, config)
        self.config = config
        self.see = nn.Sequential(nn.Conv2d(3, config.width, 8, 8), nn.ReLU(), nn.Conv2d(config.width, config.width, 3, 1, 1))
        self.hear = nn.EmbeddingBag(config.vocabulary, config.width, mode="sum", padding_idx=0)

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def tokenize(self, texts: Sequence[str], length: int) -> torch.Tensor:
        ids = [[1 + zlib.crc32(word.encode()) % (self.config.vocabulary - 1) for word in text.split()][:length] for text in texts]
        return nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.see(images)

    def segment(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert tokens.max() < self.config.vocabulary, "these are the tokens of another system"
        seen = features if image_index is None else features[image_index]
        return (seen * self.hear(tokens)[:, :, None, None]).sum(1, keepdim=True)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.segment(self.encode_image(images), tokens, image_index)

    def loss(self, output: torch.Tensor, target: torch.Tensor, params: LossParams) -> torch.Tensor:
        return segmentation_loss(output, target, params)

    def role(self, name: str) -> Role:
        return "head"


SYSTEM = Words
'''
SCRIPT = """
import base64, sys
from pathlib import Path
import mlflow
import pandas as pd
import ris_core
from pipelines import cluster, evaluate, initialise, register, resolve, train
from ris_core.predictor import RISPredictor

assert Path(ris_core.__file__).is_relative_to(Path.cwd()), ris_core.__file__
resolve.main()
with cluster.connected(num_cpus=2, log_to_driver=False):
    for stage in (initialise, train, evaluate, register):
        stage.main("words", "shapes")
photo = next(Path("data/raw/shapes").rglob("*.jpg"))
texts = ["the red star", "left " * 20]
predictor = RISPredictor.from_folder("models/words-shapes")
found = predictor.answer(predictor.encode(photo), texts)
image = base64.b64encode(photo.read_bytes()).decode()
served = mlflow.pyfunc.load_model("models:/ris-words-shapes@champion").predict(pd.DataFrame({"image": image, "text": texts}))
assert [each.rle["counts"] for each in found] == served["counts"].tolist()
assert [each.cut for each in found] == [False, True]
"""


@pytest.mark.ray
def test_a_fifth_system_with_its_own_tokenizer(workplace: Workplace, store: Path) -> None:
    root = workplace.root
    for package in ("ris_core", "pipelines"):
        shutil.copytree(REPOSITORY / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = root / "ris_core/models/words"
    folder.mkdir()
    (folder / "__init__.py").write_text(SYSTEM)
    workplace.link("raw", "shards", "clip", "clip_vit")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params |= {
        "systems": ["words"],
        "words": {"clip": "vit", "model": {"width": 6}, "train": {"epochs": 1, "word_len": 9}},
    }
    (root / "params.yaml").write_text(json.dumps(params))
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    watched = json.loads((root / "results/params/train-words.json").read_text())
    assert (watched["model"], watched["train"]["epochs"]) == ({"width": 6, "vocabulary": 100}, 1)
    scores = json.loads((root / "results/evaluate/words-shapes/metrics.json").read_text())
    assert 0 <= scores["ours"]["val"]["mIoU"] <= 1
    registered = json.loads((root / "mlflow/registered/words-shapes.json").read_text())
    assert registered["model"] == "ris-words-shapes"
    assert registered["decision"].startswith("champion: ")
    assert "models:/ris-words-shapes/1" in done.stdout
