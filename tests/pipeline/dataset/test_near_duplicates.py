import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from maskloom.data_prep.adapter import RawItem
from maskloom.data_prep.datasets.busi import Adapter, BusiOptions
from maskloom.data_prep.splitting.groups import MOST_GROUPS, Found, consistent_rows
from maskloom.pipeline.dataset.near_duplicates import alignment as near_duplicate_alignment
from maskloom.pipeline.dataset.near_duplicates import chance as near_duplicate_chance
from maskloom.pipeline.dataset.near_duplicates import layout as near_duplicate_layout
from maskloom.pipeline.dataset.near_duplicates import neighbours as near_duplicate_index
from maskloom.pipeline.dataset.near_duplicates import search as near_duplicates
from maskloom.pipeline.dataset.near_duplicates.chance import chance_threshold
from maskloom.pipeline.dataset.near_duplicates.neighbours import build_index, neighbour_pairs
from maskloom.pipeline.dataset.near_duplicates.search import (
    NearDuplicates,
    Threshold,
    find_near_duplicates,
    near_duplicate_clusters,
    signature,
)
from maskloom.pipeline.dataset.near_duplicates.textures import windows
from maskloom.pipeline.errors import MaskLoomError
from tests.data_prep.experiment import BUSI, BUSI_ABSENT


def picture(seed, size=(200, 240)):
    """Return a picture with structure at several scales, (H, W) float32 in 0..1."""
    random = np.random.default_rng(seed)
    layers = [gaussian_filter(random.normal(size=size), sigma) * sigma for sigma in (1.5, 4, 10)]
    values = np.sum(layers, axis=0)
    return ((values - values.min()) / np.ptp(values)).astype(np.float32)


