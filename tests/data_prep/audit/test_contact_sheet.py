"""The contact sheet: which images it shows, what it draws, and that the page is bounded, escaped
and needs nothing from outside.
"""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.audit import contact_sheet
from maskloom.data_prep.audit.audit import indexed, open_datasets
from maskloom.data_prep.audit.contact_sheet import contact_sheet_page, outlines, spread_samples
from tests.tiny_datasets import PALETTE, tiny_description, tiny_samples, write_dataset


def page(folder, splits, per_class=24, description=None):
    write_dataset(folder, description or tiny_description(), splits)
    datasets = open_datasets([folder])
    with indexed(datasets, near=False) as index:
        return contact_sheet_page(datasets[0], index, per_class)


def chosen(folder, splits, label, count):
    write_dataset(folder, tiny_description(), splits)
    datasets = open_datasets([folder])
    with indexed(datasets, near=False) as index:
        return spread_samples(index, label, count)


class Tags(HTMLParser):
    """Collects the tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def embedded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_a_section_for_each_class(tmp_path):
    splits = {"train": tiny_samples("train", 8), "test": tiny_samples("test", 4)}
    splits["train"][0].label = None
    text = page(tmp_path / "set", splits)
    assert re.findall(r"<h2>(.*?)<small>", text) == ["disc", "square", "no class"]
    assert "5 of 5 images in 5 groups" in text and "1 of 1 images in 1 groups" in text
    tags = Tags(text)
    assert len(tags.all("figure")) == 12
    for sample in (*splits["train"], *splits["test"]):
        assert text.count(f">{sample.sample_id}<") == 1 and sample.text in text
        assert f"group {sample.group_id}" in text


def test_a_dataset_without_classes(tmp_path):
    samples = tiny_samples("train", 3)
    for sample in samples:
        sample.label, sample.mask = None, None
    text = page(tmp_path / "set", {"train": samples}, description=tiny_description(labels=()))
    assert re.findall(r"<h2>(.*?)<small>", text) == ["no class"] and 'class="outlines"' not in text


def test_pictures_and_outlines_are_the_rows(tmp_path):
    samples = tiny_samples("train", 2)
    samples[1].mask = np.zeros_like(samples[1].mask)
    images = Tags(page(tmp_path / "set", {"train": samples})).all("img")
    assert [one["alt"] for one in images] == ["train-0000", "outlines of its mask", "train-0001"]
    side = contact_sheet.SIDE
    shown = np.asarray(embedded(images[0]["src"]).resize((32, 32), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(shown.ravel(), samples[0].image.ravel())[0, 1] > 0.98
    drawn = np.asarray(embedded(images[1]["src"]).convert("RGBA"))
    large = np.asarray(Image.fromarray(samples[0].mask).resize((side, side), Image.Resampling.NEAREST))
    visible = drawn[..., 3] > 0
    assert drawn.shape[:2] == (side, side) and visible.any() and not (visible & (large == 0)).any()
    assert (drawn[visible][:, :3] == PALETTE[1]).all()


def test_a_lesion_of_one_pixel_is_shown(tmp_path):
    side = contact_sheet.SIDE * 4
    (sample,) = tiny_samples("train", 1, size=side)
    sample.mask[:] = 0
    sample.mask[9, 13] = 1
    _, drawn = Tags(page(tmp_path / "set", {"train": [sample]}, description=tiny_description(side))).all("img")
    assert drawn["alt"] == "outlines of its mask"


def test_outlines_are_inner_borders_in_the_colours_of_the_palette():
    mask = np.zeros((9, 9), np.uint8)
    mask[1:6, 1:6], mask[7:9, 7:9] = 1, 2
    drawn = np.asarray(Image.open(io.BytesIO(outlines(mask, ((0, 0, 0), (255, 0, 0), (0, 200, 50))))).convert("RGBA"))
    expected = np.zeros((9, 9, 4), np.uint8)
    expected[1:6, 1:6], expected[2:5, 2:5], expected[7:9, 7:9] = (255, 0, 0, 255), 0, (0, 200, 50, 255)
    np.testing.assert_array_equal(drawn * (drawn[..., 3:] > 0), expected)


@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_colour_images_keep_their_aspect(tmp_path, size):
    samples = tiny_samples("train", 1)
    samples[0].image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    samples[0].mask = np.ones(size, np.uint8)
    samples[0].conditioning_image = np.zeros((*size, 3), np.uint8)
    about = tiny_description(channels=3).model_copy(update={"image_size": size})
    first, second = (
        embedded(one["src"]) for one in Tags(page(tmp_path / "set", {"train": samples}, description=about)).all("img")
    )
    assert first.size == second.size == tuple(contact_sheet.SIDE * side // 48 for side in reversed(size))
    assert first.mode == "RGB"


def test_the_choice_is_spread_over_splits_and_groups(tmp_path):
    splits = {"test": tiny_samples("test", 20, per_group=4), "train": tiny_samples("train", 40, per_group=4)}
    found = chosen(tmp_path / "set", splits, "disc", 6)
    group_of = {sample.sample_id: sample.group_id for split in splits.values() for sample in split}
    assert len(found) == len({group_of[sample] for sample in found}) == 6
    assert found == sorted(found, reverse=False, key=lambda sample: (sample.startswith("test"), sample))
    assert [sum(sample.startswith(split) for sample in found) for split in ("train", "test")] == [4, 2]


def test_further_images_of_a_group_come_when_all_groups_are_shown(tmp_path):
    splits = {"train": tiny_samples("train", 20, per_group=10)}
    assert chosen(tmp_path / "a", splits, "disc", 2) == ["train-0000", "train-0010"]
    found = chosen(tmp_path / "b", splits, "disc", 4)
    assert len(found) == 4 and {"train-0000", "train-0010"} < set(found)
    assert chosen(tmp_path / "c", splits, "disc", 99) == [f"train-{number:04d}" for number in range(0, 20, 2)]
    assert chosen(tmp_path / "d", splits, None, 5) == []


def test_the_page_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MOST_IMAGES", 6)
    splits = {"train": tiny_samples("train", 20)}
    splits["train"][0].text = "x" * 5000
    text = page(tmp_path / "set", splits, per_class=10)
    assert len(Tags(text).all("figure")) == 6
    assert len(text) < 6 * 15_000 + 10_000
    names = tuple(f"class {number}" for number in range(8))
    for number, sample in enumerate(splits["train"]):
        sample.label = number % 8
    text = page(tmp_path / "set", splits, description=tiny_description(labels=names))
    assert len(Tags(text).all("figure")) == 6 and "2 further classes are left out" in text


def test_texts_are_escaped_and_nothing_is_loaded(tmp_path):
    nasty = '"><script>alert(1)</script><img src="http://x/y.png">'
    samples = tiny_samples("train", 2)
    for sample in samples:
        sample.text, sample.group_id = nasty, nasty
        sample.sample_id += nasty
    about = tiny_description(labels=(nasty, "square")).model_copy(
        update={"dataset": nasty, "modality": nasty, "mask_classes": ("background", nasty)}
    )
    text = page(tmp_path / "set", {"train": samples}, description=about)
    tags = Tags(text)
    assert not tags.all("script") and not tags.all("link") and "://" not in text.replace("http://x/y.png", "")
    assert all(one["src"].startswith("data:image/") for one in tags.all("img"))
    assert all(one["href"].startswith("#class-") for one in tags.all("a"))
    assert "default-src 'none'" in text and nasty in "".join(tags.words)


def test_the_page_is_the_same_every_time(tmp_path):
    splits = {"train": tiny_samples("train", 6), "test": tiny_samples("test", 3)}
    assert page(tmp_path / "a", splits, 3) == page(tmp_path / "b", splits, 3)
