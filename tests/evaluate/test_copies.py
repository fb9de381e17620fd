"""Copies of training images are found one by one, whatever was done to them, and nothing else."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from maskloom.data_prep.processing.phantom import LABELS, patient, render
from maskloom.evaluate.copies import copy_rows
from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.scores.calibration import copy_threshold, held_out_share, joint_thresholds
from maskloom.evaluate.scores.copies import (
    COARSE,
    FINE,
    LEAST,
    SIMILARITIES,
    WHOLE_COARSE,
    CopySearch,
    Matches,
    copy_thresholds,
)
from maskloom.evaluate.scores.descriptors import SIDE, content_box, halved, without_padding
from maskloom.evaluate.scores.overlap import largest_overlaps
from maskloom.evaluate.scores.threads import thread_results
from maskloom.pipeline.dataset.copies import found_copies
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.export import ExportOptions, export
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.runs import answer, copied, small_options, tiny_config, tiny_inputs
from tests.tiny_datasets import Picture, Sample, write_tiny_run

COUNT = 40
BUSI = Path(__file__).parents[2] / ".." / "shared" / "data" / "busi" / "Dataset_BUSI_with_GT" / "benign"


def picture(seed: int) -> Picture:
    """Return an image with structure of several sizes, (128, 128)."""
    random = np.random.default_rng(seed)
    layers = [gaussian_filter(random.normal(size=(SIDE, SIDE)), sigma) * sigma for sigma in (1.5, 4, 10)]
    return (128 + 45 * sum(layers)).clip(0, 255).astype(np.uint8)


def resized(image: Picture, side: int) -> Picture:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def padded(image: Picture) -> Picture:
    return np.pad(resized(image, 109), ((9, 10), (9, 10)))


def deformed(image: Picture) -> Picture:
    random = np.random.default_rng(0)
    fields = [gaussian_filter(random.normal(size=image.shape), 10) for _ in range(2)]
    moved = [axis + 2.5 * one / np.abs(one).max() for axis, one in zip(np.mgrid[:SIDE, :SIDE], fields, strict=True)]
    return map_coordinates(image, moved, order=1, mode="reflect")


def half_copied(image: Picture) -> Picture:
    return np.hstack([image[:, : SIDE // 2], picture(999)[:, SIDE // 2 :]])


def noisy(image: Picture) -> Picture:
    return (image + np.random.default_rng(0).normal(0, 10, image.shape)).clip(0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "plain": lambda image: image,
    "mirrored left-right": lambda image: image[:, ::-1],
    "mirrored up-down": lambda image: image[::-1],
    "turned by 90 degrees": np.rot90,
    "cropped by 5 %": lambda image: resized(image[:122, :122], SIDE),
    "cropped by 10 %": lambda image: resized(image[6:121, 6:121], SIDE),
    "cropped by 20 %": lambda image: resized(image[26:, 26:], SIDE),
    "turned and cropped": lambda image: np.rot90(resized(image[6:121, 6:121], SIDE)),
    "shifted": lambda image: np.pad(image[:-8, :-8], ((8, 0), (8, 0))),
    "padded": padded,
    "inverted": lambda image: 255 - image,
    "noisy": noisy,
    "blurred": lambda image: gaussian_filter(image, 1.5),
    "other gamma": lambda image: (255 * (image / 255) ** 1.6).astype(np.uint8),
    "deformed": deformed,
    "half copied": half_copied,
}


@pytest.fixture(scope="module")
def search() -> CopySearch:
    return CopySearch(np.stack([picture(seed) for seed in range(COUNT)]))


@pytest.fixture(scope="module")
def held_out(search: CopySearch) -> Matches:
    return search.matches(np.stack([picture(1000 + number) for number in range(20)]))


@pytest.fixture(scope="module")
def thresholds(held_out: Matches) -> dict[str, float]:
    return copy_thresholds(held_out.similarity, COUNT)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(search: CopySearch, thresholds: dict[str, float], change: str) -> None:
    found = search.matches(np.ascontiguousarray(CHANGES[change](picture(7)))[None])
    flagged = [name for name in SIMILARITIES if found.similarity[name][0] > thresholds[name]]
    assert flagged
    assert {int(found.index[name][0]) for name in flagged} == {7}


def test_padding_is_cut_without_changing_the_aspect_ratio() -> None:
    letterboxed = picture(7)
    letterboxed[:24] = letterboxed[-24:] = 0
    boxes = [content_box(halved(one.astype(np.float32))) for one in (without_padding(padded(letterboxed)), letterboxed)]
    assert np.abs(np.subtract(*boxes)).max() < 0.05
    assert without_padding(letterboxed) is letterboxed


def test_a_rough_look_at_many_training_images_keeps_every_original(
    search: CopySearch, thresholds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = np.stack([np.ascontiguousarray(change(picture(7))) for change in CHANGES.values()])
    full = search.matches(changed)
    monkeypatch.setattr("maskloom.evaluate.scores.copies.EXHAUSTIVE", 10)
    monkeypatch.setattr("maskloom.evaluate.scores.copies.CANDIDATES", 2)
    for one, change in enumerate(CHANGES):
        found = search.matches(changed[one : one + 1])
        flagged = [name for name in SIMILARITIES if found.similarity[name][0] > thresholds[name]]
        assert {int(found.index[name][0]) for name in flagged} == {7}, change
        assert all(found.similarity[name][0] <= full.similarity[name][one] + 1e-5 for name in SIMILARITIES)


def slices(count: int) -> Picture:
    """Return neighbouring slices of one volume, (count, 128, 128): each shares most of its details with the next."""
    random = np.random.default_rng(3)
    layers = [gaussian_filter(random.normal(size=(count, SIDE, SIDE)), (6, sigma, sigma)) for sigma in (1.5, 4, 10)]
    return (128 + 45 * sum(one / one.std() for one in layers) / 1.7).clip(0, 255).astype(np.uint8)


def test_a_rough_look_tells_neighbouring_slices_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has every window of the full comparison: with half of them, nine of these crops of 20 % lost their original."""
    train, chosen = slices(160), np.arange(5, 160, 8)
    crops = [train[row, y : y + 102, x : x + 102] for row, (y, x) in zip(chosen, [(6, 19), (19, 6)] * 10, strict=True)]
    search = CopySearch(train)
    monkeypatch.setattr("maskloom.evaluate.scores.copies.EXHAUSTIVE", 10)
    monkeypatch.setattr("maskloom.evaluate.scores.copies.CANDIDATES", 1)
    rough = search.matches(np.stack([resized(crop, SIDE) for crop in crops]))
    assert (rough.index[WHOLE_COARSE] == chosen).all()