def with_calipers(image):
    drawn = Image.fromarray((image * 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for x, y in ((60, 70), (150, 120), (100, 40), (110, 150)):
        pen.line((x - 5, y, x + 5, y), fill=255, width=2)
        pen.line((x, y - 5, x, y + 5), fill=255, width=2)
    pen.rectangle((2, 2, 70, 16), fill=0)
    pen.text((4, 3), "D1 12.3 mm", fill=255)
    return np.asarray(drawn, dtype=np.float32) / 255


CHANGES = {
    "calipers": with_calipers,
    "gamma": lambda image: image**0.5,
    "time gain": lambda image: (image * np.linspace(0.5, 1, len(image), dtype=np.float32)[:, None]).clip(0, 1),
    "inverted": lambda image: 1 - image,
    "cropped": lambda image: np.ascontiguousarray(image[12:-8, 20:-9]),
    "cropped on one side": lambda image: np.ascontiguousarray(image[:, 40:]),
    "rescaled": lambda image: np.asarray(Image.fromarray(image).resize((90, 110))),
    "all at once": lambda image: np.ascontiguousarray(1 - with_calipers(image)[14:-9, 17:-12] ** 1.6),
}


def clusters(images, folder, digests=None, correlation=0.55):
    path = folder / "signatures.bin"
    path.write_bytes(b"".join(signature(np.asarray(image, dtype=np.float32)) for image in images))
    return near_duplicate_clusters(path, digests or [str(i) for i in range(len(images))], correlation)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_others_are_not(change, tmp_path):
    originals = [picture(seed) for seed in range(6)]
    found = clusters([*originals, *(CHANGES[change](image) for image in originals)], tmp_path)
    assert found == [*range(6), *range(6)]


def test_flat_images_resemble_nothing_unless_identical(tmp_path):
    flat = np.full((50, 50), 0.5, np.float32)
    assert clusters([flat, flat, flat * 0, picture(0)], tmp_path, ["a", "a", "b", "c"]) == [0, 0, 2, 3]


def test_certain_duplicates_are_joined_whatever_the_threshold(tmp_path):
    image = picture(0)
    assert clusters([image, image**1.05, picture(1)], tmp_path, correlation=1.0) == [0, 0, 2]


def test_blocks_do_not_change_the_result(tmp_path, monkeypatch):
    images = [picture(seed) for seed in range(5)]
    images += [CHANGES["cropped"](image) for image in images]
    whole = clusters(images, tmp_path)
    monkeypatch.setattr(near_duplicate_index, "BLOCK", 3)
    monkeypatch.setattr(near_duplicate_index, "QUERIES", 4)
    monkeypatch.setattr(near_duplicate_alignment, "PAIRS", 2)
    assert clusters(images, tmp_path) == whole


def lesion(seed, size=96):
    """Return one dark blob in the middle of lighter skin, each of another size, shape and texture,
    (size, size) in 0..1.
    """
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle, radius = np.arctan2(y, x), np.hypot(x / random.uniform(0.8, 1.2), y / random.uniform(0.8, 1.2))
    outline = sum(random.normal(0, 0.1 / k) * np.cos(k * angle + random.uniform(0, 6)) for k in range(2, 7))
    inside = 1 / (1 + np.exp((radius - random.uniform(0.14, 0.30) * (1 + outline)) * random.uniform(25, 70)))
    coarse, fine = (gaussian_filter(random.normal(size=(size, size)), size / scale) for scale in (40, 90))
    shade = random.uniform(0.6, 0.8) * (1 - inside) + random.uniform(0.2, 0.4) * inside
    shade += 0.05 * coarse / coarse.std() * inside + 0.006 * fine / fine.std()
    shade *= 1 - 0.5 * np.clip((np.hypot(x, y) - 0.42) / 0.2, 0, 1)
    return shade.clip(0, 1).astype(np.float32)


def brighter_and_shifted(image):
    return (np.roll(image, 2, axis=1) * 1.06 + 0.02).clip(0, 1)


def found_among(images, folder, correlation=None, workers=1):
    path = folder / "signatures.bin"
    path.write_bytes(b"".join(signature(np.asarray(image, dtype=np.float32)) for image in images))
    return find_near_duplicates(path, [str(i) for i in range(len(images))], correlation, workers)


@pytest.fixture(scope="module")
def lesions():
    """Return 24 unrelated lesions, and copies of the first two."""
    images = [lesion(seed) for seed in range(24)]
    return [*images, *map(brighter_and_shifted, images[:2])]


@pytest.fixture(scope="module")
def found(lesions, tmp_path_factory):
    """Return what is found among the lesions."""
    return found_among(lesions, tmp_path_factory.mktemp("lesions"))


def test_a_common_layout_joins_nothing_but_copies(found):
    assert found.clusters() == [*range(24), 0, 1]
    assert found.threshold.correlation == 0.55 and found.threshold.detail >= near_duplicates.DETAIL_OF_SOME
    # By the correlation of their textures alone they would be one.
    assert np.mean(found.scores[:, 0] >= 0.55) > 0.8


def test_the_result_depends_on_the_images_alone(lesions, found, tmp_path):
    other = found_among(lesions, tmp_path, workers=2)
    assert found.threshold == other.threshold and found.scores.tobytes() == other.scores.tobytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "signatures.bin"]


def test_a_given_correlation_joins_whatever_unrelated_images_score(lesions, tmp_path):
    found = found_among(lesions, tmp_path, correlation=0.975)
    assert found.threshold == Threshold(0.975, None)
    # Two of the unrelated ones are joined by their plain thumbnails.
    assert found.clusters() == [*range(23), 12, 0, 1]


def test_a_chain_through_most_of_a_dataset_is_refused(lesions, tmp_path):
    with pytest.raises(MaskLoomError, match=r"26 of 26 images would form one cluster.*set data.duplicates=identical"):
        found_among(lesions, tmp_path, correlation=0.7)
    assert list(tmp_path.iterdir()) == [tmp_path / "signatures.bin"]


def test_many_copies_of_one_picture_are_no_chain(tmp_path):
    image = picture(0)
    copies = [image ** np.float32(gamma) for gamma in np.linspace(0.5, 2, 12)]
    assert clusters([*copies, picture(1)], tmp_path) == [*[0] * 12, 12]


def test_images_too_alike_to_tell_copies_from_chance_are_refused(tmp_path):
    same = picture(0, (100, 100))
    images = [
        same + gaussian_filter(np.random.default_rng(seed).normal(size=same.shape), 2) * 0.02 for seed in range(20)
    ]
    with pytest.raises(
        MaskLoomError, match=r"too similar to tell copies from chance.*data.duplicates=identical.*group"
    ):
        found_among(images, tmp_path)


def test_text_and_calipers_that_two_images_share_do_not_join_them(lesions, tmp_path):
    drawn = [with_calipers(np.kron(image, np.ones((2, 2), np.float32))) for image in lesions[:24]]
    assert found_among(drawn, tmp_path).clusters() == list(range(24))


def test_threshold_of_chance_meets_what_a_normal_distribution_says():
    """The largest of all pairs' scores lies about where the threshold is laid, whatever number was
    drawn at a time.
    """
    random = np.random.default_rng(0)
    for draw in (1, 8, 64):
        scores = np.tanh(random.normal(0.1, 0.1, size=(20000, draw)).max(axis=1))
        assert chance_threshold(scores, draw, 1000) == pytest.approx(np.tanh(0.1 + 0.1 * 5.07), abs=0.02)


def test_the_fewer_the_images_the_stricter_the_threshold(lesions, found, tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "HEADROOM", 0)
    assert found_among(lesions, tmp_path).threshold.detail < found.threshold.detail
    monkeypatch.setattr(near_duplicate_chance, "DRAWS", 32)
    unlike = [picture(seed, (64, 64)) for seed in range(16)]
    assert found_among(unlike, tmp_path).threshold == Threshold(0.55, near_duplicates.DETAIL_OF_SOME)
    assert found_among(unlike[:15], tmp_path).threshold == Threshold(0.55, near_duplicates.DETAIL_OF_FEW)
    monkeypatch.setattr(near_duplicate_layout, "COMPONENTS", 8)
    monkeypatch.setattr(near_duplicates, "COMPONENTS", 8)
    assert found_among(unlike, tmp_path).threshold == Threshold(0.55, near_duplicates.DETAIL)


def test_a_margin_asks_for_more_of_both_correlations():
    scores = np.array([[0.6, 0.9, 0.5], [0.9, 0.6, 0.5], [0.9, 0.9, 0.5], [0.1, 0.9, 0.99], [0.9, 0.4, 0.99]])
    pairs = np.array([(0, n) for n in range(1, 6)])
    found = NearDuplicates(Threshold(0.55, 0.55), list(range(6)), pairs, scores)
    assert found.clusters() == [0, 0, 0, 0, 0, 5]
    assert found.clusters(0.1) == [0, 1, 2, 0, 0, 5]
    strict = NearDuplicates(Threshold(0.55, 0.88), list(range(6)), pairs, scores)
    assert strict.clusters() == [0, 0, 2, 0, 0, 5] and strict.clusters(0.1) == list(range(6))
    alone = NearDuplicates(Threshold(0.55, None), list(range(6)), pairs, scores)
    assert alone.clusters() == [0] * 6 and alone.clusters(0.1) == [0, 1, 0, 0, 0, 0]


def test_of_an_image_met_in_two_cells_the_better_score_counts():
    ids, scores = np.array([[3, 7, 3, 5]]), np.array([[0.4, 0.6, 0.9, 0.5]], np.float32)
    kept, best = near_duplicate_index.strongest(ids, scores, 3)
    assert kept.tolist() == [[3, 7, 5]] and best[0] == pytest.approx([0.9, 0.6, 0.5])


def test_the_partition_into_cells_finds_what_comparing_everything_finds(tmp_path, monkeypatch):
    originals = [picture(seed, (64, 64)) for seed in range(60)]
    images = [*originals, *(np.ascontiguousarray(image[3:, :-4]) for image in originals)]
    path = tmp_path / "signatures.bin"
    path.write_bytes(b"".join(map(signature, images)))
    index = build_index(path, len(images), 0, tmp_path / "windows", 1)
    copies = {(i, i + 60) for i in range(60)}
    pairs = neighbour_pairs(index, 1)
    assert copies <= set(map(tuple, pairs.tolist())) and (pairs[:, 0] < pairs[:, 1]).all()
    monkeypatch.setattr(near_duplicate_index, "EXACT", 0)
    monkeypatch.setattr(near_duplicate_index, "PROBED", 10)  # of 43
    assert copies <= set(map(tuple, neighbour_pairs(index, 1).tolist()))


def test_windows_lie_inside_the_image():
    assert windows()[0] == (0, 0, 1, 1) and len(set(windows())) == len(windows())
    assert all(0 <= t < b <= 1 + 1e-9 and 0 <= left < r <= 1 + 1e-9 for t, left, b, r in windows())


def item(name, label="benign", group=None, split=None, shown=""):
    return Found(name, f"/raw/{name}.png", label, group, split, "", shown, 0, False, 0, (0, 0))


def test_clusters_with_several_labels_are_rejected_whole():
    items = [item("a"), item("b", "malignant"), item("c"), item("d")]
    found = consistent_rows(items, [0, 0, 2, 2])
    rows, rejected = found.rows, found.rejected
    assert [(row.item.sample_id, row.group) for row in rows] == [("c", "c"), ("d", "c")]
    assert {r.path for r in rejected} == {"/raw/a.png", "/raw/b.png"}
    assert {r.reason for r in rejected} == {"near-duplicates with different labels (benign, malignant): a, b"}


def test_a_patient_may_have_lesions_of_several_classes():
    items = [item("a", group="p1"), item("b", "malignant", group="p1")]
    found = consistent_rows(items, [0, 1])
    rows, rejected = found.rows, found.rejected
    assert [row.group for row in rows] == ["p1", "p1"] and not rejected


def test_patients_that_share_a_near_duplicate_become_one_group():
    items = [item("a", group="p1"), item("b", group="p1"), item("c", group="p2"), item("d", group="p3")]
    found = consistent_rows(items, [0, 1, 1, 3])
    assert found.united == [("p1", "p2")]
    assert [row.group for row in found.rows] == ["p1", "p1", "p1", "p3"]


def test_a_picture_that_many_groups_share_joins_none_of_them():
    """A title page, or a test pattern: left out, so that no split sees it."""
    count = MOST_GROUPS + 1
    items = [item(f"a{n}", group=f"p{n}", shown="page") for n in range(count)]
    items += [item(f"b{n}", group=f"p{n}", shown=f"own {n}") for n in range(count)]
    found = consistent_rows(items, [0] * count + list(range(count, 2 * count)))
    assert [row.item.sample_id for row in found.rows] == [f"b{n}" for n in range(count)] and found.united == []
    assert {r.reason for r in found.rejected} == {f"the same picture lies in {count} groups, so it is no patient's own"}
    few = consistent_rows(items[:MOST_GROUPS], [0] * MOST_GROUPS)
    assert len(few.rows) == MOST_GROUPS and few.united == [tuple(f"p{n}" for n in range(MOST_GROUPS))]


def test_duplicates_across_the_splits_of_a_dataset_stay_in_the_most_held_out_one():
    items = [item("a", split="train"), item("b", split="test"), item("c", split="train")]
    found = consistent_rows(items, [0, 0, 2])
    rows, rejected = found.rows, found.rejected
    assert [row.item.sample_id for row in rows] == ["b", "c"]
    assert [(r.path, r.reason) for r in rejected] == [
        ("/raw/a.png", "group a also lies in the dataset's test split: b")
    ]


def test_an_image_without_a_split_does_not_join_a_published_test_split():
    items = [item("a"), item("b", split="test"), item("c", split="train"), item("d")]
    found = consistent_rows(items, [0, 0, 2, 2])
    rows, rejected = found.rows, found.rejected
    assert [row.item.sample_id for row in rows] == ["b", "c", "d"]
    assert [(r.path, r.reason) for r in rejected] == [
        ("/raw/a.png", "group a also lies in the dataset's test split: b")
    ]


@pytest.mark.skipif(not BUSI.is_dir(), reason=BUSI_ABSENT)
def test_real_busi_pairs_with_and_without_calipers(tmp_path):
    busi = Adapter(BUSI, BusiOptions())
    items = {entry.sample_id: entry for entry in busi.scan()}
    # Same lesion: byte-identical across classes; another crop (128, 129; 95, 97); calipers (14,
    # 123). The last three are unrelated.
    names = ["benign-433", "malignant-145", "malignant-128", "malignant-129", "malignant-95", "malignant-97", "malignant-14",
             "malignant-123", "benign-62", "malignant-1", "benign-184"]  # fmt: skip
    images = [busi.load(items[name]).image / np.float32(255) for name in names]
    assert clusters(images, tmp_path) == [0, 0, 2, 2, 4, 4, 6, 6, 8, 9, 10]


@pytest.mark.skipif(not BUSI.is_dir(), reason=BUSI_ABSENT)
def test_real_busi_pairs_of_high_plain_correlation_lie_in_one_group(tmp_path):
    paths = [entry.path for entry in Adapter(BUSI, BusiOptions()).scan() if isinstance(entry, RawItem)]
    raw = [Image.open(path).convert("L") for path in paths]
    small = [np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR), dtype=float).ravel() for image in raw]
    pairs = np.argwhere(np.triu(np.corrcoef(small) > 0.98, k=1))
    found = clusters([np.asarray(image) / np.float32(255) for image in raw], tmp_path)
    assert len(pairs) > 50
    assert [(paths[i], paths[j]) for i, j in pairs if found[i] != found[j]] == []
