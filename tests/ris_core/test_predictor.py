"""What a downstream team uses: any kind of image in, masks at its own size out, and errors that help."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import IMAGE_SIZE, Tiny
from torch import nn

from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.images import load_image, read_image
from ris_core.data.proposal_store import ProposalStore, write_manifest, write_part
from ris_core.errors import ConfigError, DataError, WeightsError
from ris_core.evaluation.answers import MapAnswers, ProposalAnswers
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.queries import queries_of
from ris_core.models.answer import Reading
from ris_core.models.clip import load_saved_clip
from ris_core.models.proposals import felzenszwalb
from ris_core.models.registry import ModelInfo, build_model, export_model
from ris_core.predictor import MapPredictor, Prediction, RISPredictor

TEXTS = ["the red star", "left", "the large blue ring next to the star"]
INFO = ModelInfo(IMAGE_SIZE, word_len=12)


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = build_model("cris", tiny.params().cris.model, load_saved_clip(tiny.clip))
    with torch.no_grad():  # spread the answers of the untrained model around the threshold
        model.get_parameter("proj.txt.weight").mul_(4)
    place = tmp_path_factory.mktemp("model")
    export_model(
        place,
        "cris",
        model.state_dict(),
        tiny.params().cris.model,
        tiny.clip,
        INFO,
    )
    return place


@pytest.fixture
def predictor(folder: Path) -> RISPredictor:
    return RISPredictor.from_folder(folder)


@pytest.fixture
def picture(tiny: Tiny) -> Path:
    record = next(record for record in tiny.records() if record.height != record.width)
    return tiny.raw / record.file_name


def same(one: list[Prediction], other: list[Prediction]) -> bool:
    return all(
        a.score == b.score and (a.mask == b.mask).all() and (a.probability == b.probability).all()
        for a, b in zip(one, other, strict=True)
    )


def test_any_kind_of_image_gives_the_same_answer(predictor: RISPredictor, picture: Path) -> None:
    answers = []
    for image in (picture, str(picture), picture.read_bytes(), load_image(picture), Image.open(picture)):
        predictor.set_image(image)
        answers.append(predictor.predict(TEXTS))
    assert all(same(answers[0], other) for other in answers[1:])
    height, width = load_image(picture).shape[:2]
    assert height != width
    for one in answers[0]:
        assert one.mask.shape == one.probability.shape == (height, width)
        assert one.mask.dtype == bool
        assert (one.mask == (one.probability > 0.5)).all()
    assert any(0 < one.mask.mean() < 1 for one in answers[0])
    assert not (answers[0][0].probability == answers[0][1].probability).all(), "the text matters"


def test_the_score_is_the_mean_probability_inside(predictor: RISPredictor, picture: Path) -> None:
    predictor.set_image(picture)
    for one in predictor.predict(TEXTS):
        expected = one.probability[one.mask].mean() if one.mask.any() else 0.0
        assert one.score == pytest.approx(float(expected))
        assert isinstance(one.score, float)


def test_one_image_and_many_expressions_equal_one_by_one(predictor: RISPredictor, picture: Path) -> None:
    predictor.set_image(picture)
    together = predictor.predict(TEXTS)
    for text, one in zip(TEXTS, together, strict=True):
        (alone,) = predictor.predict([text])
        assert np.abs(alone.probability - one.probability).max() < 1e-5
        predictor.set_image(picture)
        (fresh,) = predictor.predict([text])
        assert same([fresh], [alone])


def test_an_image_is_encoded_once(
    predictor: RISPredictor, picture: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    assert isinstance(predictor, MapPredictor)
    encode = predictor.system.encode_image
    monkeypatch.setattr(predictor.system, "encode_image", lambda images: calls.append(images) or encode(images))
    predictor.set_image(picture)
    for text in TEXTS:
        predictor.predict([text])
    predictor.predict(TEXTS)
    assert len(calls) == 1


def test_run_lengths_decode_to_the_mask(predictor: RISPredictor, picture: Path) -> None:
    predictor.set_image(picture)
    for one in predictor.predict(TEXTS):
        height, width = one.rle["size"]
        assert (masks.decode(one.rle["counts"], height, width) == one.mask).all()


def test_the_threshold_can_be_chosen(folder: Path, predictor: RISPredictor, picture: Path) -> None:
    predictor.set_image(picture)
    (low,), (high,) = predictor.predict(TEXTS[:1], threshold=0.2), predictor.predict(TEXTS[:1], threshold=0.8)
    assert (low.mask == (low.probability > 0.2)).all()
    assert low.mask.sum() > high.mask.sum()
    (nothing,) = predictor.predict(TEXTS[:1], threshold=1.0)
    assert (nothing.mask.any(), nothing.score) == (False, 0.0)
    own = RISPredictor.from_folder(folder, threshold=0.2)
    own.set_image(picture)
    assert same(own.predict(TEXTS[:1]), [low])
    assert same(RISPredictor.from_folder(folder, reading=Reading(0.2)).answer(own.encode(picture), TEXTS[:1]), [low])


@pytest.mark.parametrize("threshold", [7, -0.1, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(
    threshold: float, folder: Path, predictor: RISPredictor, picture: Path
) -> None:
    predictor.set_image(picture)
    with pytest.raises(ConfigError, match=rf"the threshold is {threshold}: .* use 0 to 1"):
        predictor.predict(TEXTS, threshold=threshold)
    with pytest.raises(ConfigError, match=rf"the threshold is {threshold}: .* use 0 to 1"):
        RISPredictor.from_folder(folder, threshold=threshold)


def test_the_reading_of_a_protocol_gives_its_masks(folder: Path, tiny: Tiny) -> None:
    """What a gallery shows is what was scored: the same upsampling, resolution and threshold."""
    store, protocol = tiny.store(), PROTOCOLS["cris"]
    predictor = RISPredictor.from_folder(folder, reading=protocol.reading)
    assert isinstance(predictor, MapPredictor)
    queries = queries_of(store, "val", protocol)[:9]
    scored = MapAnswers(predictor.system, 12)(store, queries, protocol)
    usual, differing = RISPredictor.from_folder(folder), 0
    for image, answers in scored.items():
        photo = tiny.raw / store.row(image)["file_name"]
        texts = [query.text for query in queries if query.image == image]
        found = predictor.answer(predictor.encode(photo), texts)
        for one, other, mask in zip(found, usual.answer(usual.encode(photo), texts), answers.masks, strict=True):
            assert one.mask.shape == mask.shape
            assert int((one.mask != mask.numpy()).sum()) <= 8, "only pixels at the threshold may differ"
            differing += int(one.mask.shape != other.mask.shape or (one.mask != other.mask).sum() > 8)
    assert differing, "the usual reading is another one"


def test_what_is_known_of_an_image_belongs_to_whoever_asks(predictor: RISPredictor, tiny: Tiny) -> None:
    photos = [tiny.raw / record.file_name for record in tiny.records()[:3]]
    expected = []
    for photo in photos:
        predictor.set_image(photo)
        expected.append(predictor.predict(TEXTS))
    assert not same(expected[0], expected[1])
    encoded = [predictor.encode(photo) for photo in photos]
    for _ in range(2):
        for one, answers in zip(encoded, expected, strict=True):
            assert same(predictor.answer(one, TEXTS), answers)
    assert same(predictor.predict(TEXTS), expected[-1]), "the image last set is still that"
    with pytest.raises(FrozenInstanceError):
        encoded[0].height = 3  # type: ignore[misc]


def test_threads_that_share_a_predictor_get_their_own_answers(predictor: RISPredictor, tiny: Tiny) -> None:
    photos = [tiny.raw / record.file_name for record in tiny.records()[:6]]
    expected = [predictor.answer(predictor.encode(photo), TEXTS) for photo in photos]

    def ask(n: int) -> bool:
        return same(predictor.answer(predictor.encode(photos[n % 6]), TEXTS), expected[n % 6])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(48)))


def test_it_sees_what_the_evaluator_sees(predictor: RISPredictor, tiny: Tiny) -> None:
    """The same model scores the same areas on shards as on the files the shards were made of."""
    store = ShardStore(tiny.shards)
    queries = queries_of(store, "val", PROTOCOLS["ours"])
    assert isinstance(predictor, MapPredictor)
    answers = MapAnswers(predictor.system, 12)
    table = evaluate(answers, store, queries, PROTOCOLS["ours"], split="val").to_pylist()
    for query, row in list(zip(queries, table, strict=True))[::5]:
        predictor.set_image(tiny.raw / store.row(query.image)["file_name"])
        (one,) = predictor.predict([query.text])
        assert abs(int(one.mask.sum()) - row["area"]) <= 8, "only pixels at the threshold may differ"
        assert one.score == pytest.approx(row["score"], abs=2e-3)


def test_a_coarse_map_comes_with_the_mask(predictor: RISPredictor, tiny: Tiny, tmp_path: Path, picture: Path) -> None:
    section = tiny.params().lts
    for prior in ("filtering", "none"):
        config = replace(section.model, prior=prior)
        model = build_model("lts", config, load_saved_clip(tiny.clip))
        export_model(tmp_path / prior, "lts", model.state_dict(), config, tiny.clip, INFO)
    locating, plain = (RISPredictor.from_folder(tmp_path / prior) for prior in ("filtering", "none"))
    for each in (locating, plain, predictor):
        each.set_image(picture)
    (found,), (unlocated,), (cris,) = (each.predict(["the red star"]) for each in (locating, plain, predictor))
    assert unlocated.location is None
    assert cris.location is None
    assert found.location is not None
    assert found.location.shape == found.mask.shape
    assert 0 < found.location.min() < found.location.max() < 1
    assert not np.allclose(found.location, found.probability)


def test_without_an_image_there_is_no_answer(predictor: RISPredictor) -> None:
    with pytest.raises(DataError, match=r"no image is set: call set_image\(\.\.\.\) before predict"):
        predictor.predict(TEXTS)


def test_after_a_bad_image_the_one_before_is_forgotten(predictor: RISPredictor, picture: Path) -> None:
    predictor.set_image(picture)
    with pytest.raises(DataError):
        predictor.set_image(b"no image")
    with pytest.raises(DataError, match="no image is set"):
        predictor.predict(TEXTS)


@pytest.mark.parametrize("texts", [["star", "  "], [""], [], "the red star", ["star", None]])
def test_expressions_must_say_something(texts: list[str], predictor: RISPredictor, picture: Path) -> None:
    predictor.set_image(picture)
    with pytest.raises(DataError, match="expressions must be a list of non-blank texts; got ") as caught:
        predictor.predict(texts)
    assert repr(texts) in str(caught.value)


def test_long_expressions_are_cut_not_refused(predictor: RISPredictor, picture: Path) -> None:
    predictor.set_image(picture)
    (one,) = predictor.predict(["the red star " * 40])
    assert np.isfinite(one.probability).all()


def test_what_was_cut_is_said(predictor: RISPredictor, picture: Path) -> None:
    """The model hears twelve tokens, two of them marks."""
    texts = ["red " * 10, "red " * 11, "left"]
    found = predictor.answer(predictor.encode(picture), texts)
    assert [one.cut for one in found] == [False, True, False]
    assert np.abs(found[0].probability - found[1].probability).max() < 1e-5, "nothing of its end was heard"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image at .*nowhere\.jpg"):
        read_image(tmp_path / "nowhere.jpg")


def test_what_is_no_image(tmp_path: Path, picture: Path) -> None:
    text = tmp_path / "page.jpg"
    text.write_text("<html>404</html>")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(picture.read_bytes()[:-500])
    broken = tmp_path / "broken.png"
    Image.new("RGB", (9, 9)).save(broken)
    content = bytearray(broken.read_bytes())
    content[37:41] = b"\xff\xff\xff\xff"  # the length of a chunk: Pillow raises SyntaxError for it
    broken.write_bytes(content)
    for path in (text, cut, broken, tmp_path):
        with pytest.raises(DataError, match="cannot be used: ") as caught:
            read_image(path)
        assert str(path) in str(caught.value)
    with pytest.raises(
        DataError, match=r"8 bytes cannot be used: it is none of the image formats read here \(JPEG, PNG"
    ):
        read_image(b"no image")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 5, 3), np.float32), r"float32 \(4, 5, 3\)"),
        (np.zeros((4, 5), np.uint8), r"uint8 \(4, 5\)"),
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \(3, 4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"uint8 \(4, 5, 4\)"),
    ],
)
def test_wrong_arrays_are_described(array: np.ndarray, found: str) -> None:
    with pytest.raises(DataError, match=rf"an image array must be uint8 \(H, W, 3\) RGB; got {found}"):
        read_image(array)


@pytest.mark.parametrize("image", [None, 3, ["a.jpg"]])
def test_other_things_are_no_images(image: object) -> None:
    with pytest.raises(DataError, match="an image is a path, encoded bytes, an array or a PIL image; got "):
        read_image(image)  # type: ignore[arg-type]


def test_grey_palette_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        buffer = io.BytesIO()
        picture = Image.new(mode, (6, 4))
        picture.save(buffer, "TIFF")
        assert read_image(buffer.getvalue()).shape == (4, 6, 3)
        assert read_image(picture).dtype == np.uint8


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no model"):
        RISPredictor.from_folder(tmp_path)


def test_a_model_that_was_not_trained_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    config, clip = tiny.params().cris.model, load_saved_clip(tiny.clip)
    export_model(tmp_path, "cris", build_model("cris", config, clip).state_dict(), config, tiny.clip, ModelInfo(64))
    with pytest.raises(WeightsError, match=r"is what a training starts from \(its word_len is not set\)"):
        RISPredictor.from_folder(tmp_path)


def test_a_choosing_model_that_does_not_say_among_what_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    config, clip = tiny.params().global_local.model, load_saved_clip(tiny.clip)
    weights = build_model("global_local", config, clip).state_dict()
    export_model(tmp_path, "global_local", weights, config, tiny.clip, ModelInfo(64))
    with pytest.raises(WeightsError, match=r"model\.json does not say among which proposals it chooses"):
        RISPredictor.from_folder(tmp_path)


def test_the_best_device_is_taken_unless_one_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ris_core.predictor.best_device", lambda: asked.append("asked") or "cpu")
    assert RISPredictor.from_folder(folder).device == torch.device("cpu")
    assert asked == ["asked"]
    assert RISPredictor.from_folder(folder, "cpu").device == torch.device("cpu")
    assert asked == ["asked"]


def test_the_models_own_resampling_is_used(tmp_path: Path, tiny: Tiny, folder: Path, picture: Path) -> None:
    model = build_model("cris", tiny.params().cris.model, load_saved_clip(tiny.clip))
    info = replace(INFO, resample="exact")
    export_model(tmp_path, "cris", model.state_dict(), tiny.params().cris.model, tiny.clip, info)
    exact, usual = RISPredictor.from_folder(tmp_path), RISPredictor.from_folder(folder)
    assert isinstance(exact, MapPredictor)
    assert isinstance(usual, MapPredictor)
    assert (exact.resample, usual.resample) == ("exact", "opencv4")
    seen: list[torch.Tensor] = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def encode_image(self, images: torch.Tensor) -> None:
            seen.append(images)

    for mode in ("exact", "opencv4"):
        MapPredictor(Looking(), IMAGE_SIZE, 12, resample=mode).set_image(picture)
    assert not torch.equal(seen[0], seen[1])
    assert torch.allclose(seen[0], seen[1], atol=1.0)


# A system that chooses among proposals


def export_choosing(tiny: Tiny, folder: Path, **options: Any) -> Path:
    section = tiny.params().global_local.model
    model = build_model("global_local", section, load_saved_clip(tiny.clip))
    proposals = {**asdict(tiny.params().proposals), **options}
    del proposals["splits"]
    info = ModelInfo(IMAGE_SIZE, proposals=proposals)
    export_model(folder, "global_local", model.state_dict(), section, tiny.clip, info)
    return folder


@pytest.fixture
def choosing(tiny: Tiny, tmp_path: Path) -> RISPredictor:
    return RISPredictor.from_folder(export_choosing(tiny, tmp_path / "global_local"))


def test_the_mask_is_one_of_the_proposals_of_the_photo(choosing: RISPredictor, tiny: Tiny, picture: Path) -> None:
    proposals = felzenszwalb(load_image(picture), tiny.params().proposals.felzenszwalb)
    assert len(proposals) > 1
    choosing.set_image(picture)
    for one in choosing.predict(TEXTS):
        assert one.mask.dtype == bool
        (index,) = [i for i, proposal in enumerate(proposals) if np.array_equal(proposal, one.mask)]
        assert 0 < one.score <= 1
        assert np.array_equal(one.probability, proposals[index] * np.float32(one.score))
        assert one.location is not None
        assert one.location.shape == one.mask.shape
        assert 0 <= one.location.min() < one.location.max() <= 1
        assert one.location[one.mask].min() >= one.score - 1e-6
        assert not one.location[~proposals.any(0)].any()


def test_it_chooses_what_the_evaluator_sees_chosen_from_stored_proposals(
    choosing: RISPredictor, tiny: Tiny, tmp_path: Path
) -> None:
    store, protocol = tiny.store(), PROTOCOLS["ours"]
    made = []
    for image in store.images_of("val"):
        row = store.row(int(image))
        pixels = load_image(tiny.raw / row["file_name"])
        made.append((row["image_id"], felzenszwalb(pixels, tiny.params().proposals.felzenszwalb)))
    write_part(tmp_path / "part-00000.parquet", made)
    write_manifest(tmp_path, {"splits": ["val"], "parts": ["part-00000.parquet"]})
    answers = ProposalAnswers(choosing.model, tiny.raw, ProposalStore(tmp_path))
    queries = queries_of(store, "val", protocol)
    found = answers(store, queries, protocol)
    assert list(found) == store.images_of("val").tolist()
    for image, answer in found.items():
        texts = [query.text for query in queries if query.image == image]
        choosing.set_image(tiny.raw / store.row(image)["file_name"])
        predictions = choosing.predict(texts)
        assert np.array_equal(answer.masks.numpy(), np.stack([one.mask for one in predictions]))
        assert answer.scores.tolist() == pytest.approx([one.score for one in predictions], abs=1e-6)
        assert answer.found


def test_a_threshold_does_not_change_a_choice(choosing: RISPredictor, tmp_path: Path, picture: Path) -> None:
    other = RISPredictor.from_folder(tmp_path / "global_local", threshold=0.99)
    for predictor in (choosing, other):
        predictor.set_image(picture)
    expected = choosing.predict(TEXTS)
    assert same(choosing.predict(TEXTS, threshold=0.99), expected)
    assert same(other.predict(TEXTS), expected)


def test_a_picture_of_one_colour_has_nothing_to_choose_from(choosing: RISPredictor) -> None:
    choosing.set_image(np.full((30, 40, 3), 90, np.uint8))
    for one in choosing.predict(TEXTS):
        assert one.mask.shape == one.probability.shape == (30, 40)
        assert (one.mask.any(), one.score) == (False, 0.0)
        assert one.location is not None
        assert not one.location.any()


def test_a_photo_is_proposed_and_encoded_once(
    choosing: RISPredictor, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing.set_image(picture)
    monkeypatch.setattr(choosing, "propose", lambda _: pytest.fail("proposed again"))
    monkeypatch.setattr(choosing.model, "encode_proposals", lambda *_: pytest.fail("encoded again"))
    assert len(choosing.predict(TEXTS)) == len(TEXTS)


def test_what_cannot_be_proposed_of_a_new_photo_is_refused_with_the_reason(tiny: Tiny, tmp_path: Path) -> None:
    folder = export_choosing(tiny, tmp_path / "sam", generator="sam")
    with pytest.raises(ConfigError, match=r"proposals\.generator is sam: set proposals\.sam_weights"):
        RISPredictor.from_folder(folder)
    folder = export_choosing(tiny, tmp_path / "lost", generator="sam", sam_weights=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"no SAM weights in .*nowhere"):
        RISPredictor.from_folder(folder)


def test_a_mask_comes_as_runs_polygons_and_png(predictor: RISPredictor, picture: Path) -> None:
    (prediction,) = predictor.answer(predictor.encode(picture), TEXTS[:1])
    shape = prediction.mask.shape
    assert 0 < prediction.mask.sum() < prediction.mask.size
    assert (np.asarray(Image.open(io.BytesIO(prediction.png))) == prediction.mask * 255).all()
    assert (masks.decode(prediction.rle["counts"], *shape) == prediction.mask).all()
    again = masks.decode(masks.segmentation_to_counts(prediction.polygons, *shape), *shape)
    assert (again != prediction.mask).mean() < 0.02


def test_several_images_in_one_call(predictor: RISPredictor, tiny: Tiny) -> None:
    paths = [tiny.raw / record.file_name for record in tiny.records()[:3]]
    alone = [predictor.answer(predictor.encode(path), TEXTS[:2]) for path in paths]
    for one, other in zip(predictor.segment(paths, TEXTS[:2]), alone, strict=True):
        assert same(one, other)
    for one, other in zip(predictor.segment(paths, [TEXTS[:2]] * 3), alone, strict=True):
        assert same(one, other)
    with pytest.raises(DataError, match="3 images and 2 lists of expressions"):
        predictor.segment(paths, [TEXTS[:2]] * 2)
