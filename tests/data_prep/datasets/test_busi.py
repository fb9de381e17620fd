import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.busi import Adapter, BusiOptions
from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.experiment import BUSI, BUSI_ABSENT, experiment
from tests.writers.busi import write_raw

ROOT = "Dataset_BUSI_with_GT"


def adapter(folder, **options):
    return Adapter(folder, BusiOptions(**options))


def listed(folder, **options):
    entries = list(adapter(folder, **options).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, [e for e in entries if isinstance(e, Reject)]


@pytest.fixture
def raw(tmp_path):
    write_raw(tmp_path)
    return tmp_path


def save(path, pixels, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def one_image(folder, masks, size=(40, 50)):
    """Write one benign image with masks by file-name suffix, and return the adapter and its only
    item.
    """
    save(folder / "benign" / "benign (1).png", np.full(size, 90, np.uint8), "RGB")
    for suffix, (pixels, mode) in masks.items():
        save(folder / "benign" / f"benign (1){suffix}.png", pixels, mode)
    return adapter(folder), listed(folder)[0]["benign-1"]


def square(top, size=(40, 50), value=255):
    mask = np.zeros(size, np.uint8)
    mask[top : top + 5, 10:20] = value
    return mask


def test_every_image_is_listed_in_the_order_of_its_number(raw):
    items, rejects = listed(raw)
    assert rejects == []
    assert Counter(item.label for item in items.values()) == {"benign": 8, "malignant": 8, "normal": 4}
    assert [i for i in items if i.startswith("benign")] == [f"benign-{n}" for n in range(1, 9)]
    assert all(adapter(raw).load(item).mask.any() == (item.label != "normal") for item in items.values())


def test_the_folder_may_be_the_tree_or_its_parent(raw):
    assert listed(raw)[0].keys() == listed(raw / ROOT)[0].keys()


def test_an_unfamiliar_root_name_is_found_one_level_down(raw):
    (raw / ROOT).rename(raw / "BUSI")
    assert len(listed(raw)[0]) == 20


@pytest.mark.parametrize("keep_suffix", [True, False])
def test_the_curated_tree_gives_the_same_pixels(raw, tmp_path, keep_suffix):
    curated = tmp_path / "curated"
    for file in (raw / ROOT).rglob("*.png"):
        name = file.name if keep_suffix or "_mask_" in file.name else file.name.replace("_mask", "")
        target = curated / file.parent.name / ("mask" if "_mask" in file.name else "image") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    ours, theirs = listed(raw)[0], listed(curated)[0]
    assert ours.keys() == theirs.keys()
    for sample_id, item in ours.items():
        one, other = adapter(raw).load(item), adapter(curated).load(theirs[sample_id])
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask, other.mask)


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "masks"), ("images", "mask"), ("Image", "MASK"), ("IMAGES", "Masks")]
)
def test_folders_of_images_and_masks_by_all_their_names(raw, tmp_path, images, masks):
    copy = tmp_path / "copy"
    for file in (raw / ROOT).rglob("*.png"):
        name = file.parent.name
        target = copy / (name.upper() if name == "normal" else name) / (masks if "_mask" in file.name else images)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    items, rejects = listed(copy)
    assert Adapter.recognises(copy) and rejects == []
    ours = listed(raw)[0]
    assert {name: len(item.mask_paths) for name, item in items.items()} == {
        n: len(i.mask_paths) for n, i in ours.items()
    }


def test_files_beside_their_folders_and_masks_among_the_images_are_read_too(tmp_path):
    save(tmp_path / "benign" / "images" / "benign (1).png", square(1))
    save(tmp_path / "benign" / "images" / "benign (1)_mask.png", square(2))
    save(tmp_path / "benign" / "images" / "odd_mask.png", square(3))
    save(tmp_path / "benign" / "masks" / "odd_mask_mask.png", square(4))
    save(tmp_path / "benign" / "benign (2).png", square(5))
    save(tmp_path / "benign" / "benign (2)_mask.png", square(6))
    items, rejects = listed(tmp_path)
    assert rejects == []
    assert {name: [path.rsplit("/", 1)[1] for path in item.mask_paths] for name, item in items.items()} == {
        "benign-1": ["benign (1)_mask.png"],
        "benign-2": ["benign (2)_mask.png"],
        "benign-odd_mask": ["odd_mask_mask.png"],
    }


def test_a_folder_that_is_not_read_is_named(raw, tmp_path):
    benign = raw / ROOT / "benign"
    shutil.copytree(benign, tmp_path / "other" / "benign" / "imgs")
    (tmp_path / "other" / "benign" / "empty").mkdir()
    (tmp_path / "other" / "benign" / ".hidden").mkdir()
    (reject,) = listed(tmp_path / "other")[1]
    assert reject.reason == (
        "files in a folder imgs inside benign are not read; folders that are read here: image, images, mask, masks"
    )
    config = experiment(tmp_path / "run", raw_dir=tmp_path / "other")
    with pytest.raises(
        MaskLoomError, match=r"no usable image of busi among 1; .* files in a folder imgs inside benign"
    ):
        prepare(config, force=False)


