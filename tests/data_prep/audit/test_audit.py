"""The content audit: planted duplicates, conflicts and distributions are found as planted, and
clean datasets give no alarm.
"""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from maskloom.data_prep.__main__ import main
from maskloom.data_prep.audit import audit as audit_module
from maskloom.data_prep.audit import duplicates as audit_duplicates
from maskloom.data_prep.audit.audit import Audit, audit, class_shifts, indexed, open_datasets
from maskloom.data_prep.audit.duplicates import plain_correlations
from maskloom.data_prep.audit.index import mask_regions
from maskloom.data_prep.audit.tables import print_audit
from maskloom.pipeline.dataset.audit.pixels import without_padding
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.command import EXIT_CODE
from maskloom.pipeline.runs.sample_files import write_sample_files
from tests.tiny_datasets import tiny_description, tiny_samples, write_dataset

SIZE = 64
NEAR = {"resize_mode": "pad", "near_duplicates": {"method": "as prepare", "correlation": 0.55}}
ROOT = Path(__file__).parents[3]


def picture(seed, height=SIZE, width=SIZE):
    """Return a picture (height, width) with structure at several scales, uint8."""
    random = np.random.default_rng(seed)
    layers = [gaussian_filter(random.normal(size=(height, width)), sigma) * sigma for sigma in (1, 3, 7)]
    values = np.sum(layers, axis=0)
    return (20 + 235 * (values - values.min()) / np.ptp(values)).astype(np.uint8)


def with_calipers(image):
    drawn = Image.fromarray(image)
    pen = ImageDraw.Draw(drawn)
    for x, y in ((20, 25), (45, 40)):
        pen.line((x - 3, y, x + 3, y), fill=255)
        pen.line((x, y - 3, x, y + 3), fill=255)
    return np.asarray(drawn)


def darker(image):
    return ((image / 255) ** 1.6 * 255).astype(np.uint8)


def samples(split, count=4, offset=0):
    """Return samples whose images are strangers to each other, and to those of the other splits."""
    made = tiny_samples(split, count, SIZE, per_group=1)
    for index, sample in enumerate(made):
        sample.image = picture([sum(map(ord, split)), index + offset])
    return made


def three_splits():
    return {split: samples(split) for split in ("train", "validation", "test")}


def written(folder, splits, preprocessing=NEAR, **about):
    description = tiny_description(SIZE, **about).model_copy(update={"preprocessing": preprocessing})
    write_dataset(folder, description, splits)
    return folder


def audited(*folders, near=None) -> Audit:
    datasets = open_datasets(folders)
    with indexed(datasets, near) as index:
        return audit(datasets, index, near)


def told(found):
    return [(f.problem, f.likeness, f.fails, {f.first.sample_id, f.second.sample_id}) for f in found.findings]


def test_a_clean_dataset_gives_no_alarm(tmp_path):
    found = audited(written(tmp_path / "clean", three_splits()))
    assert told(found) == [] and found.failed == 0 and found.counts == {}
    assert found.notes == ["near-duplicates: looked for among 12 images, aligned correlation from 0.55"]
    found.require_sound()


