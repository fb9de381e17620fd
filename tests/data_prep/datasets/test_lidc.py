from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.lidc import Adapter, LidcOptions
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.writers.lidc import (
    CLEAN_PATIENTS,
    NODULE_PATIENTS,
    NODULE_ROOT,
    PATIENTS,
    ROOT,
    anatomy,
    array_files,
    malignancy,
    resave,
    slice_files,
    standardised,
    truncate,
    write_nodule_tree,
    write_raw,
)


def listed(folder, **options):
    entries = list(Adapter(folder, LidcOptions(**options)).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, [e for e in entries if isinstance(e, Reject)]


def load(folder, sample_id, **options):
    return Adapter(folder, LidcOptions(**options)).load(listed(folder, **options)[0][sample_id])


@pytest.fixture
def masks_tree(tmp_path):
    write_raw(tmp_path)
    return tmp_path


@pytest.fixture
def nodule_tree(tmp_path):
    write_nodule_tree(tmp_path)
    return tmp_path


# The masks tree.


def test_masks_tree_every_slice_and_its_mask(masks_tree):
    items, rejects = listed(masks_tree)
    assert rejects == [] and len(items) == 22
    for split, patients in PATIENTS.items():
        for patient in patients:
            for nodules in (True, False):
                item = items[f"LIDC-IDRI-{patient:04d}_slice_{40 + nodules:04d}"]
                image, lung, nodule = anatomy(patient, 40 + nodules)
                loaded = Adapter(masks_tree, LidcOptions()).load(item)
                np.testing.assert_array_equal(loaded.image, image)
                expected = np.where(nodule & nodules, 2, np.where(lung | nodule, 1, 0))
                np.testing.assert_array_equal(loaded.mask, expected)
                assert loaded.value_range is None
                assert (item.label, item.group) == ("nodule" if nodules else "clean", f"LIDC-IDRI-{patient:04d}")
                assert item.split == ("test" if split == "test" else None)
                assert item.attributes["finding"] == ("a" if nodules else "no") + " pulmonary nodule"
    info = Adapter(masks_tree, LidcOptions()).info()
    assert info.mask_classes == ("background", "lung", "nodule") and info.labels == ("clean", "nodule")


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_masks_of_any_number_type(masks_tree, dtype):
    _, mask = slice_files(masks_tree, "train", 1, nodules=False)
    resave(mask, lambda stored: stored.astype(dtype))
    _, lung, nodule = anatomy(1, 40)
    np.testing.assert_array_equal(load(masks_tree, "LIDC-IDRI-0001_slice_0040").mask, lung | nodule)


def test_other_mask_codes_can_be_given(masks_tree):
    for nodules in (True, False):
        resave(slice_files(masks_tree, "train", 1, nodules)[1], lambda stored: np.array([0, 127, 255])[stored])
    _, lung, nodule = anatomy(1, 41)
    with pytest.raises(RejectedSample, match=r"holds the value 127, expected 0, 1, 2; set data\.options\.mask_codes"):
        load(masks_tree, "LIDC-IDRI-0001_slice_0041")
    codes = {"mask_codes": (127, 255)}
    np.testing.assert_array_equal(
        load(masks_tree, "LIDC-IDRI-0001_slice_0041", **codes).mask, np.where(nodule, 2, lung.astype(int))
    )
    assert set(np.unique(load(masks_tree, "LIDC-IDRI-0001_slice_0040", **codes).mask)) == {0, 1}


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (1, 0)])
def test_mask_codes_must_differ(codes):
    with pytest.raises(ValidationError, match="two values other than 0"):
        LidcOptions(mask_codes=codes)


def test_the_other_kind_of_mask_may_lie_beside(masks_tree):
    image, mask = slice_files(masks_tree, "train", 1, nodules=True)
    np.save(mask.with_name(mask.name.replace("combined", "lung")), np.zeros((3, 3)))
    items, rejects = listed(masks_tree)
    assert len(items) == 22 and rejects == []
    mask.unlink()
    items, rejects = listed(masks_tree)
    assert [(r.path, r.reason.split(":")[0]) for r in rejects] == [(str(image), "no mask file belongs to this slice")]


def test_colour_pngs_are_read_as_grey(masks_tree):
    path, _ = slice_files(masks_tree, "train", 1, nodules=True)
    with Image.open(path) as image:
        image.convert("RGBA").save(path)
    np.testing.assert_array_equal(load(masks_tree, "LIDC-IDRI-0001_slice_0041").image, anatomy(1, 41)[0])


def test_a_slice_of_both_classes_is_rejected_in_both(masks_tree):
    image, _ = slice_files(masks_tree, "train", 1, nodules=True)
    clean = masks_tree / ROOT / "train" / "clean" / image.name
    clean.write_bytes(image.read_bytes())
    items, rejects = listed(masks_tree)
    assert "LIDC-IDRI-0001_slice_0041" not in items
    assert {r.path for r in rejects} == {str(image), str(clean)}


