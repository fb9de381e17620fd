"""A tiny CAMELYON16 and CAMELYON17 side by side: tiled TIFFs with a pyramid, as OpenSlide opens
them, with ASAP annotations and tables.
"""

import shutil
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw

from tests.writers import Flaw

WIDTH, HEIGHT, MPP = 768, 576, 0.25
OPTIONS = {"tile_size": 96, "mpp": 0.5, "min_tissue": 0.3}  # 4 x 3 tiles of 192 pixels of level 0
C16, C17 = Path("CAMELYON16"), Path("CAMELYON17")
GLASS, STROMA = (244, 243, 246), (228, 168, 205)
NUCLEUS, TUMOUR_NUCLEUS = (112, 74, 150), (78, 38, 118)


@dataclass(frozen=True)
class Slide:
    """One slide of the tree.

    Attributes:
        folder: where it lies.
        annotations: where its XML file lies; None where it has none.
        groups: ASAP groups of the area and of the hole in it.
        split: as the adapter must give it.
    """

    folder: Path
    annotations: Path | None = None
    groups: tuple[str, str] = ("Tumor", "_2")
    split: str | None = None


TRAINING, TESTING = C16 / "training", C16 / "testing"
CENTRES = C17 / "training"
SLIDES = {
    "normal_001": Slide(TRAINING / "normal"),
    "normal_002": Slide(TRAINING / "normal"),
    "tumor_001": Slide(TRAINING / "tumor", TRAINING / "lesion_annotations", ("_0", "_2")),
    "tumor_002": Slide(TRAINING / "tumor", TRAINING / "tumor", ("_1", "_2")),
    "test_001": Slide(TESTING / "images", TESTING / "lesion_annotations", split="test"),
    "test_002": Slide(TESTING / "images", split="test"),
    "patient_004_node_4": Slide(CENTRES / "center_0", C17 / "lesion_annotations", ("metastases", "normal")),
    "patient_010_node_0": Slide(CENTRES / "center_0"),
    "patient_010_node_1": Slide(CENTRES / "center_0"),
    "patient_020_node_2": Slide(CENTRES / "center_1", C17 / "lesion_annotations", ("metastases", "normal")),
}
REFERENCE = "test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n"
STAGES = """patient,stage
patient_004.zip,pN1
patient_004_node_4.tif,macro
patient_010.zip,pN1mi
patient_010_node_0.tif,negative
patient_010_node_1.tif,micro
patient_020.zip,pN0(i+)
patient_020_node_2.tif,itc
"""


def write_raw(folder: Path) -> None:
    """Write ten slides, of which eight are used, five annotation files and two tables."""
    for name, slide in SLIDES.items():
        (folder / slide.folder).mkdir(parents=True, exist_ok=True)
        (folder / slide.folder / f"{name}.tif").write_bytes(_slide_bytes(name))
        if slide.annotations is not None:
            (folder / slide.annotations).mkdir(parents=True, exist_ok=True)
            (folder / slide.annotations / f"{name}.xml").write_text(asap_xml(annotations_of(name)))
    (folder / TESTING / "reference.csv").write_text(REFERENCE)
    (folder / C17 / "stage_labels.csv").write_text(STAGES)


def contour(name: str, radius: float, waviness: float, corners: int, seed: int) -> np.ndarray:
    """Return (corners, 2) x, y of a wavy outline around a place of the slide's own."""
    rng = _rng(name, seed)
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    phases = rng.uniform(0, 2 * np.pi, 3)
    wave = sum(np.sin((k + 2) * angle + phase) for k, phase in enumerate(phases)) / 3
    at = np.array([WIDTH * 0.5, HEIGHT * 0.5]) + _rng(name, 0).uniform(-45, 45, 2)
    reach = radius * (1 + waviness * wave)
    return (at + np.stack([1.25 * reach * np.cos(angle), reach * np.sin(angle)], axis=1)).round(3)


@cache
def areas_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the outlines of a slide's tumour and of the hole in it."""
    return contour(name, 150, 0.25, 60, 1), contour(name, 45, 0.3, 24, 2)


