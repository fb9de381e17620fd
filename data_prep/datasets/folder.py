"""`folder`: your own images and masks, found by patterns or listed in a table; nothing is guessed.

By patterns (the defaults first, then options for other layouts):

    images/a.png                   images: "images/**/*"
    masks/a.png                    masks: "masks/{stem}.png"

    scans/benign/p01_1.png         images: "scans/*/*.png"      label_from: parent
    scans/benign/p01_1_mask.png    masks: "{folder}/{stem}_mask*.png"
                                   group_pattern: '(p\\d+)_[^/]*$'

    p01/images/1.png               images: "*/images/*.png"     group_pattern: '^(p\\d+)/'
    p01/masks/1.png                masks: "{grandparent}/masks/{stem}.png"

    images/a.png                   masks: {disc: "masks/{stem}_disc.png",
    masks/a_disc.png, a_cup.png            cup: "masks/{stem}_cup.png"}
                                   (a black-and-white file per class; the cup covers the disc)

By a table (CSV or XLSX), one row per image; paths are relative to `data.raw_dir`:

    labels.csv                     table: labels.csv     image_column: file     mask_column: mask
    file,mask,dx,patient           label_column: dx      group_column: patient
                                   images: "{image}" (default), or "part_*/{image}.jpg"

Images and masks are PNG, JPEG, BMP, TIFF (8 and 16 bits per channel, float) or `.npy` arrays (H, W)
or (H, W, 3). Transparent pixels of a mask are background, those of an image black. Masks are binary
(black and one bright colour) or label maps with values or colours named by `mask_values`. Names are
compared by appearance (`data_prep.readers.file_names`). Several masks of one image are merged if
there is one foreground class.

A mask may be empty (no lesion). If `masks` is set, an image without a mask file is left out, and so
are all images that share one mask file. Files that are masks of another image do not count as
images. Links out of `data.raw_dir` are rejected, and linked folders are not followed.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from maskloom.data_prep.folder.listing import Candidate, is_read, listed_candidates, shown_path
from maskloom.data_prep.folder.options import FolderOptions, case_clash
from maskloom.data_prep.processing.label_maps import distinct_palette, label_map, read_mask
from maskloom.data_prep.readers.common import require_same_size
from maskloom.data_prep.readers.file_names import NO_TEXT, as_seen, canonical, comparable, is_text
from maskloom.data_prep.readers.file_patterns import Confined, has_wildcards, placeholder_values
from maskloom.data_prep.readers.image_files import READ_SUFFIXES, read_picture
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from maskloom.pipeline.files.atomic import value_digest

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Adapter(DatasetAdapter):
    """Images and masks in any folder layout, described by the options."""

    Options = FolderOptions
    options: FolderOptions

    def info(self) -> DatasetInfo:
        """Return what is true of every image.

        Raises:
            MaskLoomError: class names must be read from the data, and the folder or the table does
                not match the options.
        """
        options = self.options
        return DatasetInfo(
            modality=options.modality,
            channels=options.channels,
            mask_classes=options.mask_classes,
            palette=options.colours or distinct_palette(len(options.mask_classes)),
            labels=self._labels,
            prompt_templates=options.prompts or _templates(options.modality, bool(self._labels), options.has_masks),
            licence=options.licence,
            citation=options.citation,
            homepage="",
            duplicates="identical" if options.group_column or options.group_pattern else "near",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the images in path or table order, and rejects for every unusable file or row.

        Raises:
            MaskLoomError: no file matches the options, or the table does not.
        """
        labels = self._labels
        candidates, rejects = self._listing
        yield from rejects
        owners: dict[str, list[str]] = defaultdict(list)
        for candidate in candidates:
            for mask in candidate.masks:
                owners[mask].append(candidate.file)
        confined = Confined(self._root)
        for candidate in candidates:
            try:
                yield self._item(candidate, owners, labels, confined)
            except RejectedSample as error:
                yield Reject(shown_path(self._root, candidate.file), str(error))

    def load(self, item: RawItem) -> RawImage:
        """Decode an image and its masks.

        Raises:
            RejectedSample: a file is unreadable, or a mask has another size than its image or a
                value without a class.
        """
        image, darkened = read_picture(Path(item.path))
        if not item.mask_paths:
            return RawImage(image, None, darkened=darkened)
        values = self.options.mask_values
        classes = None if values is None else label_map(values)
        mask = np.zeros(image.shape[:2], dtype=np.uint8)
        for path, pattern in zip(map(Path, item.mask_paths), item.key, strict=True):
            part = read_mask(path, classes)
            require_same_size(f"mask {path.name}", part, image)
            # With masks by class, patterns are in class order, and later classes are drawn over
            # earlier ones.
            mask = np.maximum(mask, part * np.uint8(pattern + 1))
        return RawImage(image, mask, darkened=darkened)

    def __getstate__(self) -> dict[str, object]:
        """Exclude the listing, which worker processes do not need."""
        return {name: value for name, value in self.__dict__.items() if name != "_listing"}

    @property
    def _root(self) -> Path:
        assert self.raw_dir is not None
        return self.raw_dir

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        """The class names in order: from the options, or as found."""
        if self.options.label_source is None:
            return ()
        images = [candidate for candidate in self._listing[0] if is_read(candidate.file) and is_text(candidate.file)]
        found = sorted({label for image in images if (label := self._label(image))})
        unused = [label for label in self.options.labels or () if label not in found]
        if self.options.labels is None and (clash := case_clash(found)):
            raise MaskLoomError(
                f"data.options.{self.options.label_key}: {clash}; name the classes in data.options.labels, whose spelling then counts"
            )
        missing = not found and not self.options.keep_incomplete
        if images and (unused or missing):  # without images, the rejects say why
            key = "labels" if unused else self.options.label_key
            told = f"no image has the label {unused[0]!r}" if unused else "no image has a label"
            raise MaskLoomError(f"data.options.{key}: {told}; found: {', '.join(found) or 'none'}")
        return self.options.labels or tuple(found)

    @cached_property
    def _listing(self) -> tuple[list[Candidate], list[Reject]]:
        return listed_candidates(self._root, self.options)

    def _item(
        self, candidate: Candidate, owners: dict[str, list[str]], labels: Sequence[str], confined: Confined
    ) -> RawItem:
        """Return the item of a candidate.

        Raises:
            RejectedSample: the file, its masks, or one of its values is unusable.
        """
        for file in (candidate.file, *candidate.masks):
            if not is_read(file):
                raise RejectedSample(
                    f"{PurePosixPath(file).name} is none of the formats that are read ({', '.join(READ_SUFFIXES)})"
                )
            if not is_text(file):
                raise RejectedSample(NO_TEXT)
            confined.check(file)
        if self.options.has_masks:
            self._check_masks(candidate, owners)
        label = self._label(candidate)
        if not label and self.options.keep_incomplete:
            label = None
        if label is not None and label not in labels:
            where = self._table_place(candidate, "label") if self.options.label_source == "table" else ""
            raise RejectedSample(
                f"its label {label!r}{where} is none of data.options.labels ({', '.join(labels)})"
                if label
                else f"it has no label{where}"
            )
        return RawItem(
            sample_id=_sample_id(candidate.file),
            path=shown_path(self._root, candidate.file),
            mask_paths=tuple(shown_path(self._root, mask) for mask in candidate.masks),
            key=candidate.patterns,
            label=label,
            group=self._value(candidate, "group", self.options.group_pattern),
            split=self._split(candidate),
        )

    def _check_masks(self, candidate: Candidate, owners: dict[str, list[str]]) -> None:
        masks = candidate.masks
        if not masks and self.options.keep_incomplete:
            return
        if not masks:
            raise RejectedSample(f"no mask file fits data.options.masks={self.options.masks or '{mask}'!r}")
        if candidate.file in masks:
            raise RejectedSample("data.options.masks fits the image itself")
        by_class = len(self.options.mask_patterns) > 1
        for number, pattern in enumerate(self.options.mask_patterns):
            fitting = [mask for mask, of in zip(masks, candidate.patterns, strict=True) if of == number]
            if len(fitting) > 1 and "{" in pattern and not has_wildcards(pattern):
                raise RejectedSample(
                    f"{len(fitting)} mask files look like {pattern!r} ({', '.join(map(ascii, fitting[:2]))}); rename one of them"
                )
        if len(set(masks)) < len(masks):
            twice = next(mask for mask in masks if masks.count(mask) > 1)
            raise RejectedSample(f"mask {twice} fits several classes; make data.options.masks tell them apart")
        if len(masks) > 1 and len(self.options.mask_classes) > 2 and not by_class:
            raise RejectedSample(
                f"{len(masks)} label maps fit this image ({', '.join(masks[:3])}); maps of several classes are not united"
            )
        for mask in masks:
            others = [file for file in owners[mask] if file != candidate.file]
            if others and "mask" not in candidate.row:  # a table may give one mask to two images, a pattern may not
                raise RejectedSample(
                    f"mask {mask} also fits {others[0]}; make data.options.masks or .images tell them apart"
                )

    def _label(self, candidate: Candidate) -> str | None:
        """Return the class of an image in the spelling of the options; empty if it is missing."""
        source = self.options.label_source
        if source is None:
            return None
        if source == "pattern":
            named = _group_of(str(self.options.label_pattern), "label", candidate.file) or ""
        else:
            named = candidate.row["label"] if source == "table" else placeholder_values(candidate.file)[source]
        found = canonical(named)
        labels = self.options.labels or ()
        alike = [label for label in labels if comparable(label) == comparable(found)]
        return alike[0] if found not in labels and len(alike) == 1 else found

    def _split(self, candidate: Candidate) -> str | None:
        value = self._value(candidate, "split", self.options.split_pattern)
        if value is not None and comparable(value) not in SPLIT_NAMES:
            where = "" if self.options.split_pattern else self._table_place(candidate, "split")
            raise RejectedSample(f"unknown split {value!r}{where}; known: {', '.join(SPLIT_NAMES)}")
        return None if value is None else SPLIT_NAMES[comparable(value)]

    def _table_place(self, candidate: Candidate, meaning: str) -> str:
        """Return the location of a value in the table as text."""
        return f" in row {candidate.row.number}, column {self.options.columns[meaning]!r} of {self.options.table}"

    def _value(self, candidate: Candidate, meaning: str, pattern: str | None) -> str | None:
        """Return the value from a column or a regular expression on the path, or None without
        either.

        Raises:
            RejectedSample: there is no value for this image.
        """
        if pattern is not None:
            value = _group_of(pattern, meaning, candidate.file)
            source = f"data.options.{meaning}_pattern={pattern!r} finds"
        elif meaning in candidate.row:
            value = candidate.row[meaning]
            source = f"row {candidate.row.number} of {self.options.table}: column {self.options.columns[meaning]!r} has"
        else:
            return None
        if not value:
            raise RejectedSample(f"{source} no {meaning} for it")
        return value


