"""params.yaml is checked as a whole: everything that is wrong comes in one message, presets included."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from pipelines import params as orchestration
from ris_core.config import CLIPS, Params, load_params, preset_overrides
from ris_core.errors import ConfigError
from ris_core.models.cris.system import CRISConfig
from ris_core.models.global_local.system import GlobalLocalConfig
from ris_core.models.proposals import ProposalsParams
from ris_core.models.registry import first_stage, system_class, systems, trains
from ris_core.models.risclip.system import RISCLIPConfig
from ris_core.training.params import TrainParams

ROOT = Path(__file__).parents[2]


def written(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def complaints(folder: Path, text: str, load: Callable[[Path], Params] = load_params) -> list[str]:
    """The single problems of the ConfigError that a parameter file brings."""
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text))
    title, *lines = str(caught.value).splitlines()
    problems = [line.removeprefix("  - ") for line in lines]
    assert title == f"{folder}/params.yaml cannot be used ({len(problems)} problem{'s' * (len(problems) != 1)}):"
    return problems


def test_the_repositorys_own_parameters_load() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.preset == "default"
    assert params.datasets == ["shapes"]
    assert params.systems == ["cris", "risclip", "lts", "global_local"]
    assert isinstance(params.cris.model, CRISConfig)
    assert isinstance(params.risclip.model, RISCLIPConfig)
    assert isinstance(params.train, TrainParams)
    assert params.cris.model.vis_dim == params.cris.model.fpn_out[1]
    assert params.cris.initialise is None
    assert params.cris.train == params.train
    assert params.risclip.initialise is not None
    for stage in (params.risclip.initialise, params.risclip.train):
        assert (stage.batch_images, stage.word_len) == (params.train.batch_images, params.train.word_len)
        assert (stage.loss.bce_weight, stage.loss.focal_weight, stage.loss.dice_weight) == (0.0, 1.75, 1.0)
    assert isinstance(params.global_local.model, GlobalLocalConfig)
    assert (params.global_local.initialise, params.global_local.train) == (None, None)
    assert isinstance(params.proposals, ProposalsParams)
    assert params.proposals.felzenszwalb.scales == (300.0, 600.0, 1200.0)


@pytest.mark.parametrize("preset", ["cris", "cris_paper"])
def test_the_published_recipes_load(preset: str, tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text().replace("preset: default\n", f"preset: {preset}\n")
    params = load_params(written(tmp_path, text))
    train, model = params.cris.train, params.cris.model
    assert (train.lr, train.backbone_lr_multiplier, train.milestones) == (1e-4, 0.1, [35])
    assert (train.optimizer, train.batch_images, train.epochs) == ("adam", 64, 50)
    assert (model.vis_dim, model.num_layers, params.preprocess.image_size) == (512, 3, 416)
    assert model.round_fp16 == (preset == "cris_paper")
    assert train.first_epoch_backbone_multiplier == (1.0 if preset == "cris_paper" else None)
    loss = train.loss
    assert (loss.bce_weight, loss.positive_weight, loss.dice_weight, loss.focal_weight) == (1.0, 1.0, 0.0, 0.0)
    assert (params.clip_rn.architecture, params.clip_rn.weights) == ("RN50-quickgelu", "openai")


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    params, defaults = load_params(written(tmp_path, "")), Params()
    assert isinstance(params, Params)
    assert all(getattr(params, each.name) == getattr(defaults, each.name) for each in fields(Params))
    assert {each.name for each in fields(params)} == {each.name for each in fields(Params)} | set(systems())
    for system in systems():
        section = params.of(system)
        assert (section.clip, section.model) == (CLIPS[0], system_class(system).config_class())
        assert section.initialise == (TrainParams() if first_stage(system) else None)
        assert section.train == (TrainParams() if trains(system) else None)
    assert params == load_params(written(tmp_path, "")) != load_params(written(tmp_path, "lts: {clip: vit}"))
    whole = orchestration.load_params(written(tmp_path, ""))
    assert (whole.register, whole.cluster) == (orchestration.RegisterParams(), orchestration.ClusterParams())


def test_sections_are_found_by_their_names(tmp_path: Path) -> None:
    params = load_params(written(tmp_path, "cris: {train: {lr: 0.5}}\nclip_vit: {steps: 7}\n"))
    assert params.of("cris") is params.cris
    assert params.of("cris").train is not None
    assert params.of("cris").train.lr == 0.5
    assert (params.clip("rn"), params.clip("vit")) == (params.clip_rn, params.clip_vit)
    assert params.clip("vit").steps == 7
    with pytest.raises(ConfigError, match="there is no system 'lavt'; there are cris, global_local, lts, risclip"):
        params.of("lavt")
    with pytest.raises(ConfigError, match="there is no CLIP 'vitt'; there are rn, vit"):
        params.clip("vitt")


def test_the_library_leaves_the_sections_of_the_orchestration_alone(tmp_path: Path) -> None:
    text = "cluster: {nodes: 3}\nregister: 7\npresets: {long: {cluster: {use_gpu: no_idea}}}\n"
    assert load_params(written(tmp_path, text)).systems == ["cris"]
    assert not hasattr(load_params(written(tmp_path, text)), "cluster")
    agree(
        complaints(tmp_path, text, orchestration.load_params),
        {
            "cluster.nodes": "unknown parameter; known here: train_workers, ",
            "register": "expected a section with split, metric, minimum, ",
            "presets.long.cluster.use_gpu": "'no_idea' is not one of auto, yes, no",
        },
    )


def test_all_problems_of_sections_and_presets_come_at_once(tmp_path: Path) -> None:
    problems = complaints(
        tmp_path,
        """
        preset: quick
        trian: {epochs: 3}
        datasets: [refcoco, shapes]
        preprocess: {image_size: 16, storage: png}
        train: {epochs: many, optimzer: adam, loss: 3, lr: .nan, ema_decay: 1.0, seed: null, compile: maybe}
        evaluate:
        cris: {model: {vis_dim: 130, fpn_out: [16, 32]}}
        synthesize: {canvas: 4}
        presets:
          long: {train: {epochs: 0, weigth_decay: 1}, cluster: {use_gpu: no_idea}}
          odd: 3
          wide: {cris: {model: {dropout: 1.5}}, register: {metric: IoU}}
        """,
        orchestration.load_params,
    )
    expected = {
        "trian": "did you mean 'train'?",
        "datasets": "there is no dataset 'refcoco': did you mean refcoco_unc or refcoco_google? ",
        "preprocess.image_size": "16 is below the minimum 32",
        "preprocess.storage": "'png' is not one of pixels, jpeg",
        "train.epochs": "Value 'many' of type 'str' could not be converted to Integer",
        "train.optimzer": "unknown parameter; did you mean 'optimizer'?",
        "train.loss": "expected a section with bce_weight, positive_weight, dice_weight, focal_weight, ",
        "train.lr": "nan is below the minimum 0",
        "train.ema_decay": "1.0 is not below 1",
        "train.seed": "not Optional",
        "train.compile": "Value 'maybe' is not a valid bool",
        "evaluate": "expected a section with protocols",
        "cris.model.fpn_out": "expected 3 values, found [16, 32]",
        "synthesize": "canvas is 4: use 64 to 1024 pixels",
        "presets.long.train.epochs": "0 is below the minimum 1",
        "presets.long.train.weigth_decay": "did you mean 'weight_decay'?",
        "presets.long.cluster.use_gpu": "'no_idea' is not one of auto, yes, no",
        "presets.odd": "expected sections, found 3",
        "presets.wide.register.metric": "'IoU' is not one of mIoU, oIoU",
        "preset": "no preset named 'quick'; there are long, wide",
    }
    agree(problems, expected)


def agree(problems: list[str], expected: dict[str, str]) -> None:
    """There is one problem for each expected key, and it contains what is expected of it."""
    found = dict(problem.split(": ", 1) for problem in problems)
    assert set(found) == set(expected)
    assert len(found) == len(problems)
    for key, text in expected.items():
        assert text in found[key]


def test_sections_within_sections_are_checked_alike(tmp_path: Path) -> None:
    problems = complaints(
        tmp_path,
        """
        cris: {vis_dim: 64, clip: vitt, model: 7, initialise: {}, train: {lr: fast, loss: {focal_alpha: 1.0}}}
        risclip: {initialise: none, train: [1], model: {ske_heads: many}, clip: null}
        clips: [rn, vit, openai]
        presets:
          bare: {risclip: {initialise: 3, train: none}}
          wide: {risclip: {initialise: {lr: -1, loss: {focal: 1}}}, cris: {modell: {}}}
        """,
    )
    expected = {
        "cris.vis_dim": "unknown parameter; known here: clip, model, initialise, train",
        "cris.clip": "'vitt' is not one of rn, vit",
        "cris.model": "expected a section with vis_dim, fpn_out, ",
        "cris.initialise": "cris has no such training: set it to null",
        "cris.train.lr": "Value 'fast' of type 'str' could not be converted to Float",
        "cris.train.loss.focal_alpha": "1.0 is not below 1",
        "risclip.initialise": "expected a section with seed, epochs, ",
        "risclip.train": "expected a section with seed, epochs, ",
        "risclip.model.ske_heads": "Value 'many' of type 'str' could not be converted to Integer",
        "risclip.clip": "not Optional",
        "clips": "'openai' is not one of rn, vit",
        "presets.bare.risclip.initialise": "expected a section with seed, epochs, ",
        "presets.bare.risclip.train": "expected a section with seed, epochs, ",
        "presets.wide.risclip.initialise.lr": "-1.0 is below the minimum 0",
        "presets.wide.risclip.initialise.loss.focal": "unknown parameter; did you mean 'focal_",
        "presets.wide.cris.modell": "unknown parameter; did you mean 'model'?",
    }
    agree(problems, expected)


def test_a_name_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    (problem,) = complaints(tmp_path, "prepare: {zzz: 1}")
    assert problem == "prepare.zzz: unknown parameter; known here: on_bad, strict, check_images, exclude_images_of"


def test_frozen_sections_are_checked_by_their_own_rules(tmp_path: Path) -> None:
    problems = complaints(
        tmp_path, "cris: {model: {vis_dim: 130, num_heads: 7}}\nsynthesize: {sentences_per_ref: [3, 2]}\n"
    )
    assert problems == [
        "cris: fpn_out is (256, 512, 1024): its second entry must equal vis_dim 130",
        "cris: vis_dim is 130: use a multiple of 4 (2D sine positions)",
        "cris: num_heads is 7: it must divide vis_dim 130",
        "synthesize: sentences_per_ref is 3 to 2: use 1 <= least <= most <= 5",
    ]


def test_an_unselected_preset_is_checked_over_the_sections_below_it(tmp_path: Path) -> None:
    """The preset's width alone is fine; with the file's heads it is not."""
    text = "cris: {model: {vis_dim: 96, fpn_out: [16, 96, 32], num_heads: 3}}\n"
    assert load_params(written(tmp_path, text)).cris.model.num_heads == 3
    problems = complaints(
        tmp_path, text + "presets:\n  wide: {cris: {model: {vis_dim: 128, fpn_out: [16, 128, 32]}}}\n"
    )
    assert problems == ["presets.wide.cris: num_heads is 3: it must divide vis_dim 128"]


def test_a_chosen_preset_wins_over_the_sections_and_says_what_it_sets(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        preset: long
        train: {epochs: 4, lr: 0.01, loss: {dice_weight: 0.5}}
        presets:
          long: {train: {epochs: 40, lr: 0.01, loss: {positive_weight: 2.0}}, datasets: [shapes, shapes+]}
          other: {train: {epochs: 7}}
        """,
    )
    params = load_params(path)
    assert (params.train.epochs, params.train.lr, params.datasets) == (40, 0.01, ["shapes", "shapes+"])
    assert (params.train.loss.dice_weight, params.train.loss.positive_weight) == (0.5, 2.0)
    assert preset_overrides(path) == [
        "train.epochs: 4 -> 40",
        "train.loss.positive_weight: None -> 2.0",
        "datasets: None -> ['shapes', 'shapes+']",
    ]