@cache
def level_0(name: str) -> np.ndarray:
    """Return the pixels of a slide, (HEIGHT, WIDTH, 3)."""
    image = Image.new("RGB", (WIDTH, HEIGHT), GLASS)
    draw = ImageDraw.Draw(image)
    rng = _rng(name, 3)
    draw.polygon([tuple(p) for p in contour(name, 250, 0.15, 80, 4)], fill=STROMA)
    tissue = np.asarray(image)[..., 1] < 200
    within = np.zeros(tissue.shape, bool)
    if SLIDES[name].annotations is not None:
        area, hole = (_filled(points) for points in areas_of(name))
        within = area & ~hole
    for x, y in rng.uniform((0, 0), (WIDTH - 1, HEIGHT - 1), (1300, 2)):
        if tissue[int(y), int(x)] and (within[int(y), int(x)] or rng.random() < 0.5):
            tumour = within[int(y), int(x)]
            r = 6 if tumour else 3
            draw.ellipse((x - r, y - r, x + r, y + r), fill=TUMOUR_NUCLEUS if tumour else NUCLEUS)
    return np.asarray(image)


def asap_xml(annotations: list[tuple[str, str, np.ndarray]]) -> str:
    """Return an ASAP file of (name, group, outline).

    Its coordinates are not in order, but numbered.
    """
    lines = ['<?xml version="1.0"?>', "<ASAP_Annotations>", "\t<Annotations>"]
    for name, group, points in annotations:
        lines.append(f'\t\t<Annotation Name="{name}" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58">')
        lines.append("\t\t\t<Coordinates>")
        for order in np.random.default_rng(len(points)).permutation(len(points)):
            x, y = points[order]
            lines.append(f'\t\t\t\t<Coordinate Order="{order}" X="{x:.3f}" Y="{y:.3f}" />')
        lines += ["\t\t\t</Coordinates>", "\t\t</Annotation>"]
    lines += ["\t</Annotations>", "\t<AnnotationGroups>", '\t\t<Group Name="Tumor" PartOfGroup="None" Color="#00ff00">']
    return "\n".join(
        [*lines, "\t\t\t<Attributes />", "\t\t</Group>", "\t</AnnotationGroups>", "</ASAP_Annotations>", ""]
    )


def annotations_of(name: str) -> list[tuple[str, str, np.ndarray]]:
    """Return name, group and outline of a slide's annotations; the hole comes first in the file."""
    (area, hole), (area_group, hole_group) = areas_of(name), SLIDES[name].groups
    return [("Annotation 1", hole_group, hole), ("Annotation 0", area_group, area)]


def write_slide(path: Path, pixels: np.ndarray, mpp: float | None = MPP, levels: int = 3, tile: int = 256) -> None:
    """Write a tiled TIFF whose levels halve; without a resolution where `mpp` is None."""
    path.write_bytes(slide_bytes(pixels, mpp, levels, tile))


def slide_bytes(pixels: np.ndarray, mpp: float | None = MPP, levels: int = 3, tile: int = 256) -> bytes:
    buffer = BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for level in range(levels):
            scale = 2**level
            blocks = pixels.reshape(pixels.shape[0] // scale, scale, pixels.shape[1] // scale, scale, 3)
            reduced = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
            resolution = {} if mpp is None else {"resolution": (10_000 / mpp / scale,) * 2, "resolutionunit": 3}
            file.write(
                reduced,
                tile=(tile, tile),
                photometric="rgb",
                compression="zlib",
                subfiletype=1 if level else 0,
                metadata=None,
                software=False,
                **resolution,
            )
    return buffer.getvalue()


@cache
def _slide_bytes(name: str) -> bytes:
    return slide_bytes(level_0(name))


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, list(SLIDES).index(name)])


def _filled(points: np.ndarray) -> np.ndarray:
    image = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=1)
    return np.asarray(image)


def _tif(name: str) -> Path:
    return SLIDES[name].folder / f"{name}.tif"


def _xml(name: str) -> Path:
    folder = SLIDES[name].annotations
    assert folder is not None
    return folder / f"{name}.xml"


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damage_pixels(path: Path) -> None:
    """Overwrite the first kilobyte of the compressed pixels of level 0."""
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[start : start + 1000] = b"\xff" * 1000
    path.write_bytes(data)


def _strip_coordinates(path: Path) -> None:
    """Take the last annotation's coordinates away."""
    head, _, tail = path.read_text().rpartition("<Coordinates>")
    path.write_text(f"{head}<Coordinates>{tail[tail.index('</Coordinates>') :]}")


def _stray_click(path: Path) -> None:
    stray = asap_xml([("stray", "_0", np.array([[10.0, 10.0], [12.0, 12.0]]))])
    annotation = stray[stray.index("\t\t<Annotation ") : stray.index("\t</Annotations>")]
    _edit(path, "\t</Annotations>", f"{annotation}\t</Annotations>")


