"""The MNI152 adapter: orientation, the mask's rule, and splits that keep neighbours together."""

import lzma
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from maskloom.data_prep.adapter import Options, RawItem, Reject
from maskloom.data_prep.datasets import mni152
from maskloom.pipeline.errors import MaskLoomError


@pytest.fixture(scope="module")
def adapter() -> mni152.Adapter:
    return mni152.Adapter(None, Options())


@pytest.fixture(scope="module")
def entries(adapter: mni152.Adapter) -> list[RawItem | Reject]:
    return list(adapter.scan())


def items(entries: list[RawItem | Reject]) -> list[RawItem]:
    return [entry for entry in entries if isinstance(entry, RawItem)]


def find(entries: list[RawItem | Reject], sample_id: str) -> RawItem:
    return next(item for item in items(entries) if item.sample_id == sample_id)


def test_every_slice_is_listed_once(entries: list[RawItem | Reject]) -> None:
    paths = [entry.path for entry in entries]
    assert len(set(paths)) == len(paths) == sum(plane.last - plane.first + 1 for plane in mni152.PLANES.values())


def test_planes_hold_all_splits_in_about_the_usual_shares(entries: list[RawItem | Reject]) -> None:
    for label in mni152.PLANES:
        splits = [item.split for item in items(entries) if item.label == label]
        shares = {split: splits.count(split) / len(splits) for split in ("train", "validation", "test")}
        assert 0.6 < shares["train"] < 0.85
        assert 0.08 < shares["validation"] < 0.25
        assert 0.08 < shares["test"] < 0.25


def test_slices_of_different_splits_are_three_millimetres_apart(entries: list[RawItem | Reject]) -> None:
    positions = defaultdict(list)
    for item in items(entries):
        label, index = item.key
        # A sagittal slice equals its mirror, so what counts there is the distance from the midline.
        position = abs(index - mni152.MIDLINE) if label == "sagittal" else index
        positions[label].append((position, item.split))
    for slices in positions.values():
        gaps = [abs(a - b) for a, split in slices for b, other in slices if split != other]
        assert min(gaps) >= 3


def test_left_and_right_sagittal_slices_share_a_group(entries: list[RawItem | Reject]) -> None:
    left, right = find(entries, "mni152-sagittal-088"), find(entries, "mni152-sagittal-108")
    assert left.group == right.group
    assert left.attributes == right.attributes == {"level": "midline"}


def test_a_group_lies_in_one_split(entries: list[RawItem | Reject]) -> None:
    splits = defaultdict(set)
    for item in items(entries):
        splits[item.group].add(item.split)
    assert all(len(found) == 1 for found in splits.values())


def test_axial_slice_has_anterior_up_and_both_tissues(adapter: mni152.Adapter, entries: list[RawItem | Reject]) -> None:
    raw = adapter.load(find(entries, "mni152-axial-085"))
    assert raw.mask is not None
    assert raw.image.shape == raw.mask.shape
    assert raw.value_range == (0.0, 1.0)
    assert set(np.unique(raw.mask)) == {0, 1, 2}
    widths = (raw.mask > 0).sum(axis=1)
    # The brain is widest behind its middle.
    assert widths.argmax() > len(widths) / 2


def test_sagittal_slice_has_the_cerebellum_low_at_the_right(
    adapter: mni152.Adapter, entries: list[RawItem | Reject]
) -> None:
    raw = adapter.load(find(entries, "mni152-sagittal-088"))
    assert raw.mask is not None
    tissue = raw.mask > 0
    quarter = tissue[-tissue.shape[0] // 4 :]
    half = tissue.shape[1] // 2
    assert quarter[:, half:].sum() > 2 * quarter[:, :half].sum()


def test_mask_takes_the_likelier_tissue_where_there_is_tissue() -> None:
    grey = np.array([0.2, 0.5, 0.2, 0.3, 0.4], dtype=np.float32)
    white = np.array([0.2, 0.1, 0.7, 0.3, 0.05], dtype=np.float32)
    assert mni152.tissue_mask(grey, white).tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("content", [b"", b"not compressed", lzma.compress(b"not an array"), None])
def test_a_damaged_template_is_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "template"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(mni152, "_file", lambda: file)
    mni152._volumes.cache_clear()
    with pytest.raises(MaskLoomError, match=r"mni152.npy.xz: cannot be read .*; install maskloom again"):
        mni152._volumes()


def test_the_template_is_that_of_nilearn() -> None:
    datasets = pytest.importorskip("nilearn.datasets")
    box = tuple(slice(*side) for side in mni152.BOX)
    for name, volume in zip(("", "_gm", "_wm"), mni152._volumes(), strict=True):
        theirs = getattr(datasets, f"load_mni152{name}_template")(resolution=1)
        assert np.array_equal(volume, np.asarray(theirs.dataobj, np.float32)[box])


def test_the_template_is_part_of_what_a_dataset_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = mni152.Adapter(None, Options())
    before = adapter.fingerprint()
    (tmp_path / "template").write_bytes(b"another")
    monkeypatch.setattr(mni152, "_file", lambda: tmp_path / "template")
    assert adapter.fingerprint() != before


def test_slabs_are_those_that_the_committed_backbone_was_trained_on(entries: list[RawItem | Reject]) -> None:
    held_out = {item.sample_id for item in items(entries) if item.split != "train"}
    coronal = [sample for sample in sorted(held_out) if "coronal" in sample]
    assert coronal[:7] == [f"mni152-coronal-{index:03d}" for index in (61, 62, 63, 64, 65, 66, 85)]
    assert len(held_out) == 81