def test_each_training_is_laid_over_what_they_share(tmp_path: Path) -> None:
    params = load_params(
        written(
            tmp_path,
            """
            train: {epochs: 4, lr: 0.01, word_len: 20, loss: {dice_weight: 0.5}}
            cris: {train: {lr: 0.02}}
            risclip: {initialise: {epochs: 9, loss: {bce_weight: 0.0}}}
            """,
        )
    )
    assert (params.cris.train.epochs, params.cris.train.lr, params.cris.train.word_len) == (4, 0.02, 20)
    assert params.cris.initialise is None
    first = params.risclip.initialise
    assert first is not None
    assert (first.epochs, first.lr, first.word_len) == (9, 0.01, 20)
    assert (first.loss.bce_weight, first.loss.dice_weight) == (0.0, 0.5)
    assert params.risclip.train == params.train  # it says nothing of its own
    assert (params.train.epochs, params.train.lr) == (4, 0.01)


def test_a_preset_changes_what_trainings_share_and_what_they_do_not(tmp_path: Path) -> None:
    """What a system says of its own stands against the shared section of a preset."""
    text = """
        preset: long
        train: {epochs: 4, lr: 0.01}
        cris: {train: {lr: 0.02}}
        risclip: {initialise: {epochs: 9}, train: {epochs: 1}}
        presets:
          long: {train: {epochs: 40, lr: 0.05, warmup_steps: 7}, risclip: {train: {epochs: 2}}}
          alone: {risclip: {initialise: null}}
        """
    params = load_params(written(tmp_path, text))
    assert (params.train.epochs, params.train.lr) == (40, 0.05)
    assert (params.cris.train.epochs, params.cris.train.lr) == (40, 0.02)
    assert params.risclip.initialise is not None
    assert (params.risclip.initialise.epochs, params.risclip.initialise.lr) == (9, 0.05)
    assert (params.risclip.train.epochs, params.risclip.train.warmup_steps) == (2, 7)
    alone = load_params(written(tmp_path, text.replace("preset: long", "preset: alone")))
    assert alone.risclip.initialise is None
    assert (alone.risclip.train.epochs, alone.risclip.train.lr) == (1, 0.01)


