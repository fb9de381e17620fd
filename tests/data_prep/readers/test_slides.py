import struct
from io import BytesIO

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskloom.data_prep.readers import slides
from maskloom.data_prep.readers.slides import downsample_of_level, downsample_of_mpp, opened_slide, overview, tile_image
from maskloom.pipeline.errors import RejectedSample
from tests.writers.camelyon import write_slide

WIDTH, HEIGHT = 640, 512


def ramp():
    """Red grows with x, green with y: a pixel's colour says where on level 0 it is."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    exact = np.stack([x / WIDTH * 255, y / HEIGHT * 255, np.full_like(x, 128)], axis=2)
    return (exact + np.random.default_rng(0).random(exact.shape)).clip(0, 255).astype(np.uint8)  # dithered


def noise():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def slide_of(tmp_path):
    def write(pixels, **options):
        path = tmp_path / f"slide_{len(list(tmp_path.iterdir()))}.tif"
        write_slide(path, pixels, **options)
        return opened_slide(path), path

    return write


def test_a_tile_of_level_0_is_its_pixels(slide_of):
    pixels = noise()
    tile = tile_image(*slide_of(pixels), (37, 101), 1.0, 200)
    np.testing.assert_array_equal(tile, pixels[101:301, 37:237])


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_tile_at_half_the_resolution_shows_the_same_place(slide_of, levels):
    pixels = noise() // 4 + np.kron(noise()[::32, ::32], np.ones((32, 32, 1), np.uint8)) // 2
    tile = tile_image(*slide_of(pixels, levels=levels), (64, 32), 2.0, 128)
    expected = pixels[32:288, 64:320].reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    if levels > 1:  # read from the level as it is
        np.testing.assert_allclose(tile, expected, atol=1)
    else:  # reduced here by another filter
        assert np.corrcoef(tile.ravel(), expected.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("downsample", [0.95, 1.0, 1.3, 2.0, 2.0576, 3.1, 4.0, 4.4])
@pytest.mark.parametrize("corner", [(0, 0), (64, 128), (200, 72)])
def test_every_pixel_shows_its_place_at_any_resolution(slide_of, downsample, corner):
    size = 80
    tile = tile_image(*slide_of(ramp()), corner, downsample, size).astype(float)
    assert tile.shape == (size, size, 3)
    places = (np.arange(size) + 0.5) * downsample
    inner = slice(3, -3)  # at the border the filter sees one side only
    for axis, (start, length) in enumerate(zip(corner, (WIDTH, HEIGHT), strict=True)):
        shown = tile[inner, inner, axis].mean(axis=axis) / 255 * length
        difference = shown - (start + places[inner])
        assert abs(difference.mean()) < 0.2  # of a pixel of level 0
        assert abs(difference).max() < 2.5  # half a step of 8 bits, twice rounded


def test_what_lies_beyond_the_slide_is_white(slide_of):
    tile = tile_image(*slide_of(np.zeros((HEIGHT, WIDTH, 3), np.uint8)), (WIDTH - 10, HEIGHT - 20), 1.0, 32)
    assert not tile[:20, :10].any() and (tile[20:] == 255).all() and (tile[:, 10:] == 255).all()


def test_the_overview_is_the_finest_level_within_bounds(slide_of, monkeypatch):
    pixels = ramp()
    slide = slide_of(pixels)
    np.testing.assert_array_equal(overview(*slide), pixels)
    monkeypatch.setattr(slides, "OVERVIEW_PIXELS", WIDTH * HEIGHT // 4)
    assert overview(*slide).shape == (HEIGHT // 2, WIDTH // 2, 3)
    monkeypatch.setattr(slides, "OVERVIEW_PIXELS", 1000)
    with pytest.raises(RejectedSample, match=r"no overview: its smallest level has 160x128 pixels, more than 1000"):
        overview(*slide)


def test_a_region_that_is_too_large_is_not_read(slide_of, monkeypatch):
    monkeypatch.setattr(slides, "REGION_PIXELS", 10_000)
    with pytest.raises(RejectedSample, match="no level near a downsampling of 2: 128x128 pixels of level 1"):
        tile_image(*slide_of(ramp()), (0, 0), 2.0, 128)


def test_a_damaged_part_does_not_spoil_the_others(tmp_path):
    pixels, path = noise(), tmp_path / "a.tif"
    write_slide(path, pixels)
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[0]  # the upper left 256 x 256 pixels
    data = bytearray(path.read_bytes())
    data[start : start + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    with pytest.raises(RejectedSample, match=r"a\.tif cannot be decoded"):
        tile_image(opened_slide(path), path, (0, 0), 1.0, 64)
    np.testing.assert_array_equal(tile_image(opened_slide(path), path, (300, 300), 1.0, 64), pixels[300:364, 300:364])


def test_a_changed_file_is_opened_anew(tmp_path):
    path = tmp_path / "a.tif"
    write_slide(path, ramp())
    before = tile_image(opened_slide(path), path, (0, 0), 1.0, 64)
    write_slide(path, noise())
    assert (tile_image(opened_slide(path), path, (0, 0), 1.0, 64) != before).any()


def test_pixel_sizes(slide_of):
    assert downsample_of_mpp(*slide_of(ramp(), mpp=0.25), 0.5) == pytest.approx(2)
    assert downsample_of_mpp(*slide_of(ramp(), mpp=0.243), 0.5) == pytest.approx(0.5 / 0.243, rel=1e-4)
    assert downsample_of_mpp(*slide_of(ramp(), mpp=0.25), 0.24) == pytest.approx(0.96)
    assert downsample_of_level(*slide_of(ramp()), 2) == 4


@pytest.mark.parametrize("mpp", [None, 0.001, 5000.0])
def test_a_slide_without_plausible_pixel_size_is_refused(slide_of, mpp):
    with pytest.raises(RejectedSample, match=r"no plausible pixel size.*give data.options.level instead"):
        downsample_of_mpp(*slide_of(ramp(), mpp=mpp), 0.5)


def test_a_pixel_size_that_is_no_number_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    write_slide(path, ramp())
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].tags["YResolution"].valueoffset
    data[place : place + 8] = struct.pack("<II", 0, 0)
    path.write_bytes(data)
    with pytest.raises(RejectedSample, match="no plausible pixel size"):
        downsample_of_mpp(opened_slide(path), path, 0.5)


def test_inches_are_understood_and_oblong_pixels_are_not(tmp_path):
    def write(x, y, unit):
        path = tmp_path / f"{x}_{unit}.tif"
        tifffile.imwrite(path, ramp(), tile=(256, 256), photometric="rgb", resolution=(x, y), resolutionunit=unit)
        return opened_slide(path), path

    assert downsample_of_mpp(*write(101_600, 101_600, 2), 0.5) == pytest.approx(2)
    with pytest.raises(RejectedSample, match=r"pixels that are not square: 0\.25 x 0\.5 microns"):
        downsample_of_mpp(*write(40_000, 20_000, 3), 0.5)
    with pytest.raises(RejectedSample, match=r"pixels that are not square: 0\.25 x 0\.5 microns"):
        downsample_of_level(*write(101_600, 50_800, 2), 0)


def test_more_detail_than_there_is_is_refused(slide_of):
    with pytest.raises(RejectedSample, match=r"has 0.25 microns per pixel, coarser than data.options.mpp=0.1"):
        downsample_of_mpp(*slide_of(ramp()), 0.1)
    with pytest.raises(RejectedSample, match=r"has levels 0 to 2, not data\.options\.level=3"):
        downsample_of_level(*slide_of(ramp()), 3)


def test_a_level_of_another_shape_is_refused(tmp_path):
    path, buffer = tmp_path / "a.tif", BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for level, pixels in enumerate((ramp(), np.asarray(Image.fromarray(ramp()).resize((320, 200))))):
            file.write(pixels, tile=(256, 256), photometric="rgb", subfiletype=min(level, 1), compression="zlib")
    path.write_bytes(buffer.getvalue())
    slide = opened_slide(path)
    with pytest.raises(RejectedSample, match="level 1 of 320x200 pixels is not a reduction of the slide of 640x512"):
        tile_image(slide, path, (0, 0), slide.level_downsamples[1], 32)


@pytest.mark.parametrize("content", [b"", b"not a slide", None])
def test_what_is_no_slide_is_refused(tmp_path, content):
    path = tmp_path / "a.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RejectedSample, match=r"a\.tif cannot be decoded"):
        opened_slide(path)


def test_a_slide_of_huge_stored_tiles_is_refused(slide_of, monkeypatch):
    monkeypatch.setattr(slides, "STORED_TILE_SIDE", 128)
    with pytest.raises(RejectedSample, match="stored in tiles of 256x256, larger than 128"):
        slide_of(ramp())
