"""Rows whose masks a generator draws: what is cleaned, drawn again, refused and told."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from skimage.measure import euler_number, label
from skimage.morphology import remove_small_objects

from maskloom.generate import generate as stage
from maskloom.generate.cleaning import cleaned
from maskloom.generate.generator import Condition, JointGenerator, JointOptions
from maskloom.generate.joint import MaskFigures, drawn_attributes, redraw_seed
from maskloom.generate.planning import PlannedRow, TrainRow, noise_seed
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Description
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.prompts import mask_attributes
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from tests.generate.conftest import MakeBench
from tests.generate.workbench import SIDE, Bench, content
from tests.tiny_datasets import PALETTE, Sample, tiny_description

Mask = NDArray[np.uint8]
SHAPE = (16, 12)


def masks(classes: int) -> st.SearchStrategy[Mask]:
    return arrays(np.uint8, SHAPE, elements=st.integers(0, classes - 1))


options = st.builds(
    JointOptions, components=st.none() | st.integers(1, 3), min_area=st.sampled_from([0.0, 0.01, 0.03, 0.1])
)


def pieces(mask: Mask, index: int) -> list[int]:
    """Return the areas of a class's 8-connected pieces."""
    return np.bincount(label(mask == index, connectivity=2).ravel())[1:].tolist()


@given(masks(4), options)
@settings(max_examples=150, deadline=None)
def test_what_is_left_is_large_and_of_few_pieces(mask: Mask, how: JointOptions):
    found = cleaned(mask, 4, how).mask
    for index in (1, 2, 3):
        areas = pieces(found, index)
        assert all(area >= how.min_area * mask.size for area in areas)
        assert len(areas) <= (how.components or mask.size)
    holes = label(found == 0, connectivity=1)
    border = {*holes[0], *holes[-1], *holes[:, 0], *holes[:, -1]}
    inner = [number for number in range(1, holes.max() + 1) if number not in border]
    assert all((holes == number).sum() >= how.min_area * mask.size for number in inner)


@given(st.sampled_from([2, 3]).flatmap(lambda classes: st.tuples(st.just(classes), masks(classes))), options)
@settings(max_examples=150, deadline=None)
def test_a_clean_mask_stays_as_it_is(drawn: tuple[int, Mask], how: JointOptions):
    once = cleaned(drawn[1], drawn[0], how).mask
    again = cleaned(once, drawn[0], how)
    np.testing.assert_array_equal(again.mask, once)
    assert again[1:] == (0, 0, 0)


@given(masks(2))
@settings(max_examples=100, deadline=None)
def test_a_single_class_is_one_piece_without_holes(mask: Mask):
    found = cleaned(mask, 2, JointOptions(min_area=0))
    assert set(np.unique(found.mask)) <= {0, 1}
    assert euler_number(found.mask, connectivity=2) == int(mask.any())  # pieces less holes
    assert max(pieces(mask, 1), default=0) <= int(found.mask.sum())


@given(masks(2), st.sampled_from([2, 5, 20]))
@settings(max_examples=50, deadline=None)
def test_small_pieces_go_as_scikit_image_has_it(mask: Mask, smallest: int):
    """Holes are set aside by comparing before they are filled.

    A flood fill checks components in `test_components.py`.
    """
    how = JointOptions(components=100, min_area=smallest / mask.size)
    found = cleaned(mask, 2, how)
    expected = remove_small_objects(mask > 0, max_size=smallest - 1, connectivity=2)
    np.testing.assert_array_equal((found.mask > 0) & (mask > 0), expected)
    assert found.removed_pixels == int(mask.sum() - expected.sum())
    assert found.removed_components == label(mask, connectivity=2).max() - label(expected, connectivity=2).max()
    assert found.filled_pixels == int(found.mask.sum() - expected.sum())