def test_a_first_stage_that_is_not_mentioned_shares_too_and_null_is_none(tmp_path: Path) -> None:
    silent = load_params(written(tmp_path, "train: {epochs: 3}\n"))
    assert silent.cris.initialise is None
    assert silent.risclip.initialise == silent.risclip.train == silent.train
    assert silent.train.epochs == 3
    without = load_params(written(tmp_path, "train: {epochs: 3}\nrisclip: {initialise: null}\n"))
    assert without.risclip.initialise is None
    assert without.risclip.train.epochs == 3


def test_lists_of_any_length_are_as_long_as_they_are_written(tmp_path: Path) -> None:
    model = load_params(
        written(tmp_path, "risclip: {model: {decoder_channels: [16], skip_layers: [2]}}\n")
    ).risclip.model
    assert (model.decoder_channels, model.skip_layers) == ((16,), (2,))
    problems = complaints(tmp_path, "risclip: {model: {decoder_channels: [16, 8], skip_layers: [2]}}\n")
    expected = "skip_layers is (2,): use as many layers as decoder_channels has stages, 2"
    assert problems == [f"risclip: {expected}"]


def test_a_system_whose_clip_is_not_made_ready(tmp_path: Path) -> None:
    text = "systems: [cris, risclip]\nclips: [rn]\nrisclip: {clip: vit}\n"
    assert complaints(tmp_path, text) == ["risclip.clip: 'vit' is not among clips (rn)"]
    both = "systems: [cris, risclip]\nclips: [vit]\nrisclip: {clip: rn}\n"
    assert complaints(tmp_path, both) == [f"{name}.clip: 'rn' is not among clips (vit)" for name in ("cris", "risclip")]
    unused = text.replace("[cris, risclip]", "[cris]")
    assert load_params(written(tmp_path, unused)).risclip.clip == "vit"


