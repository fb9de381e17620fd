"""`camelyon`: CAMELYON16 and CAMELYON17, tiles of lymph node slides with outlined metastases.

Slides, annotations and tables are found by name anywhere below the raw folder, which may hold
either dataset or both:

    CAMELYON16/training/normal/normal_001.tif
               training/tumor/tumor_001.tif
               training/lesion_annotations/tumor_001.xml
               testing/images/test_001.tif
               testing/lesion_annotations/test_001.xml
               testing/reference.csv
    CAMELYON17/training/center_0/patient_004_node_4.tif
               lesion_annotations/patient_004_node_4.xml
               stage_labels.csv (or stages.csv)

The diagnoses of the slides are in the two tables, which are recognised by content, because copies
have other names (`data_prep.readers.slide_labels`).

Annotations are ASAP polygons in pixels of level 0 (`data_prep.readers.asap`). The groups Tumor, _0,
_1 and metastases are tumour; _2 and normal are holes. Files whose name ends in `_mask` are rendered
annotations and are not read.

A slide counts as negative only if its name, its table and its annotations agree. Left out with a
reason are: slides with metastases but without an XML file, slides with an unknown label, slides
whose label contradicts their annotations, slides that exist twice, and

- test_049, the duplicate of another slide (`keep_duplicate=true` keeps it);
- normal_086, which shows tumour and was renamed to tumor_111, and normal_144, which has unmarked
  tumour (arXiv:1703.02442);
- slides that are not annotated exhaustively: 20 slides of CAMELYON16 and test_114 (README), and
  CAMELYON17 nodes with isolated tumour cells (data page). With `incomplete=tumour_tiles`, only
  their tiles with marked tumour are used, never a normal tile.

An annotation that encloses no area (one or two points) is listed and ignored. Any other
irregularity in an XML file rejects the slide, because the mask would be wrong. A tile is `tumour`
if the fraction of tumour pixels is at least `min_tumour`, and `normal` if it is zero; other tiles
are not used. Groups are patients in CAMELYON17 and slides in CAMELYON16, which has no patient ids.
Slides of the CAMELYON16 test set form the test split; all others may go to any split.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy import ndimage

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject
from maskloom.data_prep.processing.tiles import (
    TileGrid,
    mask_shares,
    polygon_shares,
    sampled,
    saturation,
    tile_grid,
    tissue_threshold,
)
from maskloom.data_prep.readers.asap import Annotations, drawn, read_annotations
from maskloom.data_prep.readers.common import natural_order, unreadable_as_reject
from maskloom.data_prep.readers.file_names import is_visible
from maskloom.data_prep.readers.slide_labels import REFERENCE, STAGES, slide_diagnoses
from maskloom.data_prep.readers.slides import downsample_of_level, downsample_of_mpp, opened_slide, overview, tile_image
from maskloom.pipeline.dataset.components import FOUR_NEIGHBOURS, without_specks
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

SLIDE = re.compile(r"(?P<kind>normal|tumor|test)_\d{3}|(?P<patient>patient_\d{3})_node_\d")
TUMOUR_GROUPS, HOLE_GROUPS = ("tumor", "_0", "_1", "metastases"), ("_2", "normal")
DIAGNOSIS_OF_KIND = {"normal": "normal", "tumor": "tumour"}
EXAMPLES = "normal_001.tif, tumor_001.tif, test_001.tif, patient_004_node_4.tif"
TUMOUR_TILES_ONLY = "tumour tiles only"  # `RawItem.key` of a slide on which tumour may be unmarked
DUPLICATE = "test_049"
MISLABELLED = {
    "normal_086": "it shows tumour and was renamed to tumor_111 (README of CAMELYON16)",
    "normal_144": "it holds tumour that is not marked (Liu et al. 2017, arXiv:1703.02442)",
}
NOT_EXHAUSTIVE = {"test_114"} | {
    f"tumor_{n:03}" for n in (10, 15, 18, 20, 25, 29, 33, 34, 44, 46, 51, 54, 55, 56, 67, 79, 85, 92, 95, 110)
}
FINDINGS = {"normal": "no metastasis", "tumour": "metastatic breast carcinoma"}
DEFAULT_MPP = 0.5  # about 20x
SPECK = 0.1  # smaller tissue areas, as a fraction of a tile's area, are dirt
SMOOTHING = 1 / 64  # of a tile's side; smooths over nuclei and cracks


class CamelyonOptions(Options):
    """Selection of slides and tiles, and content of masks."""

    tile_size: int = Field(512, ge=32, le=4096, description="side of a tile in pixels, at the requested resolution")
    mpp: float | None = Field(
        None, ge=0.05, le=100, description="microns per pixel; 0.5, about 20x, if neither mpp nor level is set"
    )
    level: int | None = Field(None, ge=0, description="level of the slide's pyramid, instead of mpp")
    stride: int | None = Field(None, ge=8, description="distance between tiles, in the same pixels; null: tile_size")
    min_tissue: float = Field(0.5, ge=0, le=1, description="smallest fraction of tissue in a tile")
    min_tumour: float = Field(0.05, ge=0, le=1, description="smallest fraction of tumour pixels in a tumour tile")
    max_tiles_per_slide: int | None = Field(100, ge=1, description="null: all")
    tumour_tiles: float = Field(
        0.5, ge=0, le=1, description="fraction of max_tiles_per_slide reserved for tumour tiles"
    )
    tissue: Literal["otsu", "all"] = Field(
        "otsu", description="otsu: detect tissue; all: use every tile, glass included"
    )
    mask: Literal["tumour", "tissue_tumour"] = Field("tumour", description="tissue_tumour: three classes")
    incomplete: Literal["leave_out", "tumour_tiles"] = Field(
        "leave_out", description="use of slides whose metastases are not all annotated"
    )
    keep_duplicate: bool = Field(False, description=f"use {DUPLICATE}, which is the duplicate of another slide")
    seed: int = Field(0, description="seed of the selection of tiles")

    @model_validator(mode="after")
    def _has_one_resolution(self) -> "CamelyonOptions":
        if self.mpp is not None and self.level is not None:
            raise ValueError("give mpp or level, not both")
        return self


class Place(NamedTuple):
    """Position of a tile on its slide; the `RawItem.key`.

    Attributes:
        x: x of its corner on level 0.
        y: y of its corner on level 0.
        downsample: side of a tile pixel in pixels of level 0.
        threshold: saturation threshold of tissue on this slide.
    """

    x: int
    y: int
    downsample: float
    threshold: int


class Adapter(DatasetAdapter):
    """Tiles of H&E slides of sentinel lymph nodes, with masks of the metastases."""

    Options = CamelyonOptions
    options: CamelyonOptions
    items_per_part: ClassVar[int] = 1

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there is a slide with a CAMELYON name anywhere below."""
        slides = (path for path in raw_dir.rglob("*.[tT][iI][fF]") if is_visible(path, raw_dir))
        return any(SLIDE.fullmatch(path.stem.lower()) for path in slides)

    def info(self) -> DatasetInfo:
        """Return what is true of every tile."""
        with_tissue = self.options.mask == "tissue_tumour"
        return DatasetInfo(
            modality="H&E-stained histopathology",
            channels=3,
            mask_classes=("background", "tissue", "tumour") if with_tissue else ("background", "tumour"),
            palette=((0, 0, 0), (80, 160, 255), (255, 80, 80)) if with_tissue else ((0, 0, 0), (255, 80, 80)),
            labels=("normal", "tumour"),
            prompt_templates=(
                "{modality} of a sentinel lymph node, {finding}",
                "{label} lymph node tissue, {modality}",
                "{modality} of a lymph node section showing {finding}",
                *(
                    ("{modality} of a lymph node with {finding}, regions of {mask_classes}",)
                    if with_tissue
                    else (
                        "{modality} of a lymph node with a {size} {shape} region of {finding}, {place}",
                        "{size} region of {finding}, {place}, in a {modality} image of a lymph node",
                    )
                ),
            ),
            licence="CC0-1.0",
            citation="Litjens et al.: 1399 H&E-stained sentinel lymph node sections of breast cancer patients: the CAMELYON dataset,"
            " GigaScience 7(6), giy065, 2018",
            homepage="https://camelyon17.grand-challenge.org/Data/",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the slides in natural order, and rejects for annotations without a slide.

        Raises:
            MaskLoomError: there is no slide, or a table is damaged or has an unknown label.
        """
        slides, annotations, tables = self._files()
        labels = slide_diagnoses(path for name in sorted(tables) for path in tables[name])
        for name in sorted(slides, key=lambda name: natural_order(Path(name))):
            yield from self._slide_entries(name, slides[name], annotations.pop(name, []), labels)
        for path in sorted(path for paths in annotations.values() for path in paths):
            yield Reject(str(path), f"an annotation without a slide {path.stem}.tif")

    def expand(self, item: RawItem) -> Iterator[RawItem | Reject]:
        """List the selected tiles of a slide row by row, after rejects for empty annotations.

        Raises:
            RejectedSample: the slide or its annotation cannot be read, they do not match, or no
                tile qualifies.
        """
        path = Path(item.path)
        slide = opened_slide(path)
        grid = self._grid(item)
        annotations = _annotations(item)
        _check_annotations(item, annotations, slide.dimensions)
        threshold, tissue = self._tissue_shares(item, grid)
        wanted = tissue >= self.options.min_tissue
        shares = polygon_shares(grid, annotations.polygons, wanted)
        tumour = wanted & (shares > 0) & (shares >= self.options.min_tumour)
        normal = wanted & (shares == 0) & (item.key != TUMOUR_TILES_ONLY)
        tumour_corners, normal_corners = ([grid.corner(*at) for at in np.argwhere(kind)] for kind in (tumour, normal))
        if not tumour_corners and not normal_corners:
            raise RejectedSample(
                f"{path.name}: none of {grid.shape[1]}x{grid.shape[0]} tiles of {grid.span:.0f} pixels of level 0 has"
                f" data.options.min_tissue={self.options.min_tissue:g} and is clearly tumour or normal"
            )
        yield from (Reject(f"{item.path}#annotation={n}", reason) for n, reason in annotations.stray.items())
        seed = f"{item.sample_id}/{self.options.seed}"
        chosen = sampled(
            tumour_corners, normal_corners, self.options.max_tiles_per_slide, self.options.tumour_tiles, seed
        )
        with_tumour = set(tumour_corners)
        for x, y in chosen:
            label = "tumour" if (x, y) in with_tumour else "normal"
            yield RawItem(
                sample_id=f"{item.sample_id}_x{x}_y{y}",
                path=f"{item.path}#x={x},y={y}",
                mask_paths=item.mask_paths,
                label=label,
                group=item.group,
                split=item.split,
                attributes={"finding": FINDINGS[label]},
                key=Place(x, y, grid.downsample, threshold),
            )

    def load(self, item: RawItem) -> RawImage:
        """Decode one tile, (tile_size, tile_size, 3) uint8, and rasterise its mask.

        Raises:
            RejectedSample: this part of the slide is damaged.
        """
        place, size = Place(*item.key), self.options.tile_size
        path = Path(item.path.rpartition("#")[0])
        image = tile_image(opened_slide(path), path, (place.x, place.y), place.downsample, size)
        tumour = drawn(_annotations(item).polygons, place.x, place.y, place.downsample, (size, size))
        if self.options.mask == "tumour":
            return RawImage(image=image, mask=tumour.astype(np.uint8))
        smooth = ndimage.gaussian_filter(saturation(image), size * SMOOTHING)
        return RawImage(image=image, mask=np.where(tumour, 2, smooth > place.threshold).astype(np.uint8))

    def _files(self) -> tuple[dict[str, list[Path]], dict[str, list[Path]], dict[str, list[Path]]]:
        """Return slides and annotations by slide id, and tables by name.

        Raises:
            MaskLoomError: there is no slide.
        """
        assert self.raw_dir is not None
        found: dict[str, dict[str, list[Path]]] = {suffix: defaultdict(list) for suffix in (".tif", ".xml", ".csv")}
        for path in sorted(self.raw_dir.rglob("*")):
            name = path.stem.lower()
            visible = is_visible(path, self.raw_dir) and not path.is_dir()
            if path.suffix.lower() in found and visible and not name.endswith("_mask"):
                found[path.suffix.lower()][name].append(path)
        if not any(SLIDE.fullmatch(name) for name in found[".tif"]):
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not CAMELYON: no slide named like {EXAMPLES} below;"
                " give the folder that holds them"
            )
        return found[".tif"], found[".xml"], found[".csv"]

    def _slide_entries(
        self, name: str, paths: list[Path], annotations: list[Path], labels: Mapping[str, str]
    ) -> Iterator[RawItem | Reject]:
        """List one slide, or rejects for all files with its name."""
        parts = SLIDE.fullmatch(name)
        if parts is None:
            yield from (Reject(str(path), f"not named like a slide of CAMELYON ({EXAMPLES})") for path in paths)
            return
        diagnosis = DIAGNOSIS_OF_KIND.get(parts["kind"]) or labels.get(name)
        reason = _several(name, paths, annotations) or self._reason_to_leave_out(name, diagnosis, bool(annotations))
        if reason is not None:
            yield from (Reject(str(path), reason) for path in paths)
            return
        yield RawItem(
            sample_id=name,
            path=str(paths[0]),
            mask_paths=tuple(str(path) for path in annotations),
            label="tumour" if diagnosis == "itc" else diagnosis,
            group=parts["patient"] or name,
            split="test" if parts["kind"] == "test" else None,
            key=TUMOUR_TILES_ONLY if _is_incomplete(name, diagnosis) else None,
        )

    def _reason_to_leave_out(self, name: str, diagnosis: str | None, annotated: bool) -> str | None:
        if name in MISLABELLED:
            return f"left out: {MISLABELLED[name]}"
        if name == DUPLICATE and not self.options.keep_duplicate:
            return "left out: the duplicate of another slide (data.options.keep_duplicate=false)"
        if _is_incomplete(name, diagnosis) and self.options.incomplete == "leave_out":
            return "left out: not all of its tumour is annotated (data.options.incomplete=leave_out)"
        if annotated or diagnosis == "normal":
            return None
        missing = f"{name}.xml is not there, and a tumour slide without annotation is not a negative"
        tables = STAGES if name.startswith("patient") else (REFERENCE,)
        return missing if diagnosis else f"neither {name}.xml nor a label in {' or '.join(tables)} is there"

    def _grid(self, item: RawItem) -> TileGrid:
        """Return the tile grid of a slide at the requested resolution."""
        path, options = Path(item.path), self.options
        slide = opened_slide(path)
        if options.level is not None:
            downsample = downsample_of_level(slide, path, options.level)
        else:
            downsample = downsample_of_mpp(slide, path, options.mpp or DEFAULT_MPP)
        unit = max(1, round(slide.level_downsamples[slide.get_best_level_for_downsample(downsample)]))
        return tile_grid(slide.dimensions, downsample, unit, options.tile_size, options.stride or options.tile_size)

    def _tissue_shares(self, item: RawItem, grid: TileGrid) -> tuple[int, NDArray[np.float64]]:
        """Return the saturation threshold of tissue, and the tissue fraction of each tile."""
        if self.options.tissue == "all":
            return -1, np.ones(grid.shape)
        path = Path(item.path)
        slide = opened_slide(path)
        colours = saturation(overview(slide, path))
        threshold = tissue_threshold(colours)
        width, height = slide.dimensions
        scale = width / colours.shape[1], height / colours.shape[0]
        smallest = SPECK * grid.span**2 / (scale[0] * scale[1])
        mask = without_specks(colours > threshold, smallest, connectivity=FOUR_NEIGHBOURS)
        return threshold, mask_shares(grid, mask, scale)


def _is_incomplete(name: str, diagnosis: str | None) -> bool:
    return name in NOT_EXHAUSTIVE or diagnosis == "itc"


def _several(name: str, slides: Sequence[Path], annotations: Sequence[Path]) -> str | None:
    """Return a reason if a slide or its annotation exists twice; the choice is the user's."""
    for what, paths in (("slide", slides), ("annotation", annotations)):
        if len(paths) > 1:
            folders = ", ".join(sorted({path.parent.name for path in paths}))
            return f"the {what} {name} is there {len(paths)} times ({folders}); keep one"
    return None


def _annotations(item: RawItem) -> Annotations:
    """Return the annotations of a slide; empty if it has no annotation file.

    Raises:
        RejectedSample: the file cannot be read.
    """
    if not item.mask_paths:
        return Annotations((), {})
    path = Path(item.mask_paths[0])
    with unreadable_as_reject(path):
        stat = path.stat()
    return _read_once(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _read_once(path: Path, size: int, mtime_ns: int) -> Annotations:
    return read_annotations(path, TUMOUR_GROUPS, HOLE_GROUPS)


def _check_annotations(item: RawItem, annotations: Annotations, dimensions: tuple[int, int]) -> None:
    """Check the annotations of a slide against its size and its label.

    Raises:
        RejectedSample: an annotation is outside the slide, a negative slide has tumour, or another
            slide has none.
    """
    width, height = dimensions
    for polygon in annotations.polygons:
        left, top, right, bottom = polygon.box
        if right <= 0 or bottom <= 0 or left >= width or top >= height:
            raise RejectedSample(
                f"annotation {polygon.name!r} of {item.sample_id} lies outside the slide of {width}x{height} pixels:"
                " it belongs to another one"
            )
    marked = any(not polygon.hole for polygon in annotations.polygons)
    if marked and item.label == "normal":
        raise RejectedSample(f"{item.sample_id} is said to be normal, but its annotations mark tumour")
    if not marked and item.label != "normal":
        raise RejectedSample(f"{item.sample_id} is not known to be normal, but its annotations mark no tumour")
