"""The model card of a version, in Markdown: what it is for, how good it is and where not, where it comes from, and its licences.

Sections as Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019) ask for, as far as there is something to tell.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.scores import BEST, LOCATED, ORACLE, SHUFFLED
from ris_core.models.registry import system_class
from ris_core.options import Plain

MOST = 4900  # characters that MLflow's stores keep of a description
TITLES = {
    "cris": "CRIS (Wang et al., CVPR 2022)",
    "risclip": "RISCLIP (Kim et al., NAACL 2024)",
    "lts": "LTS, Locate Then Segment (Jing et al., CVPR 2021)",
    "global_local": "Global-Local, zero-shot (Yu et al., CVPR 2023)",
}
SYNTHETIC = "The data is synthetic and written by this project (MIT): no photo, no annotation of anybody else is in it."
REAL = (
    "The expressions of RefCOCO and RefCOCO+ were published under Apache 2.0, those of RefCOCOg under CC BY 4.0, as COCO's "
    "annotations; COCO's photos are their authors' on Flickr, under the terms each of them chose."
)
CONTROLS = {
    SHUFFLED[0]: "given sentences about other objects of the same picture",
    SHUFFLED[1]: "given sentences from all over the split",
    LOCATED: "its location map read as the mask",
    ORACLE: "choosing among the annotated objects",
    BEST: "the best of its proposals, an upper bound",
}


def model_card(name: str, system: str, dataset: str, facts: Plain, tags: Plain, gate: Sequence[str]) -> str:
    """Write the card. facts: `metrics` (of the protocol that decides, by split), `behaviour`, `setting`, `run`, as far as known.

    tags: those of the version; gate: lines about the comparison with the champion.
    """
    notice = system_class(system).notice
    synthetic = dataset.startswith("shapes")
    generalised = "N_acc" in facts["metrics"].get(tags["split"], {})
    what = "all objects, or none," if generalised else "the object"
    parts = [
        f"# {name}",
        f"{TITLES.get(system, system)}: given a picture and an expression, the mask of {what} that it refers to.",
        "## Intended use",
        f"Referring image segmentation of {'any number of objects' if generalised else 'one object'} by an English expression"
        + (
            ", on drawings of coloured shapes as in the embedded dataset: a demonstration, which knows no photos."
            if synthetic
            else f", on photos as {dataset} has them."
        ),
        f"{_about_nothing(facts['metrics'].get(tags['split'], {}))} Not for decisions about people.",
        "## Scores",
        f"Protocol `{tags['protocol']}`; in brackets 95 % intervals over images. mIoU is the mean over expressions, oIoU the sum "
        "of intersections over the sum of unions.",
        _table(facts["metrics"]),
        *_controls(facts["metrics"].get(tags["split"], {})),
        "## Limits",
        *_weak(facts["metrics"].get(tags["split"], {})),
        *_behaviour(facts.get("behaviour")),
        "## Comparison",
        *gate,
        "## Where it comes from",
        _lineage(tags, facts.get("run")),
        "## Licences",
        f"The code: MIT. {SYNTHETIC if synthetic else REAL} The weights of a CLIP that was not trained here have their "
        "own licence (OpenAI's: MIT).",
    ]
    return "\n\n".join(([notice] if notice else []) + [part for part in parts if part]) + "\n"


def _about_nothing(part: Plain) -> str:
    """Tell what comes of expressions that refer to nothing, where that was scored."""
    if "N_acc" not in part:
        return "Not for expressions that may refer to nothing: it always answers, see below."
    if not part["no_target"]:
        return "How it answers expressions that refer to nothing is not known: none was scored."
    return (
        f"Of expressions that refer to nothing {part['N_acc']:.0%} are answered with an empty mask (N-acc.), of others "
        f"{1 - part['T_acc']:.0%} are, wrongly."
    )


def shortened(card: str) -> str:
    """Give a card as a description, which stores cut where it is longer; the whole is among the version's files."""
    told = "\n\n(The whole card is `evaluation/card.md` among this version's files.)\n"
    return card if len(card) <= MOST else card[: MOST - len(told)].rpartition("\n")[0] + told


def scored(part: Plain, measure: str) -> str:
    """Give a score with its interval, where it has one."""
    interval = part.get(f"{measure}_95")
    return f"{part[measure]:.5f}" + (f" [{interval[0]:.5f}, {interval[1]:.5f}]" if interval else "")


def _table(metrics: Plain) -> str:
    lines = ["| split | expressions | mIoU | oIoU | Pr@0.5 |", "| --- | --- | --- | --- | --- |"]
    for split, part in metrics.items():
        cells = (split, part["expressions"], scored(part, "mIoU"), scored(part, "oIoU"), f"{part['Pr@0.5']:.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _controls(part: Plain) -> list[str]:
    found = [f"- {text}: {part[key]['mIoU']:.3f}" for key, text in CONTROLS.items() if key in part]
    if "random_object" in part:
        found.insert(0, f"- a true mask chosen blindly: {part['random_object']['mIoU']:.3f}")
    return ["For comparison, mIoU of", "\n".join(found)] if found else []


def _weak(part: Plain) -> list[str]:
    groups = part.get("by_kind", {})
    if not groups:
        return []
    ordered = sorted(groups.items(), key=lambda item: item[1]["mIoU"])
    told = ", ".join(f"{kind} {group['mIoU']:.3f} ({group['count']})" for kind, group in ordered)
    return [f"mIoU by kind of expression, worst first (how many): {told}."]


def _behaviour(found: Plain | None) -> list[str]:
    """Tell what the behavioural tests found (`ris_core.evaluation.behaviour`)."""
    if not found:
        return []
    lines = []
    mirror, swap, absent = (found.get(key, {}) for key in ("mirror", "swap", "absent"))
    if mirror.get("cases"):
        lines.append(
            f"- Of {mirror['cases']} pictures mirrored, with left and right exchanged in the text, {mirror['agree']:.0%} give "
            "the mirrored answer."
        )
    if swap.get("cases"):
        lines.append(
            f"- Where another colour or shape is named that is there ({swap['cases']}), {swap['followed']:.0%} answers follow it."
        )
    if absent.get("cases"):
        lines.append(
            f"- Asked for something that is not there ({absent['cases']}), {absent['empty_absent']:.0%} answers are empty; its "
            f"score tells present from absent with an AUROC of {absent['auroc']:.2f} (0.5 is chance)."
        )
    return ["\n".join(lines)] if lines else []


def _lineage(tags: Plain, run: str | None) -> str:
    names = {
        "git_commit": "commit",
        "code_digest": "code it answers with",
        "data_digest": "data",
        "clip_digest": "CLIP",
        "config_digest": "configuration",
        "weights_sha256": "weights",
        "dvc_lock_sha256": "dvc.lock",
    }
    lines = [f"- {text}: `{tags[key]}`" for key, text in names.items() if tags.get(key)]
    lines += [f"- training run: `{run}`"] if run else []
    told = "Parameters and all digests are in `evaluation/` among its files; `ris reproduce` makes it again."
    return "\n".join([*lines, f"\n{told}"])
