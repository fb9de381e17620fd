import numpy as np
import pytest
from matplotlib.path import Path as Outline

from maskloom.data_prep.readers import asap
from maskloom.data_prep.readers.asap import Polygon, drawn, read_annotations
from maskloom.pipeline.errors import RejectedSample
from tests.writers.camelyon import asap_xml

AREAS, HOLES = ("tumor", "_0"), ("_2",)
SQUARE = np.array([[2.0, 3.0], [6.0, 3.0], [6.0, 8.0], [2.0, 8.0]])


def polygon(points, hole=False):
    points = np.asarray(points, float)
    return Polygon("p", hole, points, (*points.min(axis=0), *points.max(axis=0)))


def star(rng, corners, reach, centre):
    """A simple outline of random spikes."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = rng.uniform(0.3, 1, corners) * reach
    return centre + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def centres_inside(points, left, top, step, shape):
    """What matplotlib says of each pixel's centre."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    places = np.stack([left + x.ravel() * step, top + y.ravel() * step], axis=1)
    return Outline(points).contains_points(places).reshape(shape)


def read(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text)
    return read_annotations(path, AREAS, HOLES)


@pytest.mark.parametrize(
    ("left", "top", "step"), [(0, 0, 1), (137, 59, 2.0576), (120.5, 130.25, 0.7), (-90, -20, 16.3)]
)
def test_pixels_are_inside_where_their_centres_are(left, top, step):
    rng = np.random.default_rng(3)
    seen = 0
    for corners in (3, 4, 7, 40, 400):
        points = star(rng, corners, 160, (180, 190))
        expected = centres_inside(points, left, top, step, (90, 120))
        np.testing.assert_array_equal(drawn([polygon(points)], left, top, step, (90, 120)), expected)
        seen += expected.any() and not expected.all()
    assert seen


def test_a_square_of_whole_pixels_is_exactly_these():
    expected = np.zeros((10, 9), bool)
    expected[3:8, 2:6] = True
    np.testing.assert_array_equal(drawn([polygon(SQUARE)], 0, 0, 1, (10, 9)), expected)


def test_neighbours_share_no_pixel_and_leave_none():
    corners = np.array([[0, 0], [20, 0], [20, 15], [0, 15]], float)
    middle = np.array([7.5, 6.5])  # the centre of a pixel
    counts = sum(
        drawn([polygon([corners[i - 1], corners[i], middle])], 0, 0, 1, (15, 20)).astype(int) for i in range(4)
    )
    assert (counts == 1).all()


def test_a_tile_shows_a_part_of_the_whole():
    points = star(np.random.default_rng(0), 50, 100, (100, 100))
    whole = drawn([polygon(points)], 0, 0, 1.5, (140, 140))
    tile = drawn([polygon(points)], 60 * 1.5, 30 * 1.5, 1.5, (40, 50))
    assert tile.any() and not tile.all()
    np.testing.assert_array_equal(tile, whole[30:70, 60:110])


def test_a_polygon_around_the_raster_fills_it_and_one_beside_it_does_not():
    around = polygon(np.array([[-1e5, -1e5], [1e5, -1e5], [1e5, 1e5], [-1e5, 1e5]]))
    assert drawn([around], 0, 0, 2, (4, 5)).all()
    beside = [polygon(SQUARE + offset) for offset in ((50, 0), (-50, 0), (0, 50), (0, -50))]
    assert not drawn(beside, 0, 0, 1, (10, 10)).any()


def test_holes_are_cut_after_all_areas_are_drawn():
    outer, inner, again = SQUARE * 4, SQUARE * 2 + 8, SQUARE * 2 + 20
    expected = (centres_inside(outer, 0, 0, 1, (40, 40)) | centres_inside(again, 0, 0, 1, (40, 40))) & ~centres_inside(
        inner, 0, 0, 1, (40, 40)
    )
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        parts = [polygon(outer), polygon(inner, hole=True), polygon(again)]
        np.testing.assert_array_equal(drawn([parts[i] for i in order], 0, 0, 1, (40, 40)), expected)
    assert not expected[20, 15] and expected[28, 10] and expected[34, 30]


def test_a_contour_that_crosses_itself_leaves_no_gap_whichever_way_it_is_drawn():
    angle = np.arange(5) * 4 * np.pi / 5  # a pentagram
    points = 50 + 40 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    inside = drawn([polygon(points)], 0, 0, 1, (100, 100))
    assert inside[50, 50]
    np.testing.assert_array_equal(inside, drawn([polygon(points[::-1])], 0, 0, 1, (100, 100)))


