import shutil

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.bci import Adapter
from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.experiment import experiment
from tests.writers.bci import LEVELS, NAMES, ROOT, SIDE, at, pair, write_raw


def listed(folder):
    entries = list(Adapter(folder, Adapter.Options()).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, [e for e in entries if isinstance(e, Reject)]


def load(folder, sample_id):
    return Adapter(folder, Adapter.Options()).load(listed(folder)[0][sample_id])


@pytest.fixture
def raw(tmp_path):
    write_raw(tmp_path / "raw")
    return tmp_path / "raw"


def test_every_pair_is_listed_once_by_split_and_number(raw):
    items, rejects = listed(raw)
    assert rejects == []
    assert list(items) == [name.removesuffix(".png").replace("+", "plus").replace("_", "-") for name in ids_in_order()]


def ids_in_order():
    return [f"train_{n:05d}_{LEVELS[n % 4]}.png" for n in range(12)] + [
        f"test_{n:05d}_{LEVELS[n]}.png" for n in range(4)
    ]


def test_the_ihc_image_is_the_target_and_the_he_image_the_condition(raw):
    items, _ = listed(raw)
    for number, item in enumerate(items.values()):
        he, ihc = pair(number)
        loaded = Adapter(raw, Adapter.Options()).load(item)
        np.testing.assert_array_equal(loaded.image, ihc)
        np.testing.assert_array_equal(loaded.condition, he)
        assert loaded.mask is None and loaded.value_range is None
        assert item.path.endswith(NAMES[number]) and "/IHC/" in item.path


@pytest.mark.parametrize(
    ("number", "label", "status"),
    [(0, "HER2 0", "negative"), (1, "HER2 1+", "negative"), (2, "HER2 2+", "equivocal"), (3, "HER2 3+", "positive")],
)
def test_the_name_gives_the_level_of_the_slide(raw, number, label, status):
    item = list(listed(raw)[0].values())[number]
    assert item.label == label == Adapter(raw, Adapter.Options()).info().labels[number]
    assert item.attributes == {"status": status}


def test_the_release_fixes_the_test_split_and_leaves_validation_to_be_drawn(raw):
    items = listed(raw)[0]
    assert {i: item.split for i, item in items.items()} == {i: "test" if i.startswith("test") else None for i in items}
    assert all(item.group is None for item in items.values())


def test_the_folder_may_be_the_tree_or_its_parent_or_the_challenges_tree(raw, tmp_path):
    other = tmp_path / "other"
    for stain in ("HE", "IHC"):
        for split in ("train", "test"):
            shutil.copytree(raw / ROOT / stain / split, other / split / stain)
    assert listed(raw)[0].keys() == listed(raw / ROOT)[0].keys() == listed(other)[0].keys()
    assert Adapter.recognises(raw) and Adapter.recognises(raw / ROOT) and Adapter.recognises(other)


def test_another_trees_folders_are_not_taken_for_it(tmp_path):
    for stain in ("HE", "IHC"):
        (tmp_path / stain / "train").mkdir(parents=True)
        (tmp_path / stain / "train" / "cat.png").write_bytes(b"")
    assert not Adapter.recognises(tmp_path)


def test_images_with_an_alpha_channel_are_read_without_it(raw):
    with Image.open(at(raw, "IHC")) as image:
        image.convert("RGBA").save(at(raw, "IHC"))
    np.testing.assert_array_equal(load(raw, "train-00000-0").image, pair(0)[1])


def test_a_pair_of_unlike_sizes_is_rejected(raw):
    Image.new("RGB", (SIDE, SIDE + 1)).save(at(raw, "HE"))
    with pytest.raises(RejectedSample, match=r"the H&E image 00000_train_0\.png is 48x49, the image 48x48"):
        load(raw, "train-00000-0")


@pytest.mark.parametrize("stain", ["HE", "IHC"])
@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_an_image_without_colour_is_rejected(raw, stain, mode):
    Image.new(mode, (SIDE, SIDE)).save(at(raw, stain))
    with pytest.raises(RejectedSample, match=r"00000_train_0\.png is grey or has a palette, expected RGB"):
        load(raw, "train-00000-0")


@pytest.mark.parametrize("stain", ["HE", "IHC"])
def test_an_image_without_its_partner_is_rejected_and_named(raw, stain):
    other = {"HE": "IHC", "IHC": "HE"}[stain]
    at(raw, stain).unlink()
    items, rejects = listed(raw)
    assert "train-00000-0" not in items and len(items) == 15
    assert [reject.path for reject in rejects] == [str(at(raw, other))]
    assert f"of the same name in {stain}/train" in rejects[0].reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("00000_train_4+.png", "not named NUMBER_train_LEVEL"),
        ("00000_train_1.png", "not named NUMBER_train_LEVEL"),
        ("00000_train_0.jpg", "not named NUMBER_train_LEVEL"),
        ("00000_test_0.png", "lies in train, and its name says test"),
    ],
)
def test_names_that_say_something_else_are_rejected_in_both_stains(raw, name, reason):
    for stain in ("HE", "IHC"):
        at(raw, stain).rename(at(raw, stain).with_name(name))
    items, rejects = listed(raw)
    assert len(items) == 15
    assert sorted(r.path for r in rejects) == sorted(str(at(raw, stain).with_name(name)) for stain in ("HE", "IHC"))
    assert all(reason in reject.reason for reject in rejects)


def test_the_two_stains_must_agree_on_the_level(raw):
    at(raw, "HE").rename(at(raw, "HE").with_name("00000_train_3+.png"))
    items, rejects = listed(raw)
    assert not any(item.startswith("train-00000") for item in items) and len(rejects) == 2


@pytest.mark.parametrize("stain", ["HE", "IHC"])
def test_a_folder_without_both_stains(raw, stain):
    shutil.rmtree(raw / ROOT / stain)
    with pytest.raises(MaskLoomError, match=r"data\.raw_dir=.*not BCI: no folders HE and IHC"):
        listed(raw)
    assert not Adapter.recognises(raw)


def test_prepared_with_the_he_image_as_condition(raw, tmp_path):
    from datasets import load_dataset

    config = experiment(tmp_path / "run", dataset="bci", raw_dir=raw, image_size=SIDE, conditioning="image")
    prepare(config, force=False)
    rows = load_dataset(str(tmp_path / "run" / "dataset"))
    assert rows["test"].num_rows == 4 and rows["train"].num_rows + rows["validation"].num_rows == 12
    by_id = {row["sample_id"]: row for split in rows.values() for row in split}
    he, ihc = pair(0)
    np.testing.assert_array_equal(np.asarray(by_id["train-00000-0"]["conditioning_image"]), he)
    np.testing.assert_array_equal(np.asarray(by_id["train-00000-0"]["image"]), ihc)
    assert "HER2 0" in by_id["train-00000-0"]["text"]
    assert read_contract(tmp_path / "run" / "dataset").description.labels == ("HER2 0", "HER2 1+", "HER2 2+", "HER2 3+")
