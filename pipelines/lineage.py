"""What a version tells of itself, alone: its code, data, parameters, run and scores, the comparison it won or lost, its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipelines import fingerprint, gate, paths, versions
from pipelines.model_card import model_card
from pipelines.paired import MEASURES
from ris_core import files
from ris_core.models.registry import WEIGHTS, ModelInfo
from ris_core.options import Plain

KEPT = ("metrics.json", "protocols.json", "behaviour.json", "setting.json", "cost.json")  # of an evaluation
CARD = "card.md"


def tags(system: str, model: Path, info: ModelInfo) -> dict[str, str]:
    """Give the tags that say where a model comes from."""
    return {
        "git_commit": fingerprint.git_commit(),
        "code_digest": fingerprint.served_code(system),
        "data_digest": info.data_digest,
        "clip_digest": info.clip_digest,
        "config_digest": info.config_digest,
        "weights_sha256": files.file_sha256(model / WEIGHTS),
        "threads": str(torch.get_num_threads()),  # of each stage: sums are added up in their order
        "dvc_lock_sha256": files.file_sha256(Path("dvc.lock")) if Path("dvc.lock").exists() else "none",
    }


def keep(candidate: gate.Candidate, info: ModelInfo, parts: Plain, verdict: gate.Verdict, out: Path) -> str:
    """Write beside the comparison all that a version has to tell of itself; its card."""
    evaluation = paths.evaluation(candidate.system, candidate.dataset)
    for name in KEPT:
        if (evaluation / name).exists():
            shutil.copyfile(evaluation / name, out / name)
    for file in (paths.PARAMS, Path("dvc.lock")):
        if file.exists():
            shutil.copyfile(file, out / file.name)
    pq.write_table(candidate.table, out / f"{candidate.protocol.name}-{candidate.split}.parquet")
    values = {path.stem: json.loads(path.read_text()) for path in sorted(paths.WATCHED.glob("*.json"))}
    files.write_json(
        out / versions.LINEAGE,
        {
            "model": candidate.name,
            "system": candidate.system,
            "dataset": candidate.dataset,
            "tags": candidate.tags,
            "run": info.run,
            "first_stage_run": info.first_stage_run,
            "values": values,
        },
    )
    facts: Plain = {"metrics": parts, "run": info.run}
    for name in ("behaviour", "setting"):
        if (evaluation / f"{name}.json").exists():
            facts[name] = json.loads((evaluation / f"{name}.json").read_text())
    card = model_card(
        candidate.name, candidate.system, candidate.dataset, facts, candidate.tags, compared(verdict, candidate)
    )
    files.write_text(out / CARD, card)
    return card


def compared(verdict: gate.Verdict, candidate: gate.Candidate) -> list[str]:
    """Give the lines of a card about the champion that a version met."""
    decided = verdict.why if verdict.alias is None else f"Became {verdict.alias}: {verdict.why}."
    if verdict.comparison is None:
        return [decided]
    found = verdict.comparison
    lines = ["| measure | difference | 95 % interval | p |", "| --- | --- | --- | --- |"]
    for measure in MEASURES:
        low, high = found[measure]["interval"]
        lines.append(
            f"| {measure} | {found[measure]['difference']:+.5f} | {low:+.5f} to {high:+.5f} | {found[measure]['p']:.3f} |"
        )
    on = f"{found['expressions']} expressions about {found['images']} images of {candidate.split}"
    again = f" ({found['rescored']}, so it was scored again)" if found["rescored"] else ""
    return [decided, f"To version {found['champion']}, the champion then, on {on}{again}:", "\n".join(lines)]