def test_many_crossings_are_counted_in_parts(monkeypatch):
    points = star(np.random.default_rng(1), 300, 60, (64, 64))
    whole = drawn([polygon(points)], 0, 0, 1, (128, 128))
    monkeypatch.setattr(asap, "CROSSINGS_AT_A_TIME", 37)
    np.testing.assert_array_equal(drawn([polygon(points)], 0, 0, 1, (128, 128)), whole)


def test_a_file_is_read_in_the_order_of_its_numbers(tmp_path):
    points = star(np.random.default_rng(2), 30, 900, (5000, 4000)).round(3)
    text = asap_xml([("one", "_0", points), ("cut", "_2", SQUARE), ("two", "Tumor", SQUARE + 10)])
    one, cut, two = read(tmp_path, text).polygons
    np.testing.assert_array_equal(one.points, points)
    np.testing.assert_allclose(one.box, (*points.min(axis=0), *points.max(axis=0)))
    assert (one.name, one.hole) == ("one", False) and (cut.hole, two.hole) == (True, False)


def test_numbers_may_start_at_one(tmp_path):
    text = asap_xml([("one", "_0", SQUARE)])
    for order in (3, 2, 1, 0):
        text = text.replace(f'Order="{order}"', f'Order="{order + 1}"')
    np.testing.assert_array_equal(read(tmp_path, text).polygons[0].points, SQUARE)


@pytest.mark.parametrize(
    "points", [SQUARE[:1], SQUARE[:2], np.repeat(SQUARE[:1], 5, axis=0), np.outer(range(6), (1, 2))]
)
def test_an_annotation_without_area_is_told_and_draws_nothing(tmp_path, points):
    annotations = read(tmp_path, asap_xml([("area", "_0", SQUARE), ("slip", "_0", points)]))
    assert [p.name for p in annotations.polygons] == ["area"]
    assert list(annotations.stray) == [1] and "a.xml: annotation 'slip' encloses no area" in annotations.stray[1]


def test_a_figure_of_eight_has_an_area(tmp_path):
    eight = np.array([[0, 0], [4, 4], [4, 0], [0, 4]], float)  # its signed area is zero
    assert len(read(tmp_path, asap_xml([("8", "_0", eight)])).polygons) == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('PartOfGroup="_0"', 'PartOfGroup="None"', "PartOfGroup 'None', expected one of tumor, _0, _2"),
        ('PartOfGroup="_0" ', "", "PartOfGroup '', expected"),
        ('Type="Polygon"', 'Type="Dot"', "Type 'Dot', expected one of polygon"),
        ('X="2.000"', 'X="nan"', "is not a place on a slide"),
        ('Y="3.000"', 'Y="-inf"', "is not a place on a slide"),
        ('X="2.000"', 'X="1e12"', "is not a place on a slide"),
        ('X="2.000"', 'X="2,5"', r"Order, X or Y is not a number .*'2,5'"),
        ('X="2.000"', "", "Order, X or Y is not a number"),
        ('Order="1"', 'Order="one"', "Order, X or Y is not a number"),
        ('Order="1"', 'Order="0"', "lacks a coordinate, or has one twice"),
        ('Order="3"', 'Order="5"', "lacks a coordinate, or has one twice"),
        ("ASAP_Annotations", "Annotations", "is not an ASAP annotation: its root element is 'Annotations'"),
        ("</ASAP_Annotations>", "", r"a\.xml cannot be decoded"),
        ("<ASAP_Annotations>", '<!DOCTYPE d [<!ENTITY a "b">]><ASAP_Annotations>', r"a\.xml cannot be decoded \(DTD"),
    ],
)
def test_what_would_change_the_mask_is_refused(tmp_path, old, new, reason):
    text = asap_xml([("Annotation 0", "_0", SQUARE)])
    assert old in text
    changed = text.replace(old, new) if old == "ASAP_Annotations" else text.replace(old, new, 1)
    with pytest.raises(RejectedSample, match=reason):
        read(tmp_path, changed)


def test_an_annotation_without_coordinates_is_refused(tmp_path):
    with pytest.raises(RejectedSample, match="annotation 'number 0' has no coordinates"):
        read(tmp_path, '<ASAP_Annotations><Annotations><Annotation PartOfGroup="_0"/></Annotations></ASAP_Annotations>')


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RejectedSample, match=r"b\.xml cannot be decoded \(no such file\)"):
        read_annotations(tmp_path / "b.xml", AREAS, HOLES)
    monkeypatch.setattr(asap, "MAX_XML_BYTES", 100)
    with pytest.raises(RejectedSample, match=r"a\.xml has \d+ bytes, more than 100"):
        read(tmp_path, asap_xml([("one", "_0", SQUARE)]))