def test_of_a_single_class_the_largest_piece_is_kept_and_all_its_holes_filled():
    mask = np.zeros((20, 20), np.uint8)
    mask[2:12, 2:12] = 1
    mask[4:10, 4:10] = 0  # 36 pixels
    mask[15:18, 15:18] = 1  # 9 pixels
    found = cleaned(mask, 2, JointOptions())
    expected = np.zeros_like(mask)
    expected[2:12, 2:12] = 1
    np.testing.assert_array_equal(found.mask, expected)
    assert found[1:] == (1, 9, 36)


def test_a_hole_of_the_smallest_area_stays_among_several_classes():
    mask = np.zeros((20, 20), np.uint8)
    mask[2:12, 2:12] = 2
    mask[4:6, 4:6] = 0  # 4 pixels
    for smallest, filled in ((4, 0), (5, 4)):
        assert cleaned(mask, 3, JointOptions(min_area=smallest / mask.size)).filled_pixels == filled


def test_of_several_classes_all_pieces_and_large_holes_stay_and_a_speck_takes_the_class_around_it():
    mask = np.zeros((20, 20), np.uint8)
    mask[0:9, 0:9] = 1
    mask[11:20, 11:20] = 1
    mask[2:5, 2:5] = 0  # a ventricle
    mask[6, 6] = 0  # noise
    mask[14:18, 14:18] = 2
    mask[12, 12] = 2  # noise
    found = cleaned(mask, 3, JointOptions(min_area=0.01))
    expected = mask.copy()
    expected[6, 6] = expected[12, 12] = 1
    np.testing.assert_array_equal(found.mask, expected)
    assert found[1:] == (1, 1, 2)


def disc(row: int, column: int, radius: int) -> Mask:
    y, x = np.mgrid[:SIDE, :SIDE]
    return ((y - row) ** 2 + (x - column) ** 2 <= radius**2).astype(np.uint8)


class Painter(JointGenerator):
    """Paints a disc whose place follows the seed, with a speck beside it.

    Some of its masks are empty.

    Attributes:
        empty: by label, the share of seeds that give an empty mask.
    """

    empty: dict[int | None, float] = {0: 0.0, 1: 0.0}  # noqa: RUF012 - replaced as a whole by tests

    def weights_digest(self) -> str:
        return "painted"

    def check(self) -> None:
        pass

    def load(self, device: torch.device, description: Description) -> None:
        pass

    def pairs(self, conditions: Sequence[Condition]) -> tuple[NDArray[np.float32], Mask]:
        images, drawn = [], []
        for one in conditions:
            random = np.random.default_rng(one.seed)
            share = random.random()
            mask = disc(*random.integers(10, 22, 2), 5)
            mask[0, 0] = 1
            images.append(random.random((SIDE, SIDE)) * 0.2 + 0.6 * mask)
            drawn.append(mask * np.uint8(share >= self.empty[one.label]))
        return np.array(images, np.float32), np.array(drawn, np.uint8)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> type[Painter]:
    """Make every generator of the stage, whatever its name, a painter."""

    class Fresh(Painter):
        pass

    plugin = SimpleNamespace(Options=JointOptions, Generator=Fresh)
    monkeypatch.setattr(stage, "load_plugin", lambda package, name, kind: plugin)
    return Fresh