def _move_away(path: Path) -> None:
    path.write_text(asap_xml([("Annotation 0", "_0", areas_of("tumor_001")[0] + 5000)]))


def _entities(path: Path) -> None:
    levels = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    declaration = f'<!DOCTYPE bomb [<!ENTITY l0 "ha">{levels}]>'
    _edit(path, "<ASAP_Annotations>", f"{declaration}<ASAP_Annotations>&l9;")


def _without_resolution(folder: Path) -> None:
    write_slide(folder / _tif("normal_001"), level_0("normal_001"), mpp=None)


def _claim_huge(path: Path) -> None:
    """Write 2^30 as the width of every level."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for page in file.pages:
            tag = page.tags["ImageWidth"]
            data[tag.offset + 2 : tag.offset + 4] = (4).to_bytes(2, "little")
            data[tag.valueoffset : tag.valueoffset + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(data)


def _blank(folder: Path) -> None:
    write_slide(folder / _tif("normal_001"), np.full((HEIGHT, WIDTH, 3), GLASS, np.uint8))


def _into_unicode_folder(folder: Path) -> None:
    (folder / C16).rename(folder / "病理切片 (Lymphknoten) – données")


TUMOUR, NODE = _xml("tumor_001"), _xml("patient_004_node_4")
FLAWS = {
    "truncated slide": Flaw(lambda f: _truncate(f / _tif("normal_001")), r"normal_001\.tif cannot be decoded"),
    "damaged pixels": Flaw(lambda f: _damage_pixels(f / _tif("normal_001")), r"normal_001\.tif cannot be decoded"),
    "not a TIFF": Flaw(lambda f: (f / _tif("normal_001")).write_text("x"), r"normal_001\.tif cannot be decoded"),
    "a header that claims too much": Flaw(
        lambda f: _claim_huge(f / _tif("normal_001")), r"normal_001\.tif cannot be decoded"
    ),
    "no resolution": Flaw(_without_resolution, "states no plausible pixel size.*give data.options.level"),
    "no tissue": Flaw(_blank, r"normal_001\.tif: none of 4x3 tiles"),
    "tumour without annotation": Flaw(lambda f: (f / TUMOUR).unlink(), r"tumor_001\.xml is not there"),
    "node without annotation": Flaw(lambda f: (f / NODE).unlink(), r"patient_004_node_4\.xml is not there"),
    "annotation without slide": Flaw(lambda f: (f / _tif("tumor_001")).unlink(), "without a slide tumor_001.tif"),
    "entity expansion": Flaw(lambda f: _entities(f / TUMOUR), r"tumor_001\.xml cannot be decoded"),
    "truncated annotation": Flaw(lambda f: _truncate(f / TUMOUR), r"tumor_001\.xml cannot be decoded"),
    "annotation without coordinates": Flaw(lambda f: _strip_coordinates(f / TUMOUR), "has no coordinates"),
    "annotation without area": Flaw(lambda f: _stray_click(f / TUMOUR), "'stray' encloses no area"),
    "annotation of another slide": Flaw(lambda f: _move_away(f / TUMOUR), "lies outside the slide of 768x576"),
    "unknown group": Flaw(lambda f: _edit(f / TUMOUR, '"_0"', '"Exclusion"'), "PartOfGroup 'Exclusion', expected"),
    "not a number": Flaw(lambda f: _edit(f / TUMOUR, 'X="', 'X="NaN" Z="'), "is not a place on a slide"),
    "lost coordinate": Flaw(lambda f: _edit(f / TUMOUR, 'Order="3"', 'Order="4"'), "lacks a coordinate"),
    "slide in two folders": Flaw(
        lambda f: shutil.copy(f / _tif("tumor_001"), f / TRAINING / "normal"),
        r"tumor_001 is there 2 times \(normal, tumor\)",
    ),
    "unknown label": Flaw(
        lambda f: _edit(f / TESTING / "reference.csv", "Normal", "benign"),
        r"reference\.csv: row 2: label of test_002 is 'benign', expected one of normal, tumor",
    ),
    "missing table": Flaw(lambda f: (f / TESTING / "reference.csv").unlink(), r"neither test_002\.xml nor a label"),
    "missing column": Flaw(
        lambda f: _edit(f / C17 / "stage_labels.csv", "stage", "pn"), "the columns patient,stage .* 'patient,pn'"
    ),
    "tumour in a negative slide": Flaw(
        lambda f: _edit(f / C17 / "stage_labels.csv", "macro", "negative"), "said to be normal, but its annotations"
    ),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}
