"""Stain normalisation, on tiles whose stains and their amounts are known, and against
implementations of its own.
"""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import lab2rgb, rgb2lab
from threadpoolctl import threadpool_limits

from maskloom.data_prep.processing.stains import stain_normaliser
from maskloom.pipeline.config.data import StainConfig
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

Tile = NDArray[np.uint8]
PUBLISHED = np.array(
    [[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]]
)  # haematoxylin, eosin, as torchstain has them
OTHER = np.array([[0.68, 0.30], [0.66, 0.85], [0.32, 0.42]])  # another laboratory's: more violet
OTHER = OTHER / np.linalg.norm(OTHER, axis=0)


def tile(seed: int, stains: NDArray[np.float64] = PUBLISHED, strength: float = 1.0, tissue: float = 1.0) -> Tile:
    """Return a tile (128, 128, 3) with smooth amounts of two stains in its upper part, white below,
    and camera noise.
    """
    random = np.random.default_rng(seed)

    def amounts(middle: float, spread: float, blur: float) -> NDArray[np.float64]:
        field = gaussian_filter(random.normal(size=(128, 128)), blur)
        return np.clip(middle + spread * (field - field.mean()) / field.std(), 0, None)

    both = strength * np.stack([amounts(0.5, 0.6, 2), amounts(0.5, 0.3, 4)])
    both[:, round(tissue * 128) :] = 0
    light = 240 * np.exp(-np.einsum("cs,shw->hwc", stains, both)) + random.normal(0, 1.5, (128, 128, 3))
    return light.clip(0, 255).astype(np.uint8)


def saved(folder: Path, pixels: Tile) -> Path:
    path = folder / "reference é.png"
    Image.fromarray(pixels).save(path)
    return path


def macenko_by_hand(image: Tile, stains: NDArray[np.float64], most: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an image with other stains, step by step as in the paper (Macenko et al. 2009)."""
    _, amounts = stains_by_hand(image)
    scaled = amounts * (most / np.percentile(amounts, 99, axis=1))[:, None]
    return np.clip(240 * np.exp(-(stains @ scaled)), 0, 255).T.reshape(image.shape)


def stains_by_hand(image: Tile) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the stains' directions (3, 2), haematoxylin first, and their amounts (2, pixels)."""
    density = -np.log((image.reshape(-1, 3) + 1.0) / 240)
    dense = density[(density >= 0.15).all(axis=1)]
    plane = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)[2][:2]
    plane *= np.sign(plane @ dense.mean(axis=0))[:, None]
    angles = np.arctan2(dense @ plane[1], dense @ plane[0])
    ends = [np.array([np.cos(angle), np.sin(angle)]) @ plane for angle in np.percentile(angles, [1, 99])]
    stains = np.stack(sorted(ends, key=lambda stain: -stain[0]), axis=1)
    return stains, np.linalg.pinv(stains) @ density.T


def reinhard_by_hand(image: Tile, reference: Tile) -> NDArray[np.float64]:
    """Return an image with the reference's mean and deviation in L*a*b* (Reinhard et al. 2001;
    scikit-image).
    """
    lab, target = rgb2lab(image), rgb2lab(reference)
    moved = (lab - lab.mean(axis=(0, 1))) / lab.std(axis=(0, 1)) * target.std(axis=(0, 1)) + target.mean(axis=(0, 1))
    return lab2rgb(moved) * 255


def distance(left: Tile, right: Tile) -> float:
    """Return the largest difference of the channels' means, in grey values."""
    return float(np.abs(left.mean(axis=(0, 1)) - right.mean(axis=(0, 1))).max())


@pytest.mark.parametrize("seed", range(5))
def test_macenko_by_published_vectors_is_the_papers(seed: int):
    image = tile(seed, OTHER)
    found = stain_normaliser(StainConfig(method="macenko"))(image)
    expected = macenko_by_hand(image, PUBLISHED, np.array([1.9705, 1.0308]))
    assert np.abs(found - expected).max() <= 1  # torchstain cuts decimals off


def test_macenko_by_a_reference_is_the_papers(tmp_path: Path):
    reference, image = tile(0), tile(1, OTHER, strength=0.8)
    found = stain_normaliser(StainConfig(method="macenko", reference=saved(tmp_path, reference)))(image)
    stains, amounts = stains_by_hand(reference)
    assert np.abs(found - macenko_by_hand(image, stains, np.percentile(amounts, 99, axis=1))).max() <= 1


def test_reinhard_is_the_papers(tmp_path: Path):
    reference, image = tile(0), tile(1, OTHER, strength=0.8)
    found = stain_normaliser(StainConfig(method="reinhard", reference=saved(tmp_path, reference)))(image)
    expected = reinhard_by_hand(image, reference)
    assert np.abs(found - expected).max() <= 2  # float32 and its own colour matrices, and decimals cut off


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_an_image_that_is_its_own_reference_stays(tmp_path: Path, method: str):
    image = tile(3)
    same = stain_normaliser(StainConfig(method=method, reference=saved(tmp_path, image)))(image)
    assert same.dtype == np.uint8
    # Macenko leaves out what lies off the plane of two stains, here the camera's noise.
    assert np.abs(same.astype(int) - image).mean() < 1
    assert np.abs(same.astype(int) - image).max() <= (8 if method == "macenko" else 1)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_another_laboratorys_stain_is_removed(tmp_path: Path, method: str):
    """The same tissue, stained otherwise and more weakly, becomes nearly what it is with the
    reference's stains.
    """
    normaliser = stain_normaliser(StainConfig(method=method, reference=saved(tmp_path, tile(0))))
    ours, theirs = tile(1), tile(1, OTHER, strength=0.7)
    assert distance(theirs, ours) > 20
    assert distance(normaliser(theirs), normaliser(ours)) < 4
    assert distance(normaliser(theirs), tile(0)) < distance(theirs, tile(0)) / 3