def test_padding_does_not_make_strangers_alike(tmp_path):
    splits = three_splits()
    for split in splits.values():
        for sample in split:
            sample.image[: SIZE // 5], sample.image[-SIZE // 5 :] = 0, 0
    assert told(audited(written(tmp_path / "padded", splits))) == []


def test_an_image_in_two_splits(tmp_path):
    splits = three_splits()
    splits["test"][2].image = splits["train"][1].image
    splits["test"][2].label = splits["train"][1].label
    splits["test"][2].mask = splits["train"][1].mask
    found = audited(written(tmp_path / "dataset", splits), near=False)
    (finding,) = found.findings
    assert (finding.problem, finding.likeness, finding.fails) == ("splits", "identical", True)
    assert finding.correlation == 1 and finding.images == 2
    assert [vars(place) for place in (finding.first, finding.second)] == [
        {"dataset": str(tmp_path / "dataset"), "split": split, "sample_id": f"{split}-{number:04d}",
         "group_id": f"{split}-group-{number:04d}", "label": label}
        for split, number, label in (("train", 1, "square"), ("test", 2, "square"))
    ]  # fmt: skip
    message = r"1 pair\(s\) of images make results wrong: identical images in two splits: train-0001 \(train\) and test-0002 \(test\); "
    with pytest.raises(MaskLoomError, match=message + "prepare"):
        found.require_sound()
    write_sample_files(tmp_path / "dataset", [("train-0001", "x/1.png"), ("test-0002", "y/2.png")])
    with pytest.raises(MaskLoomError, match=message + r"files: train-0001 is x/1\.png, test-0002 is y/2\.png; prepare"):
        found.require_sound()


def test_an_image_in_several_splits_is_told_for_each_two(tmp_path):
    splits = three_splits()
    splits["external_other"] = samples("external_other")
    for split in splits.values():
        split[0].image, split[0].mask = picture(99), splits["train"][0].mask
    splits["train"][2].image, splits["train"][2].mask = picture(99), splits["train"][0].mask
    found = audited(written(tmp_path / "shared", splits))
    fails = {frozenset((f.first.split, f.second.split)): f.fails for f in found.findings}
    assert len(found.findings) == len(fails) == 6 and found.findings[0].images == 5
    assert [set(pair) for pair, failed in fails.items() if not failed] == [{"test", "external_other"}]


@pytest.mark.parametrize("change", [with_calipers, darker, lambda image: 255 - image // 2])
def test_a_changed_copy_in_another_split(change, tmp_path):
    splits = three_splits()
    splits["validation"][3].image = change(splits["train"][3].image)
    expected = [("splits", "near", True, {"train-0003", "validation-0003"})]
    folder = written(tmp_path / "near", splits)
    found = audited(folder)
    assert told(found) == expected
    pair = np.stack([one.image.ravel() for one in (splits["train"][3], splits["validation"][3])])
    assert found.findings[0].correlation == pytest.approx(np.corrcoef(pair)[0, 1], abs=1e-3)
    with pytest.raises(MaskLoomError, match="near-duplicates in two splits"):
        found.require_sound()
    assert told(audited(folder, near=False)) == []


def test_a_weak_likeness_is_only_told(tmp_path, monkeypatch):
    splits = three_splits()
    splits["test"][0].image = np.asarray(Image.fromarray(splits["train"][0].image[6:-4, 8:-3]).resize((SIZE, SIZE)))
    folder = written(tmp_path / "near", splits)
    assert told(audited(folder)) == [("splits", "near", True, {"train-0000", "test-0000"})]
    monkeypatch.setattr(audit_duplicates, "MARGIN", 1.0)
    assert told(audited(folder)) == [("splits", "near", False, {"train-0000", "test-0000"})]


def test_near_duplicates_that_groups_were_not_meant_to_catch(tmp_path):
    splits = three_splits()
    splits["test"][0].image = darker(splits["train"][0].image)
    folder = written(tmp_path / "slices", splits, {"near_duplicates": None})
    found = audited(folder)
    assert told(found) == [] and "preprocessing.near_duplicates is empty" in found.notes[0]
    assert told(audited(folder, near=True)) == [("splits", "near", False, {"train-0000", "test-0000"})]


def test_many_images_are_not_compared_unasked(tmp_path, monkeypatch):
    splits = three_splits()
    splits["test"][0].image = darker(splits["train"][0].image)
    folder = written(tmp_path / "many", splits)
    monkeypatch.setattr(audit_module, "NEAR_LIMIT", 11)
    found = audited(folder)
    assert told(found) == [] and found.notes[0].startswith(
        "near-duplicates: not looked for: 12 images are more than 11"
    )
    assert len(told(audited(folder, near=True))) == 1


def test_identical_pairs_are_not_told_again_as_near(tmp_path):
    splits = three_splits()
    splits["test"][0].image = splits["train"][0].image
    splits["test"][1].image = darker(splits["train"][0].image)
    splits["validation"][0].image = with_calipers(splits["train"][0].image)
    found = audited(written(tmp_path / "both", splits), near=True)
    pairs = {(f.likeness, frozenset((f.first.split, f.second.split))) for f in found.findings if f.problem == "splits"}
    assert pairs == {
        ("identical", frozenset(("train", "test"))),
        ("near", frozenset(("train", "validation"))),
        ("near", frozenset(("validation", "test"))),
    }


@pytest.mark.parametrize(("copy", "likeness", "fails"), [(np.copy, "identical", True), (darker, "near", False)])
def test_one_image_with_two_labels(tmp_path, copy, likeness, fails):
    splits = three_splits()
    disc, square = splits["train"][:2]
    square.image, square.mask = copy(disc.image), disc.mask
    found = audited(written(tmp_path / "conflict", splits))
    assert told(found) == [("labels", likeness, fails, {"train-0000", "train-0001"})]
    assert {found.findings[0].first.label, found.findings[0].second.label} == {"disc", "square"}
    if fails:
        with pytest.raises(
            MaskLoomError,
            match=r"identical images with different labels: train-0000 \(disc\) and train-0001 \(square\)",
        ):
            found.require_sound()


def test_a_row_without_a_label_contradicts_nobody(tmp_path):
    splits = three_splits()
    splits["train"][1].image, splits["train"][1].mask, splits["train"][1].label = (
        splits["train"][0].image, splits["train"][0].mask, None,
    )  # fmt: skip
    assert told(audited(written(tmp_path / "unlabelled", splits))) == []


def test_identical_images_with_different_masks(tmp_path):
    splits = three_splits()
    splits["train"][2].image = splits["train"][0].image
    found = audited(written(tmp_path / "masks", splits))
    assert told(found) == [("masks", "identical", False, {"train-0000", "train-0002"})]
    splits["train"][2].mask = None
    assert told(audited(written(tmp_path / "no mask", splits))) == []


def test_flat_images_are_counted_and_mean_nothing(tmp_path):
    splits = three_splits()
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        splits[split][number].image = np.zeros((SIZE, SIZE), np.uint8)
    folder = written(tmp_path / "flat", splits)
    found = audited(folder)
    assert told(found) == []
    with indexed(open_datasets([folder]), near=True) as index:
        assert list(audit_duplicates.near_findings(index, open_datasets([folder]))) == []
    assert {content.split: content.flat_images for content in found.splits} == {"train": 2, "validation": 0, "test": 1}


def test_images_of_two_datasets(tmp_path):
    ours, theirs = three_splits(), {split: samples(split, offset=50) for split in ("train", "test")}
    for number, (own, other) in enumerate((("train", "test"), ("train", "train"), ("test", "train"), ("test", "test"))):
        theirs[other][number].image = ours[own][number].image
    folders = written(tmp_path / "ours", ours), written(tmp_path / "theirs", theirs)
    assert told(audited(folders[0])) == told(audited(folders[1])) == []
    found = audited(*folders)
    assert {(f.problem, f.likeness) for f in found.findings} == {("datasets", "identical")}
    assert {(f.first.split, f.second.split): f.fails for f in found.findings} == {
        ("train", "test"): True, ("train", "train"): False, ("test", "train"): True, ("test", "test"): False,
    }  # fmt: skip
    assert {f.second.dataset for f in found.findings} == {str(folders[1])}
    with pytest.raises(
        MaskLoomError, match=r"identical images in both datasets: .*\(test of .*theirs\)|\(train of .*theirs\)"
    ):
        found.require_sound()


def test_near_duplicates_of_another_dataset_are_told(tmp_path):
    ours, theirs = three_splits(), {"test": samples("test", offset=50)}
    theirs["test"][3].image = with_calipers(ours["train"][3].image)
    theirs["test"][2].image = darker(theirs["test"][0].image)  # its own affair
    folders = written(tmp_path / "ours", ours), written(tmp_path / "theirs", theirs, {"near_duplicates": None})
    assert told(audited(*folders)) == [("datasets", "near", False, {"train-0003", "test-0003"})]


def test_labels_of_datasets_are_compared_where_both_know_them(tmp_path):
    ours, theirs = three_splits(), {"test": samples("test", offset=50)}
    theirs["test"][0].image = ours["test"][1].image  # a disc there, a square here
    ours_at = written(tmp_path / "ours", ours)
    same = written(tmp_path / "same", theirs)
    assert ("labels", "identical", True, {"test-0001", "test-0000"}) in told(audited(ours_at, same))
    other = written(tmp_path / "other", theirs, labels=("normal", "tumour"))
    assert [problem for problem, *_ in told(audited(ours_at, other))] == ["datasets"]


def test_another_size_is_compared_by_likeness_only(tmp_path):
    ours, theirs = three_splits(), {"test": samples("test", 2, offset=50)}
    for sample in theirs["test"]:
        sample.image, sample.mask = sample.image[::2, ::2].copy(), sample.mask[::2, ::2].copy()
        sample.conditioning_image = sample.conditioning_image[::2, ::2].copy()
    theirs["test"][0].image = np.asarray(Image.fromarray(ours["train"][0].image).resize((SIZE // 2, SIZE // 2)))
    folder, other = written(tmp_path / "ours", ours), tmp_path / "half"
    write_dataset(other, tiny_description(SIZE // 2), theirs)
    found = audited(folder, other)
    assert told(found) == [("datasets", "near", False, {"train-0000", "test-0000"})]
    assert found.notes[1].startswith(f"{other}: its images have another size")


def test_a_dataset_is_not_compared_with_itself(tmp_path):
    folder = written(tmp_path / "one", {"train": samples("train")})
    with pytest.raises(MaskLoomError, match="given twice"):
        open_datasets([folder, folder.parent / "." / "one"])


def test_findings_are_counted_beyond_those_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "KEPT_FINDINGS", 2)
    splits = {split: samples(split, 6) for split in ("train", "test")}
    for ours, theirs in zip(splits["train"], splits["test"], strict=True):
        theirs.image = ours.image
    found = audited(written(tmp_path / "many", splits), near=False)
    assert len([f for f in found.findings if f.problem == "splits"]) == 2
    assert found.failed == found.counts["splits"]["identical"] == 6


def test_what_the_splits_hold(tmp_path):
    splits = three_splits()
    train = splits["train"]
    train[0].mask = np.zeros((SIZE, SIZE), np.uint8)
    train[1].mask = None
    train[2].text = train[3].text = "a much longer prompt than the others"
    train[3].label = None
    found = audited(written(tmp_path / "known", splits))
    content = found.splits[0]
    assert [one.split for one in found.splits] == ["train", "validation", "test"]
    assert (content.rows, content.groups, content.masks, content.empty_masks) == (4, 4, 3, 1)
    assert content.labels == {"disc": 2, "square": 1}
    assert content.texts == 3 and content.longest_text == "a much longer prompt than the others"
    means = [sample.image.mean() for sample in train]
    assert content.grey_mean == pytest.approx(np.mean(means))
    assert content.grey_spread == pytest.approx(np.std(means))
    assert content.grey_std == pytest.approx(np.mean([sample.image.std() for sample in train]))


def test_region_sizes(tmp_path):
    splits = {"train": samples("train", 6), "test": samples("test", 2)}
    sides = (2, 4, 6, 8, 10)
    for sample, side in zip(splits["train"], sides, strict=False):
        sample.label = 0
        sample.mask = np.zeros((SIZE, SIZE), np.uint8)
        sample.mask[:side, :side] = 1
    splits["train"][0].mask[20:22, 20:22] = splits["train"][0].mask[22:24, 22:24] = 1  # they meet at a corner
    splits["train"][1].mask[40, 40] = 1
    splits["train"][5].label, splits["train"][5].mask = 0, np.zeros((SIZE, SIZE), np.uint8)
    found = audited(written(tmp_path / "sizes", splits))
    (sizes,) = [one for one in found.regions if (one.split, one.label) == ("train", "disc")]
    shares = np.array([2 * 2 + 8, 4 * 4 + 1, 6 * 6, 8 * 8, 10 * 10]) / SIZE**2
    assert (sizes.mask_class, sizes.masks, sizes.present) == ("lesion", 6, 5)
    assert (sizes.smallest, sizes.median, sizes.largest) == (shares.min(), np.median(shares), shares.max())
    assert (sizes.p5, sizes.p95) == pytest.approx(np.quantile(shares, (0.05, 0.95)))
    assert (sizes.components_median, sizes.components_most) == (1, 2)


def test_regions_of_several_classes():
    mask = np.zeros((10, 10), np.uint8)
    mask[0, :5], mask[4, 4], mask[8, 8] = 1, 3, 3
    assert mask_regions(mask) == [(1, 0.05, 1), (3, 0.02, 2)]
    assert mask_regions(np.zeros((4, 4), np.uint8)) == []


def test_class_shifts():
    train = {"benign": 60, "malignant": 30, "normal": 10, "never": 0}
    test = {"benign": 12, "malignant": 6, "normal": 2}
    found = class_shifts({"train": train, "test": test, "external_x": {"benign": 5, "malignant": 30, "normal": 15}})
    same, other = found
    assert not same.differs and same.p_value == pytest.approx(1)
    assert other.differs and (other.split, other.label) == ("external_x", "benign")
    assert (other.share, other.train_share) == pytest.approx((0.1, 0.6))
    assert (
        class_shifts({"train": {}, "test": {}}) == class_shifts({"train": train}) == class_shifts({"test": train}) == []
    )
    assert (
        class_shifts({"train": {"a": 3}, "test": {"a": 2}})
        == class_shifts({"train": {"a": 3, "b": 1}, "test": {"a": 0}})
        == []
    )


def test_padding_is_cut_off():
    image = np.zeros((20, 30), np.uint8)
    image[5:15, 10:] = 3  # noise of a generator
    image[6:14, 12:29] = 200
    assert without_padding(image).shape == (8, 17)
    black = np.zeros((4, 4), np.uint8)
    assert without_padding(black) is black


def test_plain_correlations():
    random = np.random.default_rng(0)
    thumbnails = np.concatenate([random.integers(0, 256, (3, 50), np.uint8), np.full((1, 50), 9, np.uint8)])
    found = plain_correlations(thumbnails)
    np.testing.assert_allclose(found[:3, :3], np.corrcoef(thumbnails[:3]), atol=1e-5)
    assert not found[3].any()


def test_tables_show_texts_as_they_are(tmp_path, capsys):
    splits = three_splits()
    splits["test"][0].image = splits["train"][0].image
    splits["test"][0].sample_id, splits["test"][0].group_id = "[red]x[/red]", "beep\a"
    print_audit(audited(written(tmp_path / "odd", splits)))
    shown = capsys.readouterr().out
    assert "[red]x[/red]" in shown and "\a" not in shown and "beep\N{REPLACEMENT CHARACTER}" in shown
    assert "The same picture in two splits" in shown and "2 to look at" not in shown and "1 failed" in shown
    assert "Classes against those of train" in shown and "Mask regions" in shown


def test_tables_are_bounded_and_say_so(tmp_path, capsys):
    splits = {split: samples(split, 25) for split in ("train", "test")}
    for ours, theirs in zip(splits["train"], splits["test"], strict=True):
        theirs.image, theirs.mask = ours.image, ours.mask
    print_audit(audited(written(tmp_path / "many", splits), near=False))
    shown = capsys.readouterr().out
    assert "and 5 more" in shown and shown.count("fails") == 20


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for count in (64, 64, 640):  # the first warms up imports
        (dataset,) = open_datasets([written(tmp_path / "rows", {"train": tiny_samples("train", count, SIZE)})])
        tracemalloc.start()
        with indexed([dataset], near=False) as index:
            audit([dataset], index, near=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 640 * SIZE**2 / 10  # a tenth of one picture a row


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["verify", *map(str, arguments)])
    return ended.value.code


def test_the_command_on_a_clean_dataset(tmp_path, capsys):
    folder, other = (
        written(tmp_path / "clean", three_splits()),
        written(tmp_path / "b", {"test": samples("test", offset=9)}),
    )
    code = command(
        folder,
        "--against",
        other,
        "--contact-sheet",
        tmp_path / "sheet.html",
        "--images-per-class",
        1,
        "--json",
        tmp_path / "found.json",
    )
    assert code == 0
    assert "duplicates and conflicts: none found" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["datasets"] == [str(folder), str(other)] and found["failed"] == 0 and found["findings"] == []
    assert (tmp_path / "sheet.html").read_text().count("<figure>") == 2


def test_the_command_writes_everything_and_then_fails(tmp_path, capsys):
    splits = three_splits()
    splits["test"][0].image = splits["train"][0].image
    folder = written(tmp_path / "shared", splits)
    code = command(folder, "--json", tmp_path / "found.json", "--contact-sheet", tmp_path / "sheet.html")
    shown = capsys.readouterr()
    assert code == EXIT_CODE
    errors = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "identical images in two splits: train-0000 (train) and test-0000 (test)" in errors[0]
    assert "The same picture in two splits" in shown.out
    assert json.loads((tmp_path / "found.json").read_text())["failed"] == 1
    assert (tmp_path / "sheet.html").is_file()


def test_the_command_tells_a_broken_dataset_first(tmp_path, capsys):
    folder = written(tmp_path / "broken", three_splits())
    (folder / "README.md").write_text("edited")
    assert command(folder, "--json", tmp_path / "found.json") == EXIT_CODE
    assert "its SHA-256 differs" in capsys.readouterr().err and not (tmp_path / "found.json").exists()


def test_help_says_what_fails_and_what_is_only_told():
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "verify", "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"COLUMNS": "400", "PATH": ""},
    )  # fmt: skip
    for words in (
        "exit code 2",
        "It only reports",
        "--against",
        "--contact-sheet",
        "--images-per-class",
        "--no-near",
        "--json",
    ):
        assert words in done.stdout
