"""What a stage reads: only what DVC watches for it, and what DVC has seen."""

from __future__ import annotations

import pytest
from pipelines_world import Workplace

from pipelines import paths, resolve, stage
from ris_core.errors import ConfigError


def test_without_dvc_no_resolved_values_are_asked_for(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert stage.params("train", "cris").of("cris").train == workplace.tiny.params().of("cris").train
    resolve.main()
    workplace.change(train={"lr": 0.5})
    section = stage.params("train", "cris").of("cris")
    assert section.train is not None
    assert section.train.lr == 0.5  # and none that are there is looked at


@pytest.mark.parametrize(
    ("what", "item", "changes"),
    [
        ("train", "cris", {"train": {"lr": 0.5}}),
        ("train", "cris", {"preset": "other", "presets": {"other": {"cris": {"train": {"lr": 0.5}}}}}),
        ("initialise", "risclip", {"train": {"seed": 3}}),
        ("pretrain_clip", "vit", {"clip_vit": {"steps": 3}}),
        ("propose", None, {"systems": ["global_local"], "proposals": {"felzenszwalb": {"grow": 2}}}),
        ("evaluate", None, {"evaluate": {"seed": 3}}),
    ],
)
def test_parameters_that_were_edited_after_dvc_looked_are_refused(
    what: str, item: str | None, changes: dict[str, object], workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve.main()
    monkeypatch.setenv("DVC_STAGE", f"{what}@{item}")
    stage.params(what, item)  # equal values pass
    workplace.change(**changes)
    file = f"{what}-{item}" if item else what
    with pytest.raises(
        ConfigError,
        match=rf"^params\.yaml was changed since the stage resolve wrote results/params/{file}\.json, .*: run `dvc repro`",
    ):
        stage.params(what, item)
    resolve.main()
    stage.params(what, item)


def test_edits_of_what_the_stage_does_not_read_are_none_of_its_business(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve.main()
    monkeypatch.setenv("DVC_STAGE", "train@cris-shapes")
    workplace.change(
        evaluate={"seed": 3},
        risclip={"train": {"lr": 0.5}},
        cluster={"train_workers": 2},
        register={"experiment": "other"},
        train={"loader_workers": 2},
    )
    chosen = stage.params("train", "cris")
    assert (chosen.cluster.train_workers, chosen.register.experiment) == (2, "other")


def test_dvc_is_told_of_a_late_edit_by_a_message_alone(workplace: Workplace) -> None:
    resolve.main()
    workplace.change(synthesize={"canvas": 96})
    done = workplace.stage("synthesize", "--dataset", "shapes", DVC_STAGE="synthesize@shapes")
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml was changed since the stage resolve wrote")
    assert "run `dvc repro` (or `make repro`) again" in done.stderr
    assert not paths.raw("shapes").exists()


def test_what_dvc_does_not_watch_cannot_be_read(workplace: Workplace) -> None:
    chosen = stage.params("train", "cris")
    section = chosen.of("cris")
    assert section.train is not None
    assert section.train.epochs == 2
    with pytest.raises(
        LookupError, match=r"^stage train reads evaluate\.seed: name it in pipelines\.inputs\.SECTIONS$"
    ):
        chosen.evaluate.seed  # noqa: B018
    with pytest.raises(LookupError, match=r"^stage train reads cris\.initialise\.lr: "):
        section.initialise.lr  # type: ignore[union-attr] # noqa: B018
    with pytest.raises(LookupError, match=r"^stage train reads systems: "):
        list(chosen.systems)
    assert workplace.tiny.params().evaluate.seed == 0  # the others' parameters are as they were
