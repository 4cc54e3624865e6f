"""Stages killed in the midst of their work: nothing that looks whole is left, and starting again ends as if undisturbed.

(Killed trainings are in test_train.py.)
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from pipelines_world import DATASET, Workplace, contents, started, wait_for

from pipelines import paths, preprocess
from ris_core.data.dataset import ShardStore
from ris_core.data.refer.reader import DatasetName, read_refer
from ris_core.data.shapes.synthetic import write_dataset
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.errors import DataError

PER_SHARD = 4


def test_synthesize_killed_and_started_again(workplace: Workplace, tmp_path: Path) -> None:
    params = workplace.change(synthesize={"canvas": 64, "train": 250})
    raw = workplace.root / paths.raw(DATASET)
    with started("-m", "pipelines.synthesize", "--dataset", DATASET, cwd=workplace.root) as process:
        wait_for(lambda: any(raw.rglob("*.jpg")), process)
    assert process.returncode == -signal.SIGKILL
    assert not (raw / DATASET).exists()
    with pytest.raises(DataError, match="no such file"):
        read_refer(raw, DatasetName.parse(DATASET))
    done = workplace.stage("synthesize", "--dataset", DATASET)
    assert done.returncode == 0, done.stderr
    write_dataset(tmp_path / "undisturbed", DATASET, params.synthesize, progress=False)
    assert contents(raw) == contents(tmp_path / "undisturbed")


@pytest.mark.ray
def test_preprocess_killed_and_started_again(workplace: Workplace, ray_session: None, tmp_path: Path) -> None:
    """One image is a pipe into which nothing flows: whoever opens it stands still, and the stage is in its midst."""
    import ray

    workplace.link("raw", "records")
    workplace.change(preprocess={"images_per_shard": PER_SHARD})
    records = workplace.tiny.records()
    last = workplace.own(paths.raw(DATASET)) / records[-1].file_name
    last.unlink()
    os.mkfifo(last)
    out = workplace.root / paths.shards(DATASET)
    whole = -(-len(records) // PER_SHARD) - 1  # all shards but the one that stands still
    address = ray.get_runtime_context().gcs_address
    command = ("-m", "pipelines.preprocess", "--dataset", DATASET)
    with started(*command, cwd=workplace.root, RAY_ADDRESS=address) as process:
        wait_for(lambda: len(list(out.parent.glob("*.partial-*/part-*.arrow"))) == whole, process)
    assert process.returncode == -signal.SIGKILL
    (work,) = out.parent.iterdir()
    assert not out.exists()
    with pytest.raises(DataError, match="run the preprocess stage"):
        ShardStore(work)
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("part-*.arrow")}

    last.unlink()
    last.write_bytes((workplace.tiny.raw / records[-1].file_name).read_bytes())
    preprocess.main(DATASET)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished  # kept, not written again
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    options = ShardOptions(image_size=64)
    parts = [records[first : first + PER_SHARD] for first in range(0, len(records), PER_SHARD)]
    entries = [
        write_shard(undisturbed / f"part-{number:05d}.arrow", part, workplace.tiny.raw, options)
        for number, part in enumerate(parts)
    ]
    write_manifest(undisturbed, DATASET, options, entries)
    assert contents(out) == contents(undisturbed)
    assert list(out.parent.iterdir()) == [out]
