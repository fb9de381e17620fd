"""Uniform borders are cut off before images are compared; black ones, and what belongs to an image, stay."""

from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from maskloom.evaluate.scores.borders import without_border
from tests.data_prep.audit.test_audit import picture


def test_only_uniform_borders_are_cut() -> None:
    image = picture([1], 128, 128)
    assert without_border(image) is image
    black = np.pad(image[:100, :100], 14)
    assert without_border(black) is black
    left = np.pad(image[:, :100], ((0, 0), (28, 0)), constant_values=128)
    assert without_border(left) is left
    assert (without_border(np.full((128, 128), 90, np.uint8)) == 90).all()
    spot = np.full((128, 128), 90, np.uint8)
    spot[60:64, 60:64] = 255
    assert without_border(spot) is spot
    wide = np.pad(image[20:80, 14:114], ((34, 34), (14, 14)), constant_values=128)
    assert without_border(wide).shape == (128, 128)
    assert (without_border(wide)[:20] == 128).all()  # proportions stay


@pytest.mark.parametrize("grey", [30, 128, 255])
@pytest.mark.parametrize("place", [((14, 14), (14, 14)), ((28, 0), (0, 28)), ((0, 28), (3, 25))])
def test_a_border_of_any_grey_and_place_is_cut(grey: int, place: tuple[tuple[int, int], tuple[int, int]]) -> None:
    image = picture([1], 128, 128)
    padded = np.pad(image[14:114, 14:114], place, constant_values=grey)
    whole = np.asarray(Image.fromarray(image[14:114, 14:114]).resize((128, 128), Image.Resampling.BICUBIC))
    assert np.abs(without_border(padded).astype(int) - whole).mean() < 1


def as_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def noisy(image: NDArray[np.uint8], deviation: float) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).normal(0, deviation, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("place", [((14, 14), (14, 14)), ((28, 0), (0, 28)), ((2, 26), (26, 2))])
@pytest.mark.parametrize("grey", [60, 150, 255])
@pytest.mark.parametrize("rough", ["JPEG 75", "JPEG 40", "noise 3", "noise 8"])
def test_a_border_that_jpeg_or_noise_roughens_is_cut(
    rough: str, grey: int, place: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """Where it was sharp in a file of the size that is compared, the hardest case for JPEG."""
    image = picture([1], 128, 128)[14:114, 14:114]
    kind, number = rough.split()
    roughen = as_jpeg if kind == "JPEG" else noisy
    whole = Image.fromarray(roughen(image, int(number))).resize((128, 128), Image.Resampling.BICUBIC)
    found = without_border(roughen(np.pad(image, place, constant_values=grey), int(number)))
    assert np.corrcoef(found.ravel(), np.asarray(whole).ravel())[0, 1] > 0.9


@pytest.mark.parametrize("grey", [128, 255])
def test_a_border_within_the_bars_that_made_an_image_square_is_cut_off(grey: int) -> None:
    wide = np.clip(picture([1], 128, 128)[24:104], 20, 230)  # (80, 128)
    original = np.pad(wide, ((24, 24), (0, 0)))
    assert without_border(original) is original
    small = np.asarray(Image.fromarray(wide).resize((108, 68), Image.Resampling.BICUBIC))
    framed = np.pad(np.pad(small, ((6, 6), (10, 10)), constant_values=grey), ((24, 24), (0, 0)))
    found = without_border(framed)
    assert found is not framed
    assert np.corrcoef(found.ravel(), original.ravel())[0, 1] > 0.95
    assert not found[:16].any()


@pytest.mark.parametrize("grey", [60, 128, 255])
@pytest.mark.parametrize("side", [255, 301])
def test_a_border_within_bars_whose_seams_a_resize_blurred_is_cut_off(grey: int, side: int) -> None:
    """Made at another size, as files are: the rows between bar and border have levels of their own."""

    def made_square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        above = (image.shape[1] - image.shape[0]) // 2
        square = np.pad(image, ((above, image.shape[1] - image.shape[0] - above), (0, 0)))
        return np.asarray(Image.fromarray(square).resize((128, 128), Image.Resampling.BICUBIC))

    wide = np.clip(np.asarray(Image.fromarray(picture([1], 128, 128)).resize((side, 151))), 20, 230)
    found = without_border(made_square(np.pad(wide, side // 12, constant_values=grey)))
    assert np.corrcoef(found.ravel(), made_square(wide).ravel())[0, 1] > 0.9
    assert not found[:16].any()


@pytest.mark.parametrize("grey", [128, 255])
def test_bars_of_one_axis_become_black(grey: int) -> None:
    """As those that make an image square; a bar on one side alone may belong to the image."""
    wide = np.clip(picture([1], 128, 128)[24:104], 20, 230)
    found = without_border(np.pad(wide, ((24, 24), (0, 0)), constant_values=grey))
    np.testing.assert_array_equal(found, np.pad(wide, ((24, 24), (0, 0))))
    one_side = np.pad(wide, ((48, 0), (0, 0)), constant_values=grey)
    assert without_border(one_side) is one_side


@pytest.mark.parametrize("light", [128, 255])
def test_the_light_around_something_round_is_no_border(light: int) -> None:
    """As around an inverted brain: other images of brains keep the black around them."""
    rows, columns = np.mgrid[:128, :128] - 63.5
    image = np.where(rows**2 + columns**2 < 45**2, picture([1], 128, 128) // 2, light).astype(np.uint8)
    assert without_border(image) is image
    on_black = np.where(image == light, 0, image)[14:114, 14:114]
    canvas = np.pad(on_black, 14, constant_values=light)
    assert without_border(canvas) is not canvas
