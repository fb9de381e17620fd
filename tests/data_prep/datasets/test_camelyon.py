import math
import shutil
from collections import Counter

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from pydantic import ValidationError
from scipy import ndimage

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.camelyon import NOT_EXHAUSTIVE, Adapter, CamelyonOptions
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.writers import camelyon as writer
from tests.writers.camelyon import C16, C17, HEIGHT, OPTIONS, SLIDES, TESTING, TRAINING, WIDTH

USED = {"normal_001", "normal_002", "tumor_001", "tumor_002", "test_001", "test_002"} | {
    "patient_004_node_4",
    "patient_010_node_0",
}
MARKED = {"tumor_001", "tumor_002", "test_001", "patient_004_node_4"}


def adapter(folder, **options):
    return Adapter(folder, CamelyonOptions(**{**OPTIONS, **options}))


def scanned(folder, **options):
    """Items by slide and reasons by file name."""
    entries = list(adapter(folder, **options).scan())
    items = {e.sample_id: e for e in entries if isinstance(e, RawItem)}
    return items, {e.path.rsplit("/", 1)[1]: e.reason for e in entries if isinstance(e, Reject)}


def tiles_of(folder, name, **options):
    reader = adapter(folder, **options)
    items, rejects = scanned(folder, **options)
    assert name in items, rejects
    return reader, [tile for tile in reader.expand(items[name]) if isinstance(tile, RawItem)]


def place_of(tile):
    """x, y from the tile's path."""
    x, y = tile.path.rsplit("#", 1)[1].split(",")
    return int(x.removeprefix("x=")), int(y.removeprefix("y="))


def tumour_at(name, x, y, step, size):
    """Where the outlines that the writer drew say tumour, at the centres of a tile's pixels."""
    if name not in MARKED:
        return np.zeros((size, size), bool)
    rows, columns = (np.mgrid[:size, :size] + 0.5) * step
    places = np.stack([x + columns.ravel(), y + rows.ravel()], axis=1)
    area, hole = (Outline(points).contains_points(places) for points in writer.areas_of(name))
    return (area & ~hole).reshape(size, size)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("camelyon")
    writer.write_raw(folder)
    return folder


