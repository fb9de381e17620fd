"""The breast ultrasound phantom: deterministic, with the physics that tells its classes apart, and
in BUSI's layout.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.adapter import RawItem
from maskloom.data_prep.datasets import phantom_bus
from maskloom.data_prep.processing import phantom

HEIGHT = 128


def rendered(number: int, label: str, view: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return phantom.render(phantom.patient(seed, number, label), seed, number, view, HEIGHT)


def test_the_same_key_gives_the_same_pixels() -> None:
    for first, second in zip(rendered(3, "malignant", view=1), rendered(3, "malignant", view=1), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("change", [{"number": 4}, {"view": 1}, {"seed": 1}])
def test_another_key_gives_another_image(change: dict[str, int]) -> None:
    key = {"number": 3, "view": 0, "seed": 0}
    assert not np.array_equal(
        rendered(label="benign", **key)[0][:64, :64], rendered(label="benign", **key | change)[0][:64, :64]
    )


def test_views_show_the_same_lesion_from_another_place() -> None:
    first, second = (rendered(3, "benign", view)[1] for view in (0, 1))
    assert not np.array_equal(first, second)
    assert 0.6 < first.sum() / second.sum() < 1.6


def test_normal_breasts_have_an_empty_mask() -> None:
    image, mask = rendered(4, "normal")
    assert image.dtype == mask.dtype == np.uint8
    assert not mask.any()


def behind(image: np.ndarray, mask: np.ndarray) -> float:
    """Mean grey value of the 10 mm behind the lesion, less that beside it at the same depth."""
    rows, columns = np.nonzero(mask)
    low, depth = rows.max() + 2, HEIGHT // 4
    middle = slice(int(np.quantile(columns, 0.3)), int(np.quantile(columns, 0.7)) + 1)
    beside = np.ones(mask.shape[1], dtype=bool)
    beside[max(0, columns.min() - 4) : columns.max() + 5] = False
    strip = image[low : low + depth].astype(float)
    return float(strip[:, middle].mean() - strip[:, beside].mean())


def test_malignant_lesions_cast_a_shadow_and_benign_ones_do_not() -> None:
    contrast = {
        label: np.mean([behind(*rendered(number, label)) for number in range(12)]) for label in ("benign", "malignant")
    }
    assert contrast["malignant"] < -20
    assert contrast["benign"] > contrast["malignant"] + 20


def test_malignant_contours_are_less_smooth() -> None:
    from skimage.measure import label, regionprops

    def solidity(kind: str) -> float:
        return float(np.mean([regionprops(label(rendered(n, kind)[1]))[0].solidity for n in range(12)]))

    assert solidity("benign") > 0.93 > 0.88 > solidity("malignant")


def test_both_scanners_occur_and_differ_in_aspect() -> None:
    patients = [phantom.patient(0, number, "benign") for number in range(12)]
    shapes = {p.scanner.name: phantom.render(p, 0, n, 0, HEIGHT)[0].shape for n, p in enumerate(patients)}
    assert set(shapes) == {"scanner A", "scanner B"}
    assert shapes["scanner A"] != shapes["scanner B"]


def test_unknown_label_is_an_error() -> None:
    with pytest.raises(ValueError, match="cyst"):
        phantom.patient(0, 0, "cyst")


def test_adapter_groups_views_by_patient_and_knows_their_class() -> None:
    options = phantom_bus.PhantomOptions(patients=5, views=2, height=HEIGHT)
    adapter = phantom_bus.Adapter(None, options)
    items = [item for item in adapter.scan() if isinstance(item, RawItem)]
    assert len(items) == 10
    assert len({item.group for item in items}) == 5
    assert [item.label for item in items[::2]] == ["benign", "malignant", "benign", "malignant", "normal"]
    raw = adapter.load(items[2])
    assert raw.mask is not None
    assert raw.mask.any()


def test_without_normal_there_are_two_classes() -> None:
    adapter = phantom_bus.Adapter(None, phantom_bus.PhantomOptions(patients=6, views=1, include_normal=False))
    assert adapter.info().labels == ("benign", "malignant")
    assert {item.label for item in adapter.scan() if isinstance(item, RawItem)} == {"benign", "malignant"}


def test_raw_files_have_the_layout_and_the_quirks_of_busi(tmp_path: Path) -> None:
    written = phantom_bus.write_raw(tmp_path, patients=10, height=HEIGHT)
    root = tmp_path / "Dataset_BUSI_with_GT"
    assert {path.parent for path in written} == {root / label for label in phantom.LABELS}
    assert (root / "benign" / "benign (1)_mask.png").is_file()
    masks = sorted(root.rglob("*_mask*.png"))
    assert {Image.open(path).mode for path in masks} == {"1", "L", "RGB", "RGBA"}
    assert any(path.name.endswith("_mask_1.png") for path in masks)
    for path in root.rglob("normal/*_mask.png"):
        assert not np.asarray(Image.open(path).convert("L")).any()


def test_halved_masks_unite_to_the_whole_lesion(tmp_path: Path) -> None:
    written = phantom_bus.write_raw(tmp_path, patients=3, height=HEIGHT)
    halves = [
        np.asarray(Image.open(path).convert("L"))
        for path in sorted(written[2].parent.glob(f"{written[2].stem}_mask*.png"))
    ]
    assert len(halves) == 2
    np.testing.assert_array_equal(np.maximum(*halves) > 0, rendered(2, "benign")[1] > 0)