def test_each_system_has_the_trainings_that_its_class_has(tmp_path: Path) -> None:
    text = """
        systems: [cris, global_local]
        cris: {initialise: {lr: 0.1}, train: null}
        global_local: {initialise: {}, train: {lr: 0.1}}
        """
    assert complaints(tmp_path, text) == [
        "cris.initialise: cris has no such training: set it to null",
        "cris.train: cris needs this training: it cannot be null",
        "global_local.initialise: global_local has no such training: set it to null",
        "global_local.train: global_local has no such training: set it to null",
    ]
    in_preset = "cris: {train: {lr: 0.1}}\npresets: {bare: {cris: {train: null}, lts: {initialise: {}}}}\n"
    assert complaints(tmp_path, in_preset) == [
        "presets.bare.cris.train: cris needs this training: it cannot be null",
        "presets.bare.lts.initialise: lts has no such training: set it to null",
    ]


def test_a_zero_shot_system_trains_nothing_unless_told_wrongly(tmp_path: Path) -> None:
    for section in ("", "global_local: {initialise: null, train: null}\n", "global_local: {model: {alpha: 0.5}}\n"):
        params = load_params(written(tmp_path, f"systems: [global_local]\ntrain: {{epochs: 3}}\n{section}"))
        assert (params.global_local.initialise, params.global_local.train) == (None, None)