def test_masks_are_united(tmp_path):
    busi, item = one_image(
        tmp_path, {"_mask": (square(2), "L"), "_mask_1": (square(12), "1"), "_mask_2": (square(30), "RGB")}
    )
    expected = (square(2) | square(12) | square(30)) > 0
    np.testing.assert_array_equal(busi.load(item).mask, expected)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P"])
def test_masks_of_every_mode(tmp_path, mode):
    busi, item = one_image(tmp_path, {"_mask": (square(2), mode)})
    np.testing.assert_array_equal(busi.load(item).mask, square(2) > 0)


def test_one_bright_channel_is_lesion_and_alpha_is_not(tmp_path):
    pixels = np.zeros((40, 50, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[5:9, 5:9, 1] = 255
    busi, item = one_image(tmp_path, {"_mask": (pixels, "RGBA")})
    assert busi.load(item).mask.sum() == 16


def test_masks_of_zeros_and_ones(tmp_path):
    busi, item = one_image(tmp_path, {"_mask": (square(2, value=1), "L")})
    np.testing.assert_array_equal(busi.load(item).mask, square(2) > 0)


def test_normal_images_can_be_left_out_and_are_listed(raw):
    items, rejects = listed(raw, include_normal=False)
    assert {item.label for item in items.values()} == {"benign", "malignant"}
    assert len(rejects) == 4 and all("include_normal=false" in reject.reason for reject in rejects)
    assert adapter(raw, include_normal=False).info().labels == ("benign", "malignant")


def test_files_that_cannot_be_used_are_listed(raw):
    benign = raw / ROOT / "benign"
    (benign / "benign (1)_mask.png").unlink()
    (benign / "benign (2).png").unlink()
    (benign / "notes.txt").write_text("x")
    (benign / ".DS_Store").write_text("x")
    (benign / "benign (3)_mask_1.png").unlink(missing_ok=True)
    rejects = {reject.path.rsplit("/", 1)[1]: reject.reason for reject in listed(raw)[1]}
    assert rejects.pop("notes.txt") == "not a PNG file"
    assert rejects.pop("benign (1).png") == "no mask file belongs to this image"
    assert rejects and all(
        "benign (2)_mask" in name and reason == "a mask without an image" for name, reason in rejects.items()
    )


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ({"_mask": (square(2, (20, 50)), "L")}, r"mask benign \(1\)_mask.png is 50x20, the image 50x40"),
        ({"_mask": (square(2, value=0), "L")}, "the mask of a benign image is empty"),
    ],
)
def test_a_mask_that_does_not_fit_is_rejected(tmp_path, masks, reason):
    busi, item = one_image(tmp_path, masks)
    with pytest.raises(RejectedSample, match=reason):
        busi.load(item)


def test_a_normal_image_with_a_lesion_mask_is_rejected(tmp_path):
    save(tmp_path / "normal" / "normal (1).png", square(2))
    save(tmp_path / "normal" / "normal (1)_mask.png", square(2))
    with pytest.raises(RejectedSample, match="the mask of a normal image is not empty"):
        adapter(tmp_path).load(listed(tmp_path)[0]["normal-1"])


@pytest.mark.parametrize("name", ["benign (1).png", "benign (1)_mask.png"])
@pytest.mark.parametrize("damage", ["truncate", "text", "remove", "chunk"])
def test_an_unreadable_png_is_rejected(tmp_path, name, damage):
    busi, item = one_image(
        tmp_path, {"_mask": (np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8), "L")}
    )
    path = tmp_path / "benign" / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(
            {"truncate": data[:60], "text": b"not a picture", "chunk": data[:40] + b"\xff" * 20 + data[60:]}[damage]
        )
    with pytest.raises(RejectedSample, match=r"benign \(1\).* cannot be decoded"):
        busi.load(item)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(MaskLoomError, match=r"not BUSI: no folder benign / malignant / normal here"):
        list(adapter(tmp_path).scan())


def test_a_missing_folder(tmp_path):
    with pytest.raises(MaskLoomError, match=r"data\.raw_dir=.*nowhere: no such folder"):
        adapter(tmp_path / "nowhere")
    with pytest.raises(MaskLoomError, match=r"data\.raw_dir is not set"):
        adapter(None)


@pytest.mark.skipif(not BUSI.is_dir(), reason=BUSI_ABSENT)
def test_real_busi_is_listed_whole():
    images = [p for p in BUSI.rglob("*.png") if "_mask" not in p.name]
    items, rejects = listed(BUSI)
    assert len(items) + len(rejects) == len(images)
    raw = adapter(BUSI).load(items["benign-100"])
    assert len(items["benign-100"].mask_paths) == 2 and raw.mask.shape == raw.image.shape


@pytest.mark.parametrize(("name", "known"), [("{label} ({n})", True), ("{label}({n})", True), ("scan_{n}", False)])
def test_busi_is_recognised_by_its_file_names(name, known, tmp_path):
    for label in ("benign", "malignant"):
        for number in range(3):
            stem = name.format(label=label, n=number)
            save(tmp_path / label / f"{stem}.png", np.zeros((8, 8), np.uint8))
            save(tmp_path / label / f"{stem}_mask.png", np.zeros((8, 8), np.uint8))
    assert Adapter.recognises(tmp_path) == known