def test_a_slice_in_train_and_test_is_first_listed_in_test(masks_tree):
    for path in slice_files(masks_tree, "train", 1, nodules=True):
        (masks_tree / ROOT / "test" / "with_nodules" / path.name).write_bytes(path.read_bytes())
    entries = [e for e in Adapter(masks_tree, LidcOptions()).scan() if e.sample_id == "LIDC-IDRI-0001_slice_0041"]
    assert [entry.split for entry in entries] == ["test", None]


def test_files_of_other_names_are_told(masks_tree):
    folder = masks_tree / ROOT / "train" / "clean"
    for name in ("LIDC-IDRI-0001_slice_0099.jpg", "LIDC-IDRI-1_slice_0001.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    (folder / "LIDC-IDRI-0001_lung_mask_0099.npy").write_bytes(b"")
    reasons = Counter(reject.reason.split(" LIDC")[0] for reject in listed(masks_tree)[1])
    assert reasons == {"neither a slice": 3, "a mask without a slice": 1}


# The nodule tree.


def test_nodule_tree_every_slice_its_mask_and_its_malignancy(nodule_tree):
    items, rejects = listed(nodule_tree)
    assert rejects == [] and len(items) == 18
    words = {1: "highly unlikely", 2: "moderately unlikely", 3: "indeterminate", 4: "moderately susp", 5: "highly susp"}
    for patient in NODULE_PATIENTS:
        for number in range(2):
            item = items[f"{patient:04d}_NI000_slice{number:03d}"]
            image, nodule = standardised(patient, number)
            loaded = Adapter(nodule_tree, LidcOptions()).load(item)
            np.testing.assert_array_equal(loaded.image, image)
            np.testing.assert_array_equal(loaded.mask, nodule)
            assert (item.label, item.group, item.split) == ("nodule", f"LIDC-IDRI-{patient:04d}", None)
            assert words[malignancy(patient)] in item.attributes["finding"]
    for patient in CLEAN_PATIENTS:
        item = items[f"{patient:04d}_CN001_slice001"]
        assert not Adapter(nodule_tree, LidcOptions()).load(item).mask.any()
        assert (item.label, item.group) == ("clean", f"LIDC-IDRI-{patient:04d}")
        assert item.attributes == {"finding": "no pulmonary nodule"}
    assert Adapter(nodule_tree, LidcOptions()).info().mask_classes == ("background", "nodule")


def test_black_and_white_are_taken_over_the_lung_alone(nodule_tree):
    image, _ = standardised(1, 0)
    black, white = load(nodule_tree, "0001_NI000_slice000").value_range
    np.testing.assert_allclose((black, white), np.percentile(image[image != 0], (1, 99)))
    assert black < -0.9 and white > 0


def test_without_a_table_nodules_have_no_malignancy(nodule_tree):
    (nodule_tree / NODULE_ROOT / "Meta" / "meta_info.csv").unlink()
    items, rejects = listed(nodule_tree)
    assert len(items) == 18 and rejects == []
    assert items["0001_NI000_slice000"].attributes == {"finding": "a pulmonary nodule"}


def test_the_first_versions_table(nodule_tree):
    """It lies in the root, names files without their folder, and lists no clean slices."""
    old = nodule_tree / NODULE_ROOT / "Meta" / "meta_info.csv"
    rows = [row for row in old.read_text().splitlines() if "_CN" not in row]
    old.unlink()
    text = "\n".join(row.rsplit(",", 1)[0] for row in rows).replace(",LIDC-IDRI-0001/", ",")
    (nodule_tree / NODULE_ROOT / "meta_info.csv").write_text(text)
    items, rejects = listed(nodule_tree)
    assert len(items) == 18 and rejects == []
    assert items["0001_NI000_slice001"].attributes == {
        "finding": "a pulmonary nodule moderately unlikely to be malignant"
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("original_image", "image", r"meta_info\.csv has no column 'original_image'.*write it again, or remove it"),
        (",malignancy,", ",grade,", r"meta_info\.csv has no column 'malignancy'"),
        (
            "0001_MA000_slice000,2,",
            "0001_MA000_slice000,6,",
            r"meta_info\.csv: row 2: malignancy of 0001_NI000_slice000 is '6', expected 1 to 5; correct",
        ),
        (
            "0001_NI000_slice001,",
            "0002_NI000_slice000,",
            r"row 4: malignancy of 0002_NI000_slice000 is 3, in row 3 2; keep one",
        ),
        (
            "LIDC-IDRI-0001/0001_NI000_slice000,",
            ",",
            r"row 2: original_image is empty, expected the name of an image; write",
        ),
    ],
)
def test_a_table_that_cannot_be_trusted_ends_the_work(nodule_tree, old, new, message):
    table = nodule_tree / NODULE_ROOT / "Meta" / "meta_info.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(MaskLoomError, match=message):
        listed(nodule_tree)