@pytest.fixture
def raw(intact, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(intact, tmp_path / "raw")


def add_slide(folder, name, drawn_as="normal_001"):
    folder.mkdir(parents=True, exist_ok=True)
    writer.write_slide(folder / f"{name}.tif", writer.level_0(drawn_as))


def test_slides_are_listed_with_group_and_split(intact):
    items, rejects = scanned(intact)
    assert items.keys() == USED
    assert {name: item.split for name, item in items.items()} == {name: SLIDES[name].split for name in USED}
    assert items["patient_004_node_4"].group == "patient_004" and items["patient_010_node_0"].group == "patient_010"
    assert all(items[name].group == name for name in USED if not name.startswith("patient"))
    assert items["tumor_001"].label == items["patient_004_node_4"].label == items["test_001"].label == "tumour"
    assert items["normal_001"].label == items["patient_010_node_0"].label == items["test_002"].label == "normal"
    assert all(item.key is None for item in items.values())
    assert rejects.keys() == {"patient_010_node_1.tif", "patient_020_node_2.tif"}
    assert "patient_010_node_1.xml is not there" in rejects["patient_010_node_1.tif"]
    assert "incomplete=leave_out" in rejects["patient_020_node_2.tif"]


@pytest.mark.parametrize("name", sorted(USED))
def test_every_tile_shows_its_place_and_its_mask_is_what_was_drawn(intact, name):
    reader, tiles = tiles_of(intact, name, min_tumour=0)
    pixels = writer.level_0(name).astype(float)
    assert len(tiles) >= 3
    for tile in tiles:
        x, y = place_of(tile)
        raw = reader.load(tile)
        expected = pixels[y : y + 192, x : x + 192].reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(raw.image, expected, atol=0.5)
        mask = tumour_at(name, x, y, 2, 96)
        np.testing.assert_array_equal(raw.mask, mask)
        assert tile.label == ("tumour" if mask.any() else "normal")
        assert tile.sample_id == f"{name}_x{x}_y{y}" and tile.path.endswith(f"/{name}.tif#x={x},y={y}")
        assert (tile.group, tile.split) == (scanned(intact)[0][name].group, SLIDES[name].split)
    labels = Counter(tile.label for tile in tiles)
    assert labels["tumour"] if name in MARKED else set(labels) == {"normal"}


@pytest.mark.parametrize(
    ("options", "step"), [({"mpp": 0.25}, 1), ({"mpp": 0.6}, 2.4), ({"mpp": None, "level": 1}, 2), ({"mpp": 1.1}, 4.4)]
)
def test_masks_are_drawn_at_any_resolution(intact, options, step):
    reader, tiles = tiles_of(intact, "tumor_001", tile_size=40, max_tiles_per_slide=30, **options)
    assert len(tiles) >= 5
    seen = 0
    for tile in tiles:
        x, y = place_of(tile)
        raw = reader.load(tile)
        assert raw.image.shape == (40, 40, 3) and raw.image.dtype == np.uint8
        np.testing.assert_array_equal(raw.mask, tumour_at("tumor_001", x, y, step, 40))
        assert x + 40 * step <= WIDTH + 1e-6 and y + 40 * step <= HEIGHT + 1e-6
        # The writer drew nuclei of a darker colour around places in the tumour, up to 6 pixels of
        # level 0 away from them.
        dark = raw.image[..., 1] < 50
        reach = math.ceil(7 / step)
        around = tumour_at("tumor_001", x - reach * step, y - reach * step, step, 40 + 2 * reach)
        near = ndimage.binary_dilation(around, iterations=reach, structure=np.ones((3, 3)))[reach:-reach, reach:-reach]
        assert not (dark & ~near).any()
        seen += dark.sum()
    assert seen > 20


def test_a_tile_is_tumour_from_a_share_on_and_between_the_two_not_used(intact):
    def shares(**options):
        reader, tiles = tiles_of(intact, "tumor_001", min_tissue=0, **options)
        return {tile.sample_id: (tile.label, reader.load(tile).mask.mean()) for tile in tiles}

    every = shares(min_tumour=0)
    assert all((label == "tumour") == (share > 0) for label, share in every.values())
    some = shares(min_tumour=0.3)
    between = {name for name, (_, share) in every.items() if 0 < share < 0.3}
    assert between and some.keys() == every.keys() - between
    assert all((label == "tumour") == (share >= 0.3) for label, share in some.values())


def test_caps_are_exact_and_samples_repeat(intact):
    every = tiles_of(intact, "tumor_001", tile_size=32, max_tiles_per_slide=None)[1]
    counts = Counter(tile.label for tile in every)
    assert counts["tumour"] > 15 and counts["normal"] > 15
    for cap, share, tumour in ((20, 0.5, 10), (20, 0.25, 5), (len(every) + 9, 0.5, counts["tumour"])):
        options = {"tile_size": 32, "max_tiles_per_slide": cap, "tumour_tiles": share}
        tiles = tiles_of(intact, "tumor_001", **options)[1]
        assert len(tiles) == min(cap, len(every))
        assert Counter(tile.label for tile in tiles)["tumour"] == tumour
        assert tiles == tiles_of(intact, "tumor_001", **options)[1]
        assert [place_of(t)[::-1] for t in tiles] == sorted(place_of(t)[::-1] for t in tiles)
    assert len(tiles_of(intact, "normal_001", max_tiles_per_slide=3)[1]) == 3


def test_the_seed_chooses_other_tiles_and_slides_do_not_share_a_choice(intact):
    def places(name, seed):
        tiles = tiles_of(intact, name, tile_size=32, max_tiles_per_slide=8, min_tissue=0, tissue="all", seed=seed)[1]
        return [place_of(tile) for tile in tiles]

    assert places("normal_001", 0) != places("normal_001", 1)
    assert places("normal_001", 0) != places("normal_002", 0)


def test_stride_and_tissue_choose_tiles(intact):
    wide = tiles_of(intact, "normal_001", tissue="all")[1]
    assert [place_of(t) for t in wide] == [(x, y) for y in (0, 192, 384) for x in (0, 192, 384, 576)]
    overlapping = tiles_of(intact, "normal_001", tissue="all", stride=48, max_tiles_per_slide=None)[1]
    assert len(overlapping) == 5 * 7
    tissue = writer.level_0("normal_001")[..., 1] < 200
    for min_tissue in (0.3, 0.9):
        chosen = {place_of(t) for t in tiles_of(intact, "normal_001", min_tissue=min_tissue)[1]}
        shares = {(x, y): tissue[y : y + 192, x : x + 192].mean() for x, y in map(place_of, wide)}
        assert chosen == {place for place, share in shares.items() if share >= min_tissue}


def test_a_mask_with_tissue(intact):
    reader, tiles = tiles_of(intact, "tumor_001", mask="tissue_tumour", min_tissue=0.1)
    info = reader.info()
    assert info.mask_classes == ("background", "tissue", "tumour") and len(info.palette) == 3
    tissue = writer.level_0("tumor_001")[..., 1] < 200
    seen = set()
    for tile in tiles:
        x, y = place_of(tile)
        mask = reader.load(tile).mask
        np.testing.assert_array_equal(mask == 2, tumour_at("tumor_001", x, y, 2, 96))
        assert ((mask > 0) == tissue[y : y + 192 : 2, x : x + 192 : 2]).mean() > 0.95
        seen |= set(np.unique(mask))
    assert seen == {0, 1, 2}


def test_incomplete_slides_give_their_tumour_only(intact, raw):
    tiles = tiles_of(intact, "patient_020_node_2", incomplete="tumour_tiles")[1]
    assert tiles and {tile.label for tile in tiles} == {"tumour"}
    (raw / TRAINING / "tumor" / "tumor_001.tif").rename(raw / TRAINING / "tumor" / "tumor_010.tif")
    (raw / TRAINING / "lesion_annotations" / "tumor_001.xml").rename(raw / "tumor_010.xml")
    assert "incomplete=leave_out" in scanned(raw)[1]["tumor_010.tif"]
    with_normal = tiles_of(intact, "tumor_001", tissue="all")[1]
    tumour_only = tiles_of(raw, "tumor_010", tissue="all", incomplete="tumour_tiles")[1]
    assert [place_of(t) for t in tumour_only] == [place_of(t) for t in with_normal if t.label == "tumour"]
    assert len(tumour_only) < len(with_normal)
    assert len(NOT_EXHAUSTIVE) == 21 and {"tumor_010", "tumor_110", "test_114"} < NOT_EXHAUSTIVE


def test_questioned_slides_are_left_out(raw):
    for name in ("normal_086", "normal_144", "test_049"):
        add_slide(raw / "more", name)
    (raw / TESTING / "reference.csv").write_text(f"{writer.REFERENCE}test_049,Normal\n")
    items, rejects = scanned(raw)
    assert items.keys() == USED
    assert "renamed to tumor_111" in rejects["normal_086.tif"] and "not marked" in rejects["normal_144.tif"]
    assert "duplicate of another slide" in rejects["test_049.tif"]
    assert scanned(raw, keep_duplicate=True)[0].keys() == USED | {"test_049"}


def test_a_slide_without_label_needs_annotations(raw):
    (raw / TESTING / "reference.csv").unlink()
    (raw / C17 / "stage_labels.csv").unlink()
    items, rejects = scanned(raw)
    assert items.keys() == USED - {"test_002", "patient_010_node_0"} | {"patient_020_node_2"}
    assert (
        items["test_001"].label is None
        and "neither test_002.xml nor a label in reference.csv" in rejects["test_002.tif"]
    )
    assert "stage_labels.csv or stages.csv" in rejects["patient_010_node_0.tif"]
    assert "tumour" in {tile.label for tile in tiles_of(raw, "test_001")[1]}


@pytest.mark.parametrize(
    "text",
    [
        "image,type,subtype\ntest_001,Tumor,IDC\ntest_002,Normal,\n",
        "test_001.tif,TUMOR\ntest_002.tif,normal\n",
        "\ufeffTest_001,Tumour,IDC,Macro\n\nTest_002,Normal,None,None\n",
    ],
)
def test_forms_of_the_table_of_the_test_set(raw, text):
    (raw / TESTING / "reference.csv").write_text(text, encoding="utf-8")
    items = scanned(raw)[0]
    assert (items["test_001"].label, items["test_002"].label) == ("tumour", "normal")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("test_001,Benign\n", r"reference\.csv: row 1: label of test_001 is 'Benign', expected one of normal, tumor"),
        ("test_001\n", r"row 1: label of test_001 is empty, expected one of normal, tumor"),
        ("test_001,Tumor\n,Normal\n", r"row 2: slide is empty, expected the name of a slide"),
        ("", r"nor rows of the form test_001,Tumor of CAMELYON16; restore the table"),
        ("image,kind\na,b\n", r"neither the columns patient,stage .* it begins with 'image,kind'"),
        (
            "test_001,Tumor\n\ntest_001,Normal\n",
            r"row 3: label 'Normal' of test_001 contradicts row 1 of .*reference\.csv",
        ),
        ("test_001,Tumor\n" + " " * 2**24, r"has 16777231 bytes, more than 16777216; restore the table"),
    ],
)
def test_a_damaged_table_of_the_test_set_stops_the_work(raw, text, reason):
    (raw / TESTING / "reference.csv").write_text(text)
    with pytest.raises(MaskLoomError, match=reason):
        scanned(raw)