def test_wrong_proposals_are_told_with_everything_else(tmp_path: Path) -> None:
    problems = complaints(
        tmp_path,
        """
        proposals: {generator: mcg, felzenszwalb: {scale: 3}, sam: {pred_iou: high}, split: [val]}
        global_local: {model: {alpha: 2, empty_proposals: skip}}
        presets:
          tight: {proposals: {felzenszwalb: {min_area: 0.9}}}
          loose: {proposals: {sam: {stability: 2}}, global_local: {model: {beta: -1}}}
        """,
    )
    expected = {
        "proposals.generator": "'mcg' is not one of felzenszwalb, sam",
        "proposals.felzenszwalb.scale": "unknown parameter; did you mean 'scales'?",
        "proposals.sam.pred_iou": "Value 'high' of type 'str' could not be converted to Float",
        "proposals.split": "unknown parameter; did you mean 'splits'?",
        "global_local.model.empty_proposals": "unknown parameter; ",
    }
    agree(problems, expected)
    problems = complaints(
        tmp_path,
        """
        global_local: {model: {alpha: 2}}
        presets:
          tight: {proposals: {felzenszwalb: {min_area: 0.9}}}
          loose: {proposals: {sam: {stability: 2}}}
        """,
    )
    expected = {
        "global_local": "alpha is 2.0: use 0 to 1",
        "presets.tight.proposals": "min_area is 0.9 and max_area 0.9: use 0 <= min_area < max_area <= 1",
        "presets.loose.proposals": "stability is 2.0: use 0 to 1",
    }
    agree(problems, expected)


FIFTH = """
from __future__ import annotations

from dataclasses import dataclass

from ris_core.models.contract import MapSystem, SystemConfig


@dataclass(frozen=True)
class MineConfig(SystemConfig):
    width: int = 7


class Mine(MapSystem[object, object]):
    config_class = MineConfig


SYSTEM = Mine
"""
WITH_A_FIFTH = """
import sys
import ris_core.models
ris_core.models.__path__.append(sys.argv[1])
from ris_core.config import load_params
from ris_core.models.registry import systems, trains
params = load_params(sys.argv[2])
mine = params.of("mine")
print(systems(), params.systems, mine.model.width, mine.initialise, mine.train.lr, trains("mine"))
"""