def test_a_table_of_one_value_per_row_is_told(nodule_tree):
    """As pandas' concat along the wrong axis writes it: every value in a row of its own, in the
    last column.
    """
    table = nodule_tree / NODULE_ROOT / "Meta" / "meta_info.csv"
    header, *rows = table.read_text().splitlines()
    values = [value for row in rows for value in row.split(",")]
    table.write_text("\n".join([f"{header},0", *("," * 8 + value for value in values)]))
    with pytest.raises(MaskLoomError, match=r"meta_info\.csv: row 2: original_image is empty, .* one row per image"):
        listed(nodule_tree)


def test_grades_as_pandas_writes_them(nodule_tree):
    table = nodule_tree / NODULE_ROOT / "Meta" / "meta_info.csv"
    table.write_text(table.read_text().replace("0001_MA000_slice000,2,", "0001_MA000_slice000,2.0,"))
    assert "moderately unlikely" in listed(nodule_tree)[0]["0001_NI000_slice000"].attributes["finding"]


def test_files_and_rows_that_lack_each_other_are_rejected(nodule_tree):
    table = nodule_tree / NODULE_ROOT / "Meta" / "meta_info.csv"
    table.write_text("".join(line for line in table.open() if "0001_NI000_slice000" not in line))
    image, _ = array_files(nodule_tree, 2, 0, 0)
    image.unlink()
    array_files(nodule_tree, 3, 0, 0)[1].unlink()
    reasons = {reject.path.rsplit("/", 1)[1]: reject.reason for reject in listed(nodule_tree)[1]}
    assert reasons == {
        "0001_NI000_slice000.npy": "meta_info.csv has no row for this image",
        "0002_MA000_slice000.npy": "a mask without an image",
        "0003_NI000_slice000.npy": "no mask file belongs to this image: 0003_MA000_slice000.npy is missing",
        "meta_info.csv#0002_NI000_slice000": "the table lists this image, and its file is missing",
    }


@pytest.mark.parametrize(
    "name", ["0002_NI000_slice000.npy", "0001_MA000_slice000.npy", "0001_CN000_slice0.npy", "a.npy"]
)
def test_arrays_of_other_names_are_rejected(nodule_tree, name):
    image, _ = array_files(nodule_tree, 1, 0, 0)
    image.rename(image.with_name(name))
    assert (str(image.with_name(name)), "not named 0000_NI000_slice000.npy") in [
        (reject.path, reject.reason.split(" with")[0]) for reject in listed(nodule_tree)[1]
    ]


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        (0, lambda image: np.where(image == 0, np.nan, image), "holds NaN or infinite values"),
        (0, lambda image: image * 0, "shows no lung: every pixel is 0"),
        (0, lambda image: image.astype(np.int16), "holds int16 of shape .64, 64., expected 2 axes of floats"),
        (0, lambda image: image[:32], r"mask 0001_MA000_slice000\.npy is 64x64, the image 64x32"),
        (1, lambda mask: mask * 0, r"mask 0001_MA000_slice000\.npy of a nodule slice is empty"),
        (1, lambda mask: mask * 3, "holds the value 3, expected 0, 1; the masks of this tree are True and False"),
        (1, lambda mask: mask[..., None], "expected 2 axes"),
    ],
)
def test_arrays_that_cannot_be_used_are_rejected(nodule_tree, part, change, reason):
    resave(array_files(nodule_tree, 1, 0, 0)[part], change)
    with pytest.raises(RejectedSample, match=reason):
        load(nodule_tree, "0001_NI000_slice000")


def test_a_clean_slice_with_a_nodule_is_rejected(nodule_tree):
    resave(array_files(nodule_tree, 28, 1, 0, clean=True)[1], lambda mask: mask + 1)
    with pytest.raises(RejectedSample, match=r"0028_CM001_slice000\.npy of a clean slice is not empty"):
        load(nodule_tree, "0028_CN001_slice000")


@pytest.mark.parametrize("part", [0, 1])
def test_truncated_arrays_are_rejected(nodule_tree, part):
    truncate(array_files(nodule_tree, 1, 0, 0)[part])
    with pytest.raises(RejectedSample, match=r"0001_(NI|MA)000_slice000\.npy cannot be decoded"):
        load(nodule_tree, "0001_NI000_slice000")


# Both.


@pytest.mark.parametrize(("write", "root"), [(write_raw, ROOT), (write_nodule_tree, NODULE_ROOT)])
def test_the_folder_may_be_the_tree_or_its_parent(tmp_path, write, root):
    write(tmp_path)
    assert listed(tmp_path)[0].keys() == listed(tmp_path / root)[0].keys()
    assert Adapter.recognises(tmp_path) and Adapter.recognises(tmp_path / root)


def test_like_folders_without_its_files_are_not_taken_for_it(tmp_path):
    (tmp_path / "train" / "clean").mkdir(parents=True)
    (tmp_path / "train" / "clean" / "shirt.png").write_bytes(b"")
    assert not Adapter.recognises(tmp_path)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "cats").mkdir()
    for use in (lambda adapter: adapter.info(), lambda adapter: list(adapter.scan())):
        with pytest.raises(MaskLoomError, match=r"data\.raw_dir=.*: not LIDC: neither train or test"):
            use(Adapter(tmp_path, LidcOptions()))
