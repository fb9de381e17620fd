"""Reads polygon annotations of ASAP, the software of the CAMELYON challenges, and rasterises them.

    <ASAP_Annotations><Annotations>
      <Annotation Name="Annotation 0" Type="Polygon" PartOfGroup="Tumor">
        <Coordinates><Coordinate Order="0" X="12711.3" Y="88778.1"/> …

Coordinates are pixels of level 0 of the slide, with pixel centres at half integers. A point is
inside a polygon if the winding number is not zero, as in ASAP's own conversion to masks
(AnnotationToMask.cpp), so that a self-intersecting contour leaves no gap. Holes are subtracted
after all areas have been drawn.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.readers.common import unreadable_as_reject, xml_root
from maskloom.pipeline.errors import RejectedSample

MAX_XML_BYTES = 2**26
FARTHEST = 2.0**31  # larger coordinates cannot lie on a slide
CLOSED_TYPES = ("polygon", "rectangle", "spline")  # splines are read as polygons; ASAP samples them densely
CROSSINGS_AT_A_TIME = 2**22


class Polygon(NamedTuple):
    """One annotated area, or a hole in others.

    Attributes:
        name: the name in the file.
        hole: whether the area is subtracted.
        points: (N, 2) vertices x, y in order.
        box: bounding box: left, top, right, bottom.
    """

    name: str
    hole: bool
    points: NDArray[np.float64]
    box: tuple[float, float, float, float]


class Annotations(NamedTuple):
    """The annotations of one file.

    Attributes:
        polygons: the annotations that enclose an area.
        stray: the problem of each annotation that encloses no area (collinear points, usually an
            accidental click), by its index in the file.
    """

    polygons: tuple[Polygon, ...]
    stray: dict[int, str]


def read_annotations(path: Path, areas: Collection[str], holes: Collection[str]) -> Annotations:
    """Return the annotations of an ASAP file.

    Args:
        path: the XML file.
        areas: names of the groups that are areas, in lower case.
        holes: names of the groups that are holes, in lower case.

    Raises:
        RejectedSample: the file is missing, damaged or too large, or has an unknown group, type or
            coordinate, with which the mask would be wrong.
    """
    with unreadable_as_reject(path):
        size = path.stat().st_size
    if size > MAX_XML_BYTES:
        raise RejectedSample(f"{path.name} has {size} bytes, more than {MAX_XML_BYTES}")
    root = xml_root(path)
    if root.tag != "ASAP_Annotations":
        raise RejectedSample(f"{path.name} is not an ASAP annotation: its root element is {root.tag!r}")
    polygons, stray = [], {}
    for index, annotation in enumerate(root.iterfind("./Annotations/Annotation")):
        name = annotation.get("Name") or f"number {index}"
        where = f"{path.name}: annotation {name!r}"
        hole = _is_hole(annotation, areas, holes, where)
        points = _points(annotation, where)
        if np.linalg.matrix_rank(points - points[0]) < 2:
            stray[index] = f"{where} encloses no area: its {len(points)} points lie on a line"
        else:
            (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
            polygons.append(Polygon(name, hole, points, (float(left), float(top), float(right), float(bottom))))
    return Annotations(tuple(polygons), stray)


def drawn(
    polygons: Sequence[Polygon], left: float, top: float, step: float, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Rasterise areas without their holes, sampled at the centres of the raster's pixels.

    Args:
        polygons: areas and holes.
        left: x of the upper left corner of the raster on level 0.
        top: y of that corner.
        step: side of a raster pixel in pixels of level 0.
        shape: (height, width) of the raster.

    Returns:
        (height, width) bool.
    """
    inside = np.zeros(shape, dtype=np.bool_)
    right, bottom = left + shape[1] * step, top + shape[0] * step
    near = [p for p in polygons if p.box[0] < right and p.box[1] < bottom and p.box[2] > left and p.box[3] > top]
    for polygon in sorted(near, key=lambda polygon: polygon.hole):
        covered = _winding_numbers((polygon.points - (left, top)) / step - 0.5, shape) != 0
        inside = inside & ~covered if polygon.hole else inside | covered
    return inside


def _winding_numbers(points: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return the winding number of a polygon around each pixel.

    Along a row, the winding number changes only where an edge crosses the row: by +1 for a downward
    and -1 for an upward edge. Every crossing is recorded at the first pixel to its right, and the
    row is accumulated from the left.

    Args:
        points: (N, 2) vertices in pixels, with pixel centres at integers.
        shape: (height, width).
    """
    height, width = shape
    (x, y), (next_x, next_y) = points.T, np.roll(points, -1, axis=0).T
    # An edge crosses the rows from its upper end (inclusive) to its lower end (exclusive), so that
    # vertices count once.
    first, stop = (np.clip(np.ceil(end(y, next_y)), 0, height).astype(np.int64) for end in (np.minimum, np.maximum))
    crossing = np.flatnonzero(stop > first)
    changes = np.zeros(height * (width + 1), dtype=np.int64)
    parts = math.ceil(int((stop - first).sum()) / CROSSINGS_AT_A_TIME)
    for edges in np.array_split(crossing, max(1, parts)):
        count = (stop - first)[edges]
        edge = np.repeat(edges, count)
        row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
        at = x[edge] + (row - y[edge]) * (next_x[edge] - x[edge]) / (next_y[edge] - y[edge])
        column = np.clip(np.ceil(at), 0, width).astype(np.int64)
        np.add.at(changes, row * (width + 1) + column, np.where(next_y[edge] > y[edge], 1, -1))
    return np.cumsum(changes.reshape(height, width + 1), axis=1)[:, :width]


def _is_hole(annotation: Element, areas: Collection[str], holes: Collection[str], where: str) -> bool:
    kind, group = annotation.get("Type", "Polygon"), annotation.get("PartOfGroup", "")
    if kind.lower() not in CLOSED_TYPES:
        raise RejectedSample(f"{where} has Type {kind!r}, expected one of {', '.join(CLOSED_TYPES)}")
    if group.strip().lower() not in {*areas, *holes}:
        raise RejectedSample(f"{where} has PartOfGroup {group!r}, expected one of {', '.join([*areas, *holes])}")
    return group.strip().lower() in holes


def _points(annotation: Element, where: str) -> NDArray[np.float64]:
    """Return the vertices, ordered by `Order`, (N, 2) with N >= 1."""
    coordinates = annotation.findall("./Coordinates/Coordinate")
    if not coordinates:
        raise RejectedSample(f"{where} has no coordinates; restore them or delete the annotation from the file")
    try:
        rows = sorted((int(c.get("Order", "")), float(c.get("X", "")), float(c.get("Y", ""))) for c in coordinates)
    except ValueError as error:
        raise RejectedSample(f"{where} has a coordinate whose Order, X or Y is not a number ({error})") from error
    if [row[0] for row in rows] != list(range(rows[0][0], rows[0][0] + len(rows))):
        raise RejectedSample(f"{where} lacks a coordinate, or has one twice: Order does not count up by one")
    points = np.array([row[1:] for row in rows], dtype=np.float64)
    if not (np.abs(points) < FARTHEST).all():  # false for NaN as well
        raise RejectedSample(f"{where} has a coordinate that is not a place on a slide (NaN, infinite or beyond 2^31)")
    return points