def test_the_table_of_nodes_has_two_names_and_must_agree_with_itself(raw):
    (raw / C17 / "stage_labels.csv").rename(raw / C17 / "stages.csv")
    assert scanned(raw)[0].keys() == USED
    (raw / C17 / "stage_labels.csv").write_text("patient,stage\npatient_004_node_4,itc\n")
    with pytest.raises(MaskLoomError, match=r"stages\.csv: row \d+: .* contradicts row 2 of .*stage_labels\.csv"):
        scanned(raw)
    (raw / C17 / "stage_labels.csv").write_text("patient,stage\npatient_004_node_4,huge\n")
    with pytest.raises(
        MaskLoomError, match="row 2: stage of patient_004_node_4 is 'huge', expected one of negative, itc, mic"
    ):
        scanned(raw)


@pytest.mark.parametrize("name", ["reference.csv", "Reference.CSV", "labels of the nodes.csv"])
def test_the_table_of_nodes_is_told_by_its_header(raw, name):
    (raw / C17 / "stage_labels.csv").rename(raw / C17 / name)
    assert scanned(raw)[0].keys() == USED


@pytest.mark.parametrize("name", ["stages.csv", "test labels.csv"])
def test_the_table_of_the_test_set_is_told_by_its_rows(raw, name):
    (raw / TESTING / "reference.csv").rename(raw / TESTING / name)
    items = scanned(raw)[0]
    assert items.keys() == USED and items["test_001"].label == "tumour"