def test_white_stays_white_under_macenko():
    image = tile(2, OTHER, tissue=0.5)
    assert stain_normaliser(StainConfig(method="macenko"))(image)[70:].mean() > 235


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (tile(0, tissue=0.0), "too little tissue"),
        (np.full((64, 64, 3), 255, np.uint8), "too little tissue for stain normalisation: 0 pixels, 0.0% of the image"),
        (tile(0, tissue=0.05), "too little tissue"),
        (tile(0)[:9, :9], r"too little tissue .*\(at least 100 and 10%\)"),
        (np.repeat(tile(0)[..., :1], 3, axis=2), "no colour to normalise: the channels differ by 0.0 of 255"),
        (tile(0)[..., 0], r"no RGB image but \(128, 128\) uint8"),
        (np.concatenate([tile(0), tile(0)], axis=2), r"no RGB image but \(128, 128, 6\)"),
        (tile(0) / 255, r"no RGB image but \(128, 128, 3\) float64"),
        (np.zeros((64, 64, 3), np.uint8) + np.uint8([180, 90, 160]), "told apart|nearly the same colour"),
    ],
    ids=["empty", "white", "a strip of tissue", "tiny", "grey as RGB", "grey", "six channels", "float", "one colour"],
)
def test_tiles_without_stains_are_rejected(tmp_path: Path, method: str, image: Tile, reason: str):
    normaliser = stain_normaliser(StainConfig(method=method, reference=saved(tmp_path, tile(1))))
    with pytest.raises(RejectedSample, match=reason):
        normaliser(image)


def test_one_stain_alone_is_no_pair():
    amounts = np.random.default_rng(0).uniform(0.3, 2, (64, 64))
    image = (240 * np.exp(-amounts[..., None] * PUBLISHED[:, 0])).astype(np.uint8)
    with pytest.raises(RejectedSample, match=r"two stains cannot be told apart: \d\.\d degrees between them"):
        stain_normaliser(StainConfig(method="macenko"))(image)


def test_pale_pink_is_tissue_to_reinhard_and_too_pale_for_macenko(tmp_path: Path):
    random = np.random.default_rng(0)
    pale = np.clip(np.array([230, 190, 215]) + random.normal(0, 6, (64, 64, 3)), 0, 255).astype(np.uint8)
    reference = saved(tmp_path, tile(1))
    assert distance(stain_normaliser(StainConfig(method="reinhard", reference=reference))(pale), tile(1)) < 5
    with pytest.raises(RejectedSample, match="too little tissue"):
        stain_normaliser(StainConfig(method="macenko", reference=reference))(pale)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_reference_that_does_not_serve_is_named(tmp_path: Path, method: str):
    missing = tmp_path / "no such.png"
    with pytest.raises(
        MaskLoomError, match=r"data\.stain\.reference=.*no such\.png: no such\.png cannot be decoded \(no such"
    ):
        stain_normaliser(StainConfig(method=method, reference=missing))
    torn = tmp_path / "torn.png"
    torn.write_bytes(saved(tmp_path, tile(0)).read_bytes()[:500])
    with pytest.raises(MaskLoomError, match=r"torn\.png cannot be decoded"):
        stain_normaliser(StainConfig(method=method, reference=torn))
    for pixels, reason in ((tile(0, tissue=0.0), "too little tissue"), (tile(0)[..., 0], "no colour")):
        with pytest.raises(MaskLoomError, match=rf"data\.stain\.reference=.*{reason}.*; give a well stained tile"):
            stain_normaliser(StainConfig(method=method, reference=saved(tmp_path, pixels)))


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_the_same_values_in_another_process_and_on_any_number_of_threads(tmp_path: Path, method: str):
    normaliser = stain_normaliser(StainConfig(method=method, reference=saved(tmp_path, tile(0))))
    image = tile(1, OTHER)
    expected = normaliser(image)
    copy = pickle.loads(pickle.dumps(normaliser))
    for threads in (1, 2):
        with threadpool_limits(threads):
            np.testing.assert_array_equal(copy(image), expected)


def test_torch_is_not_imported():
    script = (
        "import sys, numpy as np; from maskloom.data_prep.processing.stains import stain_normaliser; from maskloom.pipeline.config.data import StainConfig;"
        "image = np.random.default_rng(0).integers(0, 200, (64, 64, 3), dtype=np.uint8);"
        "stain_normaliser(StainConfig(method='macenko'))(image);"
        "print(sorted({'torch', 'tensorflow'} & {name.split('.')[0] for name in sys.modules}), 'torchstain' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"