def test_a_fifth_system_is_a_folder_and_a_section(tmp_path: Path) -> None:
    (tmp_path / "models/mine").mkdir(parents=True)
    (tmp_path / "models/mine/__init__.py").write_text(FIFTH)
    path = written(tmp_path, "systems: [mine]\ntrain: {lr: 0.5}\nmine: {model: {width: 9}}\n")
    command = [sys.executable, "-c", WITH_A_FIFTH, str(tmp_path / "models"), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['cris', 'global_local', 'lts', 'mine', 'risclip'] ['mine'] 9 None 0.5 True\n"
    known = ", ".join(each.name for each in fields(Params))
    agree(
        complaints(tmp_path, path.read_text()),
        {
            "systems": "'mine' is not one of cris, global_local, lts, risclip",
            "mine": f"unknown parameter; known here: {known}, cris, global_local, lts, risclip",
        },
    )


def test_a_preset_can_be_laid_over_another(tmp_path: Path) -> None:
    text = """
        preset: quick
        train: {epochs: 4, lr: 0.01, word_len: 20}
        presets:
          quick: {base: middle, train: {lr: 0.3}}
          middle: {base: long, train: {lr: 0.2, word_len: 21}, datasets: [shapes+]}
          long: {train: {epochs: 40, lr: 0.1}, datasets: [shapes, shapesg]}
          same: {base: middle}
        """
    path = written(tmp_path, text)
    params = load_params(path)
    assert (params.train.epochs, params.train.lr, params.train.word_len) == (40, 0.3, 21)
    assert params.datasets == ["shapes+"]
    assert sorted(preset_overrides(path)) == [
        "datasets: None -> ['shapes+']",
        "train.epochs: 4 -> 40",
        "train.lr: 0.01 -> 0.3",
        "train.word_len: 20 -> 21",
    ]
    same = load_params(written(tmp_path, text.replace("preset: quick", "preset: same")))
    assert (same.train.epochs, same.train.lr, same.train.word_len) == (40, 0.2, 21)
    assert same == replace(
        load_params(written(tmp_path, text.replace("preset: quick", "preset: middle"))), preset="same"
    )


def test_bases_that_lead_nowhere_are_named_with_everything_else(tmp_path: Path) -> None:
    text = """
        presets:
          lost: {base: nowhere, train: {lr: 0.1}}
          after: {base: lost}
          round: {base: again}
          again: {base: round}
          wrong: {base: fine, train: {epochs: 0}}
          fine: {train: {lr: -1}}
        """
    expected = {
        "presets.lost.base": "'nowhere' is no preset",
        "presets.after.base": "'lost' is no preset",
        "presets.round.base": "'again' is no preset that ends",
        "presets.again.base": "'round' is no preset that ends",
        "presets.wrong.train.epochs": "0 is below the minimum 1",
        "presets.wrong.train.lr": "-1.0 is below the minimum 0",
        "presets.fine.train.lr": "-1.0 is below the minimum 0",
    }
    agree(complaints(tmp_path, text), expected)


def test_the_default_preset_sets_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {epochs: 4}\npresets: {default: {}, long: {train: {epochs: 40}}}\n")
    assert load_params(path).train.epochs == 4
    assert preset_overrides(path) == []


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such parameter file; run from the repository root"):
        load_params(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: [", "is not valid YAML"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}\n", "found duplicate key train"),
        ("- train\n", "expected sections"),
        ("3", "is not a parameter file"),
        ("presets: 3\n", "presets: expected a mapping of names to sections, found 3"),
    ],
)
def test_what_is_no_parameter_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_params(written(tmp_path, text))
    assert "params.yaml" in str(caught.value)