def test_a_damaged_table_under_another_name_stops_the_work_too(raw):
    (raw / "labels.csv").write_text("patient,stage\npatient_004_node_4,macro,itc\n")
    with pytest.raises(MaskLoomError, match=r"labels\.csv has 3 values in row 2, but 2 columns; restore the table"):
        scanned(raw)


def test_other_files_of_values_are_nobodys_concern(raw):
    (raw / "scores.csv").write_text("test_001,0.93\ntest_002,0.1\n")
    (raw / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (raw / "large.csv").write_text("patient,stage\npatient_004_node_4,huge\n" + " " * 2**24)
    assert scanned(raw)[0].keys() == USED


@pytest.mark.parametrize("inside", ["", C16, C16 / "training", C17])
def test_the_root_may_be_any_folder_above_the_slides(intact, inside):
    items = scanned(intact / inside)[0]
    expected = {name for name in USED if (intact / inside) in (intact / SLIDES[name].folder / "x").parents}
    assert items.keys() == expected and expected


def test_flat_copies_with_capitals_and_rendered_masks_are_read(intact, tmp_path):
    for folder in ("images", "annotations", "masks"):
        (tmp_path / folder).mkdir()
    shutil.copy(intact / TRAINING / "tumor" / "tumor_001.tif", tmp_path / "images" / "Tumor_001.tif")
    shutil.copy(intact / TRAINING / "lesion_annotations" / "tumor_001.xml", tmp_path / "annotations" / "Tumor_001.xml")
    (tmp_path / "masks" / "tumor_001_mask.tif").write_bytes(b"not read")
    (tmp_path / "images" / "._Tumor_001.tif").write_bytes(b"of another system")
    items, rejects = scanned(tmp_path)
    assert items.keys() == {"tumor_001"} and not rejects
    assert {tile.label for tile in tiles_of(tmp_path, "tumor_001")[1]} == {"normal", "tumour"}


def test_files_that_belong_to_nothing_are_listed(raw):
    (raw / "overview.tif").write_bytes(b"x")
    (raw / "tumor_099.xml").write_text(writer.asap_xml([]))
    (raw / TRAINING / "tumor_001.xml").write_text(writer.asap_xml([]))
    items, rejects = scanned(raw)
    assert items.keys() == USED - {"tumor_001"}
    assert "not named like a slide" in rejects["overview.tif"]
    assert rejects["tumor_099.xml"] == "an annotation without a slide tumor_099.tif"
    assert "the annotation tumor_001 is there 2 times (lesion_annotations, training)" in rejects["tumor_001.tif"]


def test_a_slide_that_is_there_twice_is_not_chosen_from(raw):
    shutil.copy(raw / TRAINING / "normal" / "normal_001.tif", raw / C17 / "normal_001.tif")
    entries = [e for e in adapter(raw).scan() if e.path.endswith("normal_001.tif")]
    assert len(entries) == 2 and all("is there 2 times (CAMELYON17, normal)" in entry.reason for entry in entries)


@pytest.mark.parametrize(
    ("name", "annotations", "reason"),
    [
        (
            "normal_001",
            [("a", "Tumor", writer.areas_of("normal_001")[0])],
            "said to be normal, but its annotations mark",
        ),
        ("tumor_001", [], "not known to be normal, but its annotations mark no tumour"),
        ("tumor_001", [("a", "_2", writer.areas_of("tumor_001")[1])], "mark no tumour"),
        ("tumor_001", [("a", "_0", writer.areas_of("tumor_001")[0] + (5000, 0))], "lies outside the slide of 768x576"),
        ("tumor_001", [("a", "Lymphocytes", writer.areas_of("tumor_001")[0])], "PartOfGroup 'Lymphocytes', expected"),
    ],
)
def test_annotations_that_do_not_fit_reject_the_slide(raw, name, annotations, reason):
    (raw / TRAINING / "lesion_annotations" / f"{name}.xml").write_text(writer.asap_xml(annotations))
    with pytest.raises(RejectedSample, match=reason):
        tiles_of(raw, name)


def test_a_normal_slide_may_have_a_file_that_marks_nothing(raw):
    before = tiles_of(raw, "normal_001")[1]
    (raw / "normal_001.xml").write_text(writer.asap_xml([]))
    after = tiles_of(raw, "normal_001")[1]
    assert [tile.sample_id for tile in after] == [tile.sample_id for tile in before]


def test_a_slip_of_the_mouse_is_listed_and_changes_no_mask(intact, raw):
    slips = [("slip", "_0", np.array([[300.0, 300.0], [310.0, 300.0]]))] * 2
    path = raw / TRAINING / "lesion_annotations" / "tumor_001.xml"
    path.write_text(writer.asap_xml([*slips, *writer.annotations_of("tumor_001")]))
    reader = adapter(raw)
    entries = list(reader.expand(scanned(raw)[0]["tumor_001"]))
    listed = [entry for entry in entries if isinstance(entry, Reject)]
    assert [entry.path.rsplit("#", 1)[1] for entry in listed] == ["annotation=0", "annotation=1"]
    before, tiles = tiles_of(intact, "tumor_001")
    for ours, theirs in zip(entries[2:], tiles, strict=True):
        np.testing.assert_array_equal(reader.load(ours).mask, before.load(theirs).mask)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tile_size": 1024}, "none of 0x0 tiles of 2048 pixels"),
        ({"min_tissue": 1.0, "tile_size": 256}, r"none of 1x1 tiles .*min_tissue=1"),
        ({"mpp": 0.1}, "coarser than data.options.mpp=0.1"),
        ({"mpp": None, "level": 5}, "has levels 0 to 2, not data.options.level=5"),
    ],
)
def test_a_slide_without_a_tile_is_told(intact, options, reason):
    with pytest.raises(RejectedSample, match=reason):
        tiles_of(intact, "normal_001", **options)