def run_painter(bench: Bench, force: bool = False, options: dict[str, Any] | None = None, **changes: Any) -> list[dict]:
    stage.generate(bench.config(generators={"painter": options or {}}, **changes), force=force)
    verify_fully(bench.run.synthetic / "painter")
    files = sorted((bench.run.synthetic / "painter" / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def results(bench: Bench) -> dict[str, Any]:
    return read_json(bench.run.logs("generate") / "stage.json", "")["results"]["painter"]


def ledger(bench: Bench) -> list[dict[str, str]]:
    return [json.loads(line) for line in (bench.run.synthetic / "painter/rejected.jsonl").read_text().splitlines()]


def test_counts_are_exact_and_rows_have_ids_and_groups_of_their_own(bench: Bench, painter: type[Painter]):
    rows = run_painter(bench, num_images=None, images_per_class={"disc": 5, "square": 2})
    assert sorted(row["label"] for row in rows) == [0] * 5 + [1] * 2
    assert [row["sample_id"] for row in rows] == [f"painter-{index:06d}" for index in range(7)]
    assert all(row["group_id"] == row["sample_id"] and row["parent_id"] is None for row in rows)
    assert len({row["seed"] for row in rows}) == 7
    generation = read_json(bench.run.synthetic / "painter" / CONTRACT_FILE, "")["description"]["preprocessing"][
        "generation"
    ]
    assert (generation["mask_source"], generation["uses_mask"]) == ("drawn", True)


def test_mask_prompt_and_conditioning_image_are_those_of_the_cleaned_drawn_mask(
    make_bench: MakeBench, painter: type[Painter]
):
    templates = ("{modality}, {size} {shape} {label}, {place}",)
    bench = make_bench(description=tiny_description().model_copy(update={"prompt_templates": templates}))
    for row in run_painter(bench):
        random = np.random.default_rng(row["seed"])
        random.random()
        mask = disc(*random.integers(10, 22, 2), 5)  # without the speck
        np.testing.assert_array_equal(png_array(row["mask"]["bytes"]), mask)
        np.testing.assert_array_equal(
            png_array(row["conditioning_image"]["bytes"]), np.asarray(PALETTE, np.uint8)[mask]
        )
        words = mask_attributes(mask, ("background", "lesion"))
        name = ("disc", "square")[row["label"]]
        assert row["text"] == f"toy imaging, {words['size']} {words['shape']} {name}, {words['place']}"
        assert json.loads(row["attributes"]) == {"modality": "toy imaging", "label": name, **words}


@pytest.mark.parametrize("mode", ["edges", "both", "foreground"])
def test_what_is_drawn_from_an_image_is_drawn_from_the_new_one(
    make_bench: MakeBench, painter: type[Painter], mode: str
):
    bench = make_bench(description=tiny_description().model_copy(update={"conditioning": mode}))
    for row in run_painter(bench):
        image, mask = png_array(row["image"]["bytes"]), png_array(row["mask"]["bytes"])
        np.testing.assert_array_equal(
            png_array(row["conditioning_image"]["bytes"]), conditioning_image(mask, image, mode, PALETTE)
        )


def test_empty_masks_are_drawn_again_with_other_seeds_and_listed(
    bench: Bench, painter: type[Painter], capsys: pytest.CaptureFixture[str]
):
    painter.empty = {0: 0.5, 1: 0.5}
    rows = run_painter(bench, num_images=40, batch_size=8, rows_per_shard=20)
    assert all(png_array(row["mask"]["bytes"]).any() for row in rows)
    listed, found = ledger(bench), results(bench)
    again = {entry["path"] for entry in listed}
    planned = {row["sample_id"]: seed for row, seed in zip(rows, planned_seeds(40), strict=True)}
    for row in rows:
        assert (row["seed"] != planned[row["sample_id"]]) == (row["sample_id"] in again)
    empty = sum(np.random.default_rng(seed).random() < 0.5 for seed in planned.values())
    assert len(again) == empty > 0
    assert found["masks_rejected"] == len(listed) >= empty
    assert found["empty_mask_rate"] == pytest.approx(empty / 40)
    assert found["removed_components_per_mask"] == pytest.approx((40 - empty) / 40)
    assert found["removed_pixels_per_mask"] == pytest.approx((40 - empty) / 40)
    one = next(entry for entry in listed if entry["path"] == sorted(again)[0])
    assert one["reason"] == f"draw 1 (seed {planned[one['path']]}): its mask has no foreground after cleaning"
    sentence = f"{empty} of 40 masks ({empty / 40:.1%}) had no foreground when they were first drawn and cleaned"
    assert sentence in (bench.run.synthetic / "painter/README.md").read_text()
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def planned_seeds(count: int) -> list[int]:
    return [noise_seed(7, index) for index in range(count)]


def test_a_class_whose_train_masks_may_be_empty_keeps_empty_ones(make_bench: MakeBench, painter: type[Painter]):
    def without_lesion(sample: Sample) -> None:
        if sample.sample_id == "train-0001":  # a square
            sample.mask = np.zeros((SIDE, SIDE), np.uint8)

    painter.empty = {0: 0.0, 1: 1.0}
    bench = make_bench(change=without_lesion)
    rows = run_painter(bench)
    assert [png_array(row["mask"]["bytes"]).any() for row in rows] == [row["label"] == 0 for row in rows]
    assert {json.loads(row["attributes"]).keys() >= {"size"} for row in rows if row["label"] == 1} == {False}
    assert ledger(bench) == []
    assert results(bench)["empty_mask_rate"] == 0.5


def test_masks_that_come_out_empty_again_and_again_are_an_error_that_says_what_to_do(
    bench: Bench, painter: type[Painter]
):
    painter.empty = {0: 0.0, 1: 1.0}
    told = (
        r"painter-000001: 3 masks of the class square in a row have no foreground after cleaning, and 1 of 2 first draws of this shard \(50%\); "
        r"train longer, raise generate\.generators\.painter\.attempts, or set generate\.generators\.painter\.min_area=0"
    )
    with pytest.raises(MaskLoomError, match=told):
        run_painter(bench, options={"attempts": 3})
    assert not (bench.run.synthetic / "painter" / CONTRACT_FILE).exists()


def test_a_mask_whose_pieces_are_all_too_small_counts_as_empty(bench: Bench, painter: type[Painter]):
    with pytest.raises(MaskLoomError, match=r"10 masks of the class disc in a row .* 2 of 2 first draws"):
        run_painter(bench, options={"min_area": 0.5})


@pytest.mark.parametrize("lost", ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"])
def test_a_lost_shard_is_made_again_with_the_same_bytes_and_figures(bench: Bench, painter: type[Painter], lost: str):
    painter.empty = {0: 0.4, 1: 0.4}
    run_painter(bench, num_images=20, batch_size=4, rows_per_shard=10)
    before, figures = content(bench.run.synthetic), results(bench)
    (bench.run.synthetic / "painter/data" / lost).unlink()
    (bench.run.synthetic / "painter" / CONTRACT_FILE).unlink()
    run_painter(bench, num_images=20, batch_size=4, rows_per_shard=10)
    assert results(bench)["made_now"] == 10
    assert content(bench.run.synthetic) == before
    same = ("empty_mask_rate", "removed_components_per_mask", "removed_pixels_per_mask", "masks_rejected")
    assert {key: results(bench)[key] for key in same} == {key: figures[key] for key in same}


def test_other_cleaning_makes_another_dataset(bench: Bench, painter: type[Painter]):
    run_painter(bench)
    rows = run_painter(bench, options={"components": 2, "min_area": 0.0})
    assert results(bench)["made_now"] == 6
    assert all(png_array(row["mask"]["bytes"])[0, 0] == 1 for row in rows)
    assert results(bench)["removed_components_per_mask"] == 0


def test_a_paired_picture_is_nothing_that_can_be_drawn(make_bench: MakeBench, painter: type[Painter]):
    bench = make_bench(description=tiny_description().model_copy(update={"conditioning": "image"}))
    with pytest.raises(MaskLoomError, match=r"generators\.painter: .*no paired image.*set data\.conditioning=mask"):
        run_painter(bench)


def test_a_class_without_train_masks_is_refused(make_bench: MakeBench, painter: type[Painter]):
    def without_mask(sample: Sample) -> None:
        if sample.label == 1:
            sample.mask = None

    bench = make_bench(change=without_mask)
    with pytest.raises(
        MaskLoomError,
        match=r"no train row of the class square has one; set that class to 0 in generate\.images_per_class",
    ):
        run_painter(bench)
    assert {row["label"] for row in run_painter(bench, num_images=None, images_per_class={"disc": 3, "square": 0})} == {
        0
    }


def test_a_constant_image_is_an_error_that_names_the_row(
    bench: Bench, painter: type[Painter], monkeypatch: pytest.MonkeyPatch
):
    def flat(self: Painter, conditions: Sequence[Condition]) -> tuple[NDArray[np.float32], Mask]:
        ones = np.ones((len(conditions), SIDE, SIDE))
        return ones.astype(np.float32), ones.astype(np.uint8)

    monkeypatch.setattr(painter, "pairs", flat)
    with pytest.raises(MaskLoomError, match=r"painter-000000 \(seed \d+\): every pixel of the image is 255"):
        run_painter(bench)


def test_batches_are_the_plans_and_only_empty_masks_are_asked_for_again(
    bench: Bench, painter: type[Painter], monkeypatch: pytest.MonkeyPatch
):
    painter.empty = {0: 0.5, 1: 0.5}
    asked: list[list[int]] = []
    draw = painter.pairs

    def watched(self: Painter, conditions: Sequence[Condition]) -> tuple[NDArray[np.float32], Mask]:
        asked.append([condition.seed for condition in conditions])
        return draw(self, conditions)

    monkeypatch.setattr(painter, "pairs", watched)
    run_painter(bench, num_images=8, batch_size=8, rows_per_shard=8)
    seeds = planned_seeds(8)
    assert asked[0] == seeds
    again = [index for index in range(8) if np.random.default_rng(seeds[index]).random() < 0.5]
    assert asked[1] == [redraw_seed(7, index, 1) for index in again]


def test_redraws_have_seeds_of_their_own():
    seeds = {redraw_seed(7, index, attempt) for index in range(50) for attempt in range(1, 10)} | set(planned_seeds(50))
    assert len(seeds) == 500
    assert max(seeds) < 2**32
    assert redraw_seed(7, 0, 1) != redraw_seed(8, 0, 1)


def planned_row(words: dict[str, str]) -> PlannedRow:
    return PlannedRow(0, "train", TrainRow(0, "train-0000", "group", 1, words), seed=1)


TRAIN_WORDS = {"label": "square", "level": "upper", "size": "large", "mask_classes": "lesion"}


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (("{level} {label}", "a {label}"), {"modality", "label"}),  # what is not known of a drawn image is not said
        (("{level} {label}",), {"modality", "label", "level"}),  # but where nothing can be said without it
    ],
)
def test_words_are_lent_by_a_train_row_only_where_no_template_does_without(
    templates: tuple[str, ...], expected: set[str]
):
    about = tiny_description().model_copy(update={"prompt_templates": templates})
    empty = np.zeros((SIDE, SIDE), np.uint8)
    assert drawn_attributes(planned_row(TRAIN_WORDS), empty, about).keys() == expected
    with_lesion = drawn_attributes(planned_row(TRAIN_WORDS), disc(16, 16, 3), about)
    assert with_lesion.keys() == expected | {"size", "place", "shape", "mask_classes"}
    assert with_lesion["size"] == "small"


def test_a_set_of_no_drawn_masks_says_nothing_of_them(bench: Bench):
    stage.generate(bench.config(generators={"text_only": {}}), force=False)
    assert "empty_mask_rate" not in read_json(bench.run.logs("generate") / "stage.json", "")["results"]["text_only"]
    assert "drawn" not in (bench.run.synthetic / "text_only/README.md").read_text()


def test_figures_add_up():
    total = MaskFigures()
    for one in (MaskFigures(1, 1, 2, 8, 0), MaskFigures(3, 0, 4, 8, 6)):
        total.add(one)
    expected = {"removed_components_per_mask": 1.5, "removed_pixels_per_mask": 4.0, "filled_pixels_per_mask": 1.5}
    assert total.per_mask() == {"empty_mask_rate": 0.25, **expected}
