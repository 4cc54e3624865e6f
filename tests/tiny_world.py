"""Surroundings of all tests, set before any of our libraries is imported, and what takes long to make and is made once:
`tiny`, a whole small world, a Ray, and a server with buckets.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pipelines.params import Params
    from ris_core.data.dataset import ShardStore
    from ris_core.data.records import ImageRecord

os.environ.update(
    DVC_NO_ANALYTICS="1",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_HTTP_REQUEST_MAX_RETRIES="2",
    OMP_NUM_THREADS="1",  # tests are small: more threads cost more than they bring
    RAY_AUTH_MODE="disabled",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_USAGE_STATS_ENABLED="0",
)
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RIS_STORAGE"):
    os.environ.pop(name, None)  # tests never reach somebody's real cluster or server

DATASET = "shapes"
IMAGE_SIZE = 64
IMAGES_PER_SHARD = 10
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
VIT_ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PARAMS = f"""
systems: [cris, risclip]
clips: [rn, vit]
synthesize: {{seed: 5, canvas: 80, train: 24, val: 6, test: 4, refs_per_image: 3}}
proposals: {{felzenszwalb: {{scales: [100.0, 300.0], sigma: 0.5, min_size: 0.005, min_area: 0.008, max_area: 0.3}}}}
preprocess: {{image_size: {IMAGE_SIZE}, images_per_shard: {IMAGES_PER_SHARD}}}
train:
  epochs: 2
  steps_per_epoch: 3
  batch_images: 4
  expressions_per_image: 2
  word_len: 12
  lr: 1.0e-3
  precision: fp32
cris:
  model:
    vis_dim: 32
    fpn_out: [16, 32, 32]
    num_layers: 1
    num_heads: 2
    ffn_dim: 32
    dropout: 0.1
    freeze_token_embedding: true
risclip:
  clip: vit
  model:
    cfe_layers: 1
    cfe_dim: 16
    cfe_heads: 2
    adapter_dim: 4
    ske_blocks: 1
    ske_heads: 2
    ske_mlp_ratio: 1.0
    decoder_channels: [8]
    skip_layers: [2]
  initialise: {{lr: 5.0e-3, ema_decay: 0.5, loss: &loss {{bce_weight: 0.0, focal_weight: 1.75, dice_weight: 1.0}}}}
  train: {{ema_decay: 0.5, loss: *loss}}
lts:
  model:
    {{backbone: clip, text: clip_words, freeze_token_embedding: true, fusion_dim: 16, dim: 16, head_dim: 16, aspp_rates: [2]}}
global_local:
  model: {{short_side: 64, norm_stats: clip, fill: zero, box_mode: tight, noun_phrase: rules}}
evaluate: {{bootstrap_samples: 50, expressions_per_batch: 20}}
cluster: {{cpus_per_worker: 1, use_gpu: "no", max_failures: 0, evaluate_actors: 1}}
"""


@dataclass(frozen=True)
class Tiny:
    """A world of 38 pictures: raw/ (official REFER files), records.parquet, shards/, params.yaml, and two CLIPs with
    random weights: clip/ with a ResNet, clip_vit/ with a ViT.
    """

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def records_file(self) -> Path:
        return self.root / "records.parquet"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def clip(self) -> Path:
        return self.root / "clip"

    @property
    def clip_vit(self) -> Path:
        return self.root / "clip_vit"

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"

    @property
    def captions(self) -> Path:
        return self.raw / DATASET / "captions.json"

    def params(self) -> Params:
        """The parameters with the sections of the orchestration, to be changed as a test likes."""
        return deepcopy(_loaded(self.params_file))

    def records(self) -> list[ImageRecord]:
        from ris_core.data.records import read_records

        return read_records(self.records_file)

    def store(self) -> ShardStore:
        from ris_core.data.dataset import ShardStore

        return ShardStore(self.shards)


@cache
def _loaded(params_file: Path) -> Params:
    """Read once, as it takes a fifth of a second."""
    from pipelines.params import load_params

    return load_params(params_file)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Everything that training needs, made by the library's own functions. Tests must not change its files."""
    import torch

    from ris_core.data.records import write_records
    from ris_core.data.refer.audit import prepare
    from ris_core.data.shapes.synthetic import write_dataset
    from ris_core.data.shards import ShardOptions, write_manifest, write_shard
    from ris_core.models.clip import build_clip, save_clip

    world = Tiny(tmp_path_factory.mktemp("tiny"))
    world.params_file.write_text(PARAMS)
    write_dataset(world.raw, DATASET, world.params().synthesize, progress=False)
    records, _ = prepare(world.raw, DATASET, on_bad="error", strict=False, exclude={}, check_images=False, workers=1)
    write_records(world.records_file, records, DATASET)
    world.shards.mkdir()
    options = ShardOptions(IMAGE_SIZE)
    entries = [
        write_shard(world.shards / f"part-{i:05d}.arrow", records[first : first + IMAGES_PER_SHARD], world.raw, options)
        for i, first in enumerate(range(0, len(records), IMAGES_PER_SHARD))
    ]
    write_manifest(world.shards, DATASET, options, entries)
    for folder, architecture in ((world.clip, ARCHITECTURE), (world.clip_vit, VIT_ARCHITECTURE)):
        torch.manual_seed(0)
        save_clip(build_clip(architecture), folder, architecture, {})
    return world


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray of this machine for all tests that need it, with a cache of its own; the stages join it."""
    from pipelines import cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        with cluster.connected(num_cpus=4, log_to_driver=False):
            environment.undo()
            yield


@pytest.fixture(scope="session")
def new_bucket() -> Iterator[Callable[[], str]]:
    """A server on this machine that speaks S3; each call gives the URI of a folder in a bucket of its own."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line for every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "{}:{}".format(*server.get_host_and_port())
    count = itertools.count(1)

    def made() -> str:
        bucket = f"bucket-{next(count)}"
        S3FileSystem(endpoint_override=endpoint, scheme="http", allow_bucket_creation=True).create_dir(bucket)
        return f"s3://{bucket}/folder?endpoint_override={endpoint}&scheme=http"

    with pytest.MonkeyPatch.context() as environment:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            environment.setenv(f"AWS_{name}", "for-tests")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")  # nobody else is asked for credentials
        yield made
    server.stop()