def test_a_slide_without_pixel_size_is_read_by_level(raw):
    writer.write_slide(raw / TRAINING / "normal" / "normal_001.tif", writer.level_0("normal_001"), mpp=None)
    with pytest.raises(RejectedSample, match=r"give data\.options\.level instead"):
        tiles_of(raw, "normal_001")
    by_level = tiles_of(raw, "normal_001", mpp=None, level=1)[1]
    assert len(by_level) > 3 and all(tile.key.downsample == 2 for tile in by_level)


def test_resolutions_exclude_each_other_and_default_to_half_a_micron(intact):
    with pytest.raises(ValidationError, match="give mpp or level, not both"):
        CamelyonOptions(mpp=0.5, level=1)
    tiles = tiles_of(intact, "normal_001", mpp=None)[1]
    assert {tile.key.downsample for tile in tiles} == {2.0}


def test_it_recognises_its_slides_by_name(intact, tmp_path):
    assert Adapter.recognises(intact) and Adapter.recognises(intact / C17)
    (tmp_path / "other.tif").write_bytes(b"")
    (tmp_path / "tumor_1.tif").write_bytes(b"")
    assert not Adapter.recognises(tmp_path)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(MaskLoomError, match=r"not CAMELYON: no slide named like normal_001\.tif, tumor_001\.tif"):
        scanned(tmp_path)


def test_the_same_bytes_are_written_each_time(tmp_path):
    contents = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        writer._slide_bytes.cache_clear()
        writer.write_raw(folder)
        contents.append({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert contents[0] == contents[1] and sum(map(len, contents[0].values())) < 1_000_000