def _group_of(pattern: str, meaning: str, file: str) -> str | None:
    """Return the group of a regular expression that is named after a meaning, or else its first one."""
    found = re.search(pattern, file)
    return found[meaning if meaning in found.re.groupindex else 1] if found else None


def _sample_id(file: str) -> str:
    """Return a portable id, with a digest if the path has other characters."""
    name = str(PurePosixPath(file).with_suffix(""))
    portable = re.sub(r"[^A-Za-z0-9_.]+", "-", as_seen(name)).strip("-.")
    if portable == name.replace("/", "-"):
        return portable
    return f"{portable}-{value_digest(as_seen(file))[:8]}".lstrip("-")


def _templates(modality: str, with_label: bool, with_masks: bool) -> tuple[str, ...]:
    """Return generic prompt templates."""
    image = "{modality}" if modality.endswith("image") else "{modality} image"
    if with_label:
        plain = (
            f"{image}, {{label}}",
            "{label}, {modality}",
            "{modality} showing {label}",
            "{modality}: {label}",
        )
        masked = (
            "{modality} of {label}, {size} {shape} {mask_classes}, {place}",
            "{label} in {modality}, {mask_classes}, {size}, {place}",
        )
    else:
        plain = ("{modality}", image, "an image of {modality}", f"one {image}")
        masked = (
            "{modality} with {mask_classes}, {size}, {shape}, {place}",
            "{size} {shape} {mask_classes} in {modality}, {place}",
        )
    return tuple(dict.fromkeys(plain + masked if with_masks else plain))