def test_no_similarity_is_above_one(search: CopySearch) -> None:
    """Rounded descriptors have cosines of up to 1.0001 with themselves."""
    found = search.matches(search.train[:40])
    assert max(values.max() for values in found.similarity.values()) <= 1


def test_what_is_found_does_not_depend_on_images_compared_beside(
    search: CopySearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.stack([np.ascontiguousarray(change(picture(7))) for change in CHANGES.values()])
    monkeypatch.setattr("maskloom.evaluate.scores.copies.EXHAUSTIVE", 10)
    monkeypatch.setattr("maskloom.evaluate.scores.copies.CANDIDATES", 4)
    together, alone = search.matches(images), [search.matches(image[None]) for image in images]
    for name in SIMILARITIES:
        np.testing.assert_allclose(together.similarity[name], [one.similarity[name][0] for one in alone], atol=1e-4)


def test_unseen_images_are_no_copies(held_out: Matches, thresholds: dict[str, float], search: CopySearch) -> None:
    others = search.matches(np.stack([picture(5000 + number) for number in range(20)]))
    for found in (held_out, others):
        assert not any((found.similarity[name] > thresholds[name]).any() for name in SIMILARITIES)


def test_few_images_are_in_memory_at_a_time(search: CopySearch, held_out: Matches) -> None:
    """Batches are read while others are compared, and give what all at once give."""
    compared: list[int] = []
    read: list[int] = []

    def batches() -> Iterator[Picture]:
        for start in range(0, 20, 4):
            read.append(len(compared))
            yield np.stack([picture(1000 + seed) for seed in range(start, start + 4)])

    def counted(block: Picture) -> None:
        compared.append(len(block))

    assert len(list(thread_results(counted, batches()))) == 5
    assert read[-1] > 0
    found = search.matches_in(batches(), 20)
    for name in SIMILARITIES:
        assert found.similarity[name] == pytest.approx(held_out.similarity[name], abs=1e-5)
        assert (found.index[name] == held_out.index[name]).all()


def test_a_constant_image_matches_nothing(search: CopySearch) -> None:
    found = search.matches(np.full((1, SIDE, SIDE), 90, dtype=np.uint8))
    assert all(found.similarity[name][0] == 0 for name in SIMILARITIES)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest overlap of one pair."""
    return float(largest_overlaps(torch.from_numpy(a)[None], torch.from_numpy(b)[None])[0])


def test_the_displaced_part_is_found_wherever_it_went() -> None:
    random = np.random.default_rng(0)
    a, b = (gaussian_filter(random.normal(size=(SIDE, SIDE)), 1.5).astype(np.float32) * 3 for _ in range(2))
    assert overlap(a, b) < 0.7
    b[50:120, 10:80] = a[20:90, 40:110]
    assert overlap(a, b) == pytest.approx(1, abs=1e-4)


def test_the_threshold_of_copies_lies_beyond_chance_but_not_beyond_copies() -> None:
    random = np.random.default_rng(0)
    best = np.tanh(random.normal(0.3, 0.15, size=(60, 100)).max(axis=1))
    threshold = copy_threshold(best, 100)
    assert best.max() < threshold < 0.9
    with_copies = np.concatenate([best, [0.99, 0.995]])
    assert copy_threshold(with_copies, 100) == pytest.approx(threshold, abs=0.02)
    assert copy_threshold(best[:8], 100) >= 0.95
    assert copy_threshold(np.zeros(0), 100) >= 0.95


@pytest.mark.parametrize(("count", "added"), [(32, 0.0), (60, 0.13), (1000, 0.3)])
def test_a_margin_that_few_images_need_anyway_is_not_added_twice(count: int, added: float) -> None:
    best = np.tanh(np.random.default_rng(0).normal(0.6, 0.1, count))
    plain, farther = (float(np.arctanh(copy_threshold(best, 100, margin=margin))) for margin in (0.0, 0.3))
    assert farther - plain == pytest.approx(added, abs=1e-9)


def test_a_margin_also_holds_for_fewest_images() -> None:
    assert copy_threshold(np.full(8, 0.5), 100, margin=0.3) == pytest.approx(np.tanh(np.arctanh(0.95) + 0.3))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_each_measure_has_a_lowest_threshold(name: str) -> None:
    """Unrelated images reach .9 by coarse details, and .77 by parts, beside a few real ones."""
    unlike = dict.fromkeys(SIMILARITIES, np.full(400, 0.1))
    threshold = copy_thresholds(unlike, 100)[name]
    assert threshold == pytest.approx(LEAST[name], abs=1e-6)
    assert threshold >= {"coarse details": 0.9, "part": 0.85, "displaced part": 0.85}.get(name, 0.65) - 1e-6
    assert copy_thresholds(unlike, 100, 0.3)[name] == pytest.approx(np.tanh(np.arctanh(LEAST[name]) + 0.3))


@pytest.mark.parametrize("count", [16, 32, 60])
def test_thresholds_of_few_images_call_few_unrelated_ones_copies(count: int) -> None:
    """Similarities have a longer tail than the normal distribution, which 16 to 60 images do not show."""
    random = np.random.default_rng(count)
    shares = []
    for _ in range(40):
        best = np.tanh(0.6 + 0.1 * random.standard_t(5, size=(count + 1000)))
        shares.append(float((best[count:] > copy_threshold(best[:count], 100)).mean()))
    assert np.mean(shares) < 0.002


def test_the_margin_of_few_images_vanishes_with_many() -> None:
    best = np.tanh(np.random.default_rng(0).normal(0.6, 0.1, 40))
    few, many, more = (float(np.arctanh(copy_threshold(np.repeat(best, times), 100))) for times in (1, 10, 20))
    assert few - many == pytest.approx(12 * (1 / 40 - 1 / 400), abs=0.1)
    assert many == pytest.approx(more, abs=0.02)
    assert np.arctanh(max(best)) < many < np.arctanh(max(best)) + 0.15


def test_five_percent_of_unseen_images_are_flagged() -> None:
    """In any of two spaces together, whether they agree or not."""
    random = np.random.default_rng(0)
    for agreement in (0.0, 0.7, 1.0):
        shares = []
        for _ in range(30):
            first, other = random.gamma(3, size=(2, 1200))
            second = agreement * first + (1 - agreement) * other
            spaces = {"features": first[:200], "pixels": second[:200]}
            thresholds = joint_thresholds(spaces, 5)
            unseen = {"features": first[200:], "pixels": second[200:]}
            shares.append(np.any([unseen[name] < thresholds[name] for name in spaces], axis=0).mean())
            assert held_out_share(spaces, [f"{i // 2}" for i in range(200)], 5) == pytest.approx(0.05, abs=0.025)
        assert np.mean(shares) == pytest.approx(0.05, abs=0.01)


def test_groups_are_left_out_whole() -> None:
    """Images of one group that resemble nothing else: their own must not set their threshold."""
    near = np.concatenate([np.full(10, 0.1), np.linspace(1, 2, 90)])
    spaces = {"pixels": near}
    alone = held_out_share(spaces, [str(i) for i in range(100)], 5)
    together = held_out_share(spaces, [*(["one"] * 10), *(str(i) for i in range(90))], 5)
    assert alone < 0.06 < together
    assert np.isnan(held_out_share(spaces, ["one"] * 100, 5))


def phantom(seed: int) -> Picture:
    """Return an ultrasound phantom; every seed is another patient."""
    return resized(render(patient(5, seed, LABELS[seed % len(LABELS)]), 5, seed, 0, SIDE)[0], SIDE)


def busi(seed: int) -> Picture:
    """Return an image of the public dataset BUSI."""
    files = [file for file in sorted(BUSI.glob("*.png")) if "_mask" not in file.name]
    return resized(np.asarray(Image.open(files[seed]).convert("L")), SIDE)


@pytest.mark.parametrize(
    "source", [phantom, pytest.param(busi, marks=pytest.mark.skipif(not BUSI.is_dir(), reason="BUSI is not there"))]
)
def test_six_copies_of_medical_images_are_named_each_with_its_original(source: Callable[[int], Picture]) -> None:
    images = [source(seed) for seed in range(254)]
    train, held_out, others = np.stack(images[:80]), np.stack(images[80:110]), images[110:]
    copies = [change(train[10 * number]) for number, change in enumerate(list(CHANGES.values())[1:7])]
    search, numbers = CopySearch(train), [str(row) for row in range(150)]
    unseen = search.matches(held_out)
    limits = copy_thresholds(unseen.similarity, len(train))
    planted = np.stack([np.ascontiguousarray(one) for one in [*copies, *others]])
    rows = copy_rows(numbers, numbers, search.matches(planted), limits)
    assert [(row.sample_id, row.original) for row in rows[:6]] == [(str(row), str(10 * row)) for row in range(6)]


@pytest.mark.parametrize(
    ("measure", "whole", "named"),
    [
        ("coarse details", 0.9, "true one"),
        ("part", 0.9, "true one"),
        ("part", 0.4, "true of the part"),
        ("displaced part", 0.4, "true of the part"),
        ("fine details", 0.4, "true one"),
    ],
)
def test_the_original_is_named_by_the_measure_that_tells_neighbours_apart(
    measure: str, whole: float, named: str
) -> None:
    """Descriptors prefer `neighbour`; a measure of parts is asked only where nothing but a part agrees."""
    originals = ["neighbour", "true one", "true of the part"]
    similarity = dict.fromkeys(SIMILARITIES, 0.4) | {"whole and coarse details": whole, measure: 0.99}
    index = dict.fromkeys(SIMILARITIES, 0) | {"whole and coarse details": 1, "displaced part": 2}
    found = Matches(
        {name: np.array([value]) for name, value in similarity.items()},
        {name: np.array([value]) for name, value in index.items()},
        {name: [f"by {originals[value]}"] for name, value in index.items()},
    )
    (row,) = copy_rows(["image"], originals, found, dict.fromkeys(SIMILARITIES, 0.5))
    assert (row.measure, row.original, row.transformation) == (measure, named, f"by {named}")
    assert row.similarity == 0.99


def between_bars(shown: np.ndarray) -> Picture:
    """Return an image, (80, 128), between black bars that make it square."""
    return np.pad(shown.astype(np.uint8), ((24, 24), (0, 0)))


def test_images_that_show_nothing_but_bars_are_no_copies() -> None:
    """Few train images have such bars, and no held-out one."""
    real = np.stack([between_bars(phantom(one)[24:104]) if one < 6 else phantom(one) for one in range(90)])
    search, random = CopySearch(real[:60]), np.random.default_rng(0)
    unseen = search.matches(real[60:])
    limits = copy_thresholds(unseen.similarity, 60)
    rows, columns = np.mgrid[:80, :128]
    drawn = [np.full((80, 128), 255), np.full((80, 128), 120), 2 * columns, 255 - 3 * rows]
    drawn += [128 + 60 * np.sin(rows / period) + random.normal(0, 15, rows.shape) for period in (1.5, 2.5, 4, 7)]
    found = search.matches(np.stack([between_bars(np.clip(one, 0, 255)) for one in drawn]))
    assert not copy_rows([str(row) for row in range(len(drawn))], [str(row) for row in range(60)], found, limits)


@pytest.mark.parametrize("exhaustive", [1000, 10])
@pytest.mark.parametrize("change", ["cropped", "cropped and mirrored", "stretched to a square"])
def test_crops_of_an_image_between_bars_get_bars_of_their_own(
    change: str, exhaustive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bars of the copy are not those of the original, so the square images are no crops of each other."""
    monkeypatch.setattr("maskloom.evaluate.scores.copies.EXHAUSTIVE", exhaustive)
    monkeypatch.setattr("maskloom.evaluate.scores.copies.CANDIDATES", 4)

    def grey(seed: int) -> Picture:
        return picture(seed)[24:104] // 2 + 60

    train = np.stack([between_bars(grey(seed)) for seed in range(40)])
    search = CopySearch(train)
    assert search.bare is not None and CopySearch(np.full((2, SIDE, SIDE), 90, np.uint8)).bare is None
    shown = Image.fromarray(grey(7))
    crop = shown.resize((SIDE, 80), Image.Resampling.BICUBIC, box=(26, 16, 128, 80))
    copy = {
        "cropped": lambda: between_bars(np.asarray(crop)),
        "cropped and mirrored": lambda: between_bars(np.asarray(crop)[:, ::-1]),
        "stretched to a square": lambda: np.asarray(shown.resize((SIDE, SIDE), Image.Resampling.BICUBIC)),
    }[change]()
    found = search.matches(np.ascontiguousarray(copy)[None])
    assert {int(found.index[name][0]) for name in (FINE, COARSE, WHOLE_COARSE)} == {7}
    search.bare = None
    plain = search.matches(np.ascontiguousarray(copy)[None])
    assert found.similarity[FINE][0] > 0.98 > plain.similarity[FINE][0] + 0.05


def test_six_copies_among_150_are_named_each_with_its_original(tmp_path: Path) -> None:
    changes = list(CHANGES.values())[:4]

    def structured(sample: Sample) -> None:
        split, number = sample.sample_id.split("-")
        sample.image = resized(picture(int(number) + {"train": 0, "validation": 1000, "test": 2000}[split]), 64)

    def six_copies(parent: Sample, index: int) -> Picture:
        if index % 25 == 3:
            return np.ascontiguousarray(changes[index // 25 % 4](parent.image))
        return resized(picture(5000 + index), 64)

    counts = {"train": 150, "validation": 20, "test": 24}
    write_tiny_run(tmp_path, {"some": six_copies}, counts, size=64, change=structured)
    inputs = tiny_inputs(tmp_path, ("some",))
    result = answer(inputs, "memorisation")
    copies = result.values["some"]["copies"]
    names, parents = inputs.synthetic["some"].columns["sample_id"], inputs.synthetic["some"].parents
    assert {one["sample_id"]: one["original"] for one in copies} == {names[i]: parents[i] for i in range(3, 150, 25)}
    assert "some: 6 of 150 images are copies of training images: " in result.verdict
    assert f"{names[3]} of {parents[3]} (same place and size)" in result.verdict
    assert "and 3 more" in result.verdict
    assert "no sign of copying" not in result.verdict
    assert result.values["held_out"]["copies"] == []
    assert max(result.values["held_out"]["average_image"].values()) < 1
    assert any("some: its 6 copies are kept (evaluate.on_copies=keep)" in text for text in result.warnings)
    assert [table.title for table in result.tables][1] == "some: copies of training images"
    assert len(result.tables[1].rows) == 6
    assert result.pictures[0].title == "some: copies beside their originals"
    assert result.pictures[0].pixels.shape[1] == 2 * 32 + 4


def copied_run(folder: Path, names: tuple[str, ...] = ("third",)) -> None:
    """Write a run whose every third synthetic image is a copy."""

    def structured(sample: Sample) -> None:
        split, number = sample.sample_id.split("-")
        sample.image = resized(picture(int(number) + {"train": 0, "validation": 1000, "test": 2000}[split]), 32)

    def third(parent: Sample, index: int) -> Picture:
        return parent.image if index % 3 == 0 else resized(picture(5000 + index), 32)

    counts = {"train": 18, "validation": 16, "test": 12}
    write_tiny_run(folder, dict.fromkeys(names, third), counts, change=structured)


@pytest.mark.parametrize("metric", ["downstream_segmentation", "downstream_classification"])
def test_downstream_models_do_not_train_on_copies(tmp_path: Path, metric: str) -> None:
    copied_run(tmp_path)
    seen = {}
    for on_copies in ("drop", "keep"):
        inputs = replace(tiny_inputs(tmp_path, ("third",)), on_copies=on_copies)
        result = answer(inputs, metric, arms=("real", "real_synthetic"))
        seen[on_copies] = result.n["third"]
        assert any("third: 6 images are left out" in text for text in result.warnings) == (on_copies == "drop")
        assert ("third images were left out, as they are copies" in result.verdict) == (on_copies == "drop")
    assert seen == {"drop": 12, "keep": 18}


@pytest.mark.parametrize("metric", ["downstream_segmentation", "downstream_classification"])
def test_nothing_is_trained_where_every_image_is_a_copy(tmp_path: Path, metric: str) -> None:
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 18, "validation": 16, "test": 12})
    result = answer(replace(tiny_inputs(tmp_path, ("copied",)), on_copies="drop"), metric)
    assert result.skipped == "every image of copied is a copy of a training image"


def test_the_stage_records_copies_or_stops(tmp_path: Path) -> None:
    copied_run(tmp_path)

    def evaluated(on_copies: str) -> None:
        config = tiny_config(tmp_path, {"memorisation": small_options("memorisation")}, ("third",))
        asked = config.evaluate.model_copy(update={"on_copies": on_copies})
        evaluate(config.model_copy(update={"evaluate": asked}), force=False)

    with pytest.raises(
        MaskLoomError,
        match=r"6 of 18 images are copies of training images: third-0000 of train-0000.*copies\.jsonl lists all of them",
    ):
        evaluated("stop")
    for on_copies in ("drop", "keep"):
        evaluated(on_copies)
        found = found_copies(MaskPromptDataset.open(tmp_path / "synthetic/third"))
        assert found is not None
        assert found.on_copies == on_copies
        assert [row.sample_id for row in found.rows] == [f"third-{index:04d}" for index in range(0, 18, 3)]


def test_copies_that_stop_are_listed_for_every_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that no way out hands them on; an earlier list and earlier answers stay."""
    copied_run(tmp_path, ("third", "other"))

    def evaluated(on_copies: str) -> None:
        config = tiny_config(tmp_path, {"memorisation": small_options("memorisation")}, ("third", "other"))
        asked = config.evaluate.model_copy(update={"on_copies": on_copies})
        evaluate(config.model_copy(update={"evaluate": asked}), force=False)

    def handled(name: str) -> str | None:
        found = found_copies(MaskPromptDataset.open(tmp_path / "synthetic" / name))
        return None if found is None or len(found.rows) != 6 else found.on_copies

    both = r"third: 6 of 18 images are copies .*other: 6 of 18 images are copies .*evaluate\.on_copies=drop"
    for _ in range(2):
        with pytest.raises(MaskLoomError, match=both):
            evaluated("stop")
        for name in ("third", "other"):
            assert handled(name) == "stop"
            options = ExportOptions("imagefolder", tmp_path / "exported", force=True)
            with pytest.raises(MaskLoomError, match=r"6 rows are copies of training images"):
                export(tmp_path / "synthetic" / name, options)
        assert not (tmp_path / "exported").exists()
        evaluated("drop")  # the answers of the first time are kept; what becomes of copies is not
        assert handled("third") == handled("other") == "drop"
    evaluated("keep")
    assert handled("third") == "keep"
    assert (tmp_path / "evaluation" / "memorisation.json").is_file()
