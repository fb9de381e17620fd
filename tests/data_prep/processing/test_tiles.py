import numpy as np
import pytest
from matplotlib.path import Path as Outline
from skimage.color import rgb2hsv

from maskloom.data_prep.processing.tiles import (
    mask_shares,
    polygon_shares,
    sampled,
    saturation,
    tile_grid,
    tissue_threshold,
)
from maskloom.data_prep.readers.asap import Polygon
from maskloom.pipeline.errors import RejectedSample


def polygon(points, hole=False):
    points = np.asarray(points, float)
    return Polygon("p", hole, points, (*points.min(axis=0), *points.max(axis=0)))


def test_a_grid_holds_every_whole_tile_and_no_other():
    grid = tile_grid((1000, 700), 2.0, 2, size=50, stride=40)
    assert (grid.span, grid.step, grid.shape) == (100, 80, (8, 12))  # (700-100)//80+1, (1000-100)//80+1
    assert grid.corner(7, 11) == (880, 560)
    assert tile_grid((200, 100), 2.0, 1, 50, 50).shape == (1, 2)
    assert tile_grid((199, 99), 2.0, 1, 50, 50).shape == (0, 1)


def test_corners_are_whole_pixels_of_the_level_that_is_read():
    grid = tile_grid((10_000, 10_000), 4.3, unit=4, size=100, stride=77)
    assert grid.step % 4 == 0 and abs(grid.step - 77 * 4.3) <= 2
    assert tile_grid((1000, 1000), 4.3, unit=4, size=100, stride=1).step == 4


def test_too_many_tiles_are_refused():
    with pytest.raises(RejectedSample, match=r"take a larger data\.options\.stride"):
        tile_grid((10**6, 10**6), 1.0, 1, 512, 1)


def test_saturation_is_that_of_hsv_and_none_where_it_is_dark():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    bright = image.max(axis=2) >= 25
    np.testing.assert_allclose(saturation(image)[bright], rgb2hsv(image)[..., 1][bright] * 255, atol=0.51)
    assert not saturation(np.array([[[0, 0, 0], [24, 3, 0]]], np.uint8)).any()


def test_the_threshold_lies_between_glass_and_tissue():
    rng = np.random.default_rng(0)
    glass, tissue = rng.normal(5, 2, 5000), rng.normal(80, 15, 3000)
    assert 20 < tissue_threshold(np.concatenate([glass, tissue]).clip(0, 255).astype(np.uint8)) < 60


def test_a_blank_slide_is_not_split_in_two():
    noise = np.random.default_rng(0).integers(0, 8, (100, 100), dtype=np.uint8)
    assert tissue_threshold(noise) >= noise.max()
    assert tissue_threshold(np.zeros((5, 5), np.uint8)) > 0


def test_shares_of_a_mask_are_its_means():
    mask = np.random.default_rng(0).random((70, 100)) < 0.3
    grid = tile_grid((1000, 700), 2.0, 1, size=100, stride=50)  # tiles of 20, steps of 10 mask pixels
    expected = [[mask[r : r + 20, c : c + 20].mean() for c in range(0, 81, 10)] for r in range(0, 51, 10)]
    np.testing.assert_allclose(mask_shares(grid, mask, (10, 10)), expected)


def test_shares_of_a_mask_that_is_coarser_than_tiles():
    mask = np.array([[True, False]])
    grid = tile_grid((100, 50), 1.0, 1, size=10, stride=10)
    np.testing.assert_array_equal(mask_shares(grid, mask, (50, 50)), np.repeat([[1.0] * 5 + [0.0] * 5], 5, axis=0))


@pytest.mark.parametrize(("downsample", "size", "stride"), [(1.0, 32, 32), (2.3, 20, 12), (2.0, 16, 40), (5.0, 60, 30)])
def test_shares_of_polygons_are_exact(downsample, size, stride):
    rng = np.random.default_rng(5)
    angle = np.linspace(0, 2 * np.pi, 70, endpoint=False)
    wavy = (1 + 0.2 * np.sin(7 * angle))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outer, inner, small = 220 * wavy + 260, 70 * wavy + 260, rng.uniform(5, 30, (3, 2)) + 500
    grid = tile_grid((600, 560), downsample, 1, size, stride)
    polygons = [polygon(outer), polygon(inner, hole=True), polygon(small)]
    shares = polygon_shares(grid, polygons, np.ones(grid.shape, bool))
    for row, column in np.ndindex(grid.shape):
        x, y = grid.corner(row, column)
        ys, xs = (np.mgrid[:size, :size] + 0.5) * downsample
        places = np.stack([x + xs.ravel(), y + ys.ravel()], axis=1)
        is_in, is_cut, is_small = (Outline(points).contains_points(places) for points in (outer, inner, small))
        assert shares[row, column] == pytest.approx(((is_in & ~is_cut) | is_small).mean(), abs=1e-12)
    assert 0 < shares.mean() < 1


def test_no_polygons_cover_nothing():
    grid = tile_grid((100, 100), 1.0, 1, 10, 10)
    assert not polygon_shares(grid, [], np.ones(grid.shape, bool)).any()


TUMOUR = [(x, 0) for x in range(30)]
NORMAL = [(x, 7) for x in range(50)]


@pytest.mark.parametrize(
    ("limit", "share", "tumour", "normal"),
    [
        (20, 0.5, 10, 10),
        (20, 0.25, 5, 15),
        (20, 1.0, 20, 0),
        (20, 0.0, 0, 20),
        (70, 0.5, 30, 40),  # all of the fewer, the rest from the others
        (70, 0.1, 20, 50),
        (200, 0.5, 30, 50),
        (None, 0.5, 30, 50),
        (1, 0.5, 0, 1),
    ],
)
def test_caps_are_exact(limit, share, tumour, normal):
    taken = sampled(TUMOUR, NORMAL, limit, share, "s")
    assert len(set(taken)) == len(taken)
    assert (len(set(taken) & set(TUMOUR)), len(set(taken) & set(NORMAL))) == (tumour, normal)


def test_a_sample_follows_from_its_seed_and_grows():
    assert sampled(TUMOUR, NORMAL, 20, 0.5, "s") == sampled(TUMOUR[::-1], NORMAL[::-1], 20, 0.5, "s")
    assert sampled(TUMOUR, NORMAL, 20, 0.5, "s") != sampled(TUMOUR, NORMAL, 20, 0.5, "t")
    assert set(sampled(TUMOUR, NORMAL, 20, 0.5, "s")) < set(sampled(TUMOUR, NORMAL, 30, 0.5, "s"))


def test_a_sample_comes_row_by_row():
    taken = sampled([(5, 1), (0, 2)], [(9, 0), (1, 1)], None, 0.5, "s")
    assert taken == [(9, 0), (1, 1), (5, 1), (0, 2)]
    taken = sampled(TUMOUR, NORMAL, 40, 0.5, "s")
    assert taken == sorted(taken, key=lambda corner: (corner[1], corner[0]))
