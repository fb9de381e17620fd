"""The options of the dataset `folder`: where to find images, masks, classes, patients and splits.

Errors name the key of the option.
"""

import re
import string
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from maskloom.data_prep.adapter import Options
from maskloom.data_prep.processing.label_maps import BACKGROUND, MAX_CLASSES, Colour, MaskValues, colour, label_map
from maskloom.data_prep.readers.file_names import canonical, comparable
from maskloom.data_prep.readers.file_patterns import check_pattern

MASK_WORDS = ("size", "place", "shape", "mask_classes")
PATH_PLACEHOLDERS = ("stem", "parent", "grandparent", "folder")
COLUMNS = ("image", "mask", "label", "group", "split")


class FolderOptions(Options):
    """Layout of a folder of images, and meaning of its masks."""

    modality: str = Field(description="name of the imaging method in prompts, such as `breast ultrasound`")
    channels: Literal[1, 3] = Field(1, description="1: grey, 3: colour")
    images: str | None = Field(
        None,
        description="pattern of the images, default `images/**/*`; with a table, the path of its {image}, default `{image}`",
    )
    masks: str | dict[str, str] | None = Field(
        None,
        description="pattern of an image's masks over {stem} (its name without ending), {parent} and {grandparent} (names of its folders),"
        " {folder} (path of its folder) and, with a table, {mask}; without placeholders: the files of the same stem; or, where each class has"
        " black-and-white files of its own, a mapping from class to pattern; null: no masks",
    )
    table: str | None = Field(None, description="CSV or XLSX file that lists the images, relative to data.raw_dir")
    image_column: str | None = Field(None, description="column of the image's path")
    mask_column: str | None = Field(None, description="column of the mask's path")
    label_column: str | None = Field(None, description="column of the class")
    group_column: str | None = Field(None, description="column of the patient; all images of a patient go to one split")
    split_column: str | None = Field(None, description="column of the split: train, val, test and the like")
    label_from: Literal["parent", "grandparent", "table"] | None = Field(
        None, description="source of the class: the name of the image's folder, of the folder above, or label_column"
    )
    label_pattern: str | None = Field(
        None,
        description="regular expression on an image's path below raw_dir; its group 1 (or `label`) is the class",
    )
    labels: tuple[str, ...] | None = Field(
        None, description="class names in order; images of other classes are left out; null: all classes found, sorted"
    )
    group_pattern: str | None = Field(
        None,
        description="regular expression on an image's path below raw_dir; its group 1 (or `group`) is the patient",
    )
    split_pattern: str | None = Field(
        None,
        description="regular expression on that path; its group 1 (or `split`) is the split: train, val, test and the like",
    )
    mask_values: MaskValues | None = Field(
        None,
        description="class of each mask value (0: background, 128: liver) or colour ('#ff0000': tumour, '0,255,0': liver);"
        " null: black, and one bright colour that is a lesion",
    )
    keep_incomplete: bool = Field(
        False, description="keep images without a mask file or without a class; false: leave them out"
    )
    palette: dict[str, str] | None = Field(
        None, description="colour of each foreground class in the conditioning image; null: default colours"
    )
    prompts: tuple[str, ...] | None = Field(
        None,
        description="templates over {modality}, {label}, {size}, {place}, {shape}, {mask_classes}; null: general ones",
    )
    licence: str = Field("not stated (the user's own data)", min_length=1)
    citation: str = Field("not stated (the user's own data)", min_length=1)

    @property
    def image_pattern(self) -> str:
        """The pattern of the images."""
        return self.images or ("{image}" if self.table else "images/**/*")

    @property
    def mask_patterns(self) -> tuple[str, ...]:
        """The patterns of the masks: one, or one per class; only if `has_masks`."""
        return tuple(self.masks.values()) if isinstance(self.masks, dict) else (self.masks or "{mask}",)

    @property
    def has_masks(self) -> bool:
        """Whether the images have masks."""
        return self.masks is not None or self.mask_column is not None

    @property
    def mask_classes(self) -> tuple[str, ...]:
        """The name of each mask index."""
        if isinstance(self.masks, dict):
            return (BACKGROUND, *self.masks)
        return label_map(self.mask_values).classes if self.mask_values else (BACKGROUND, "lesion")

    @property
    def colours(self) -> tuple[Colour, ...] | None:
        """The palette by mask index, or None if it is not given."""
        palette = self.palette
        return None if palette is None else ((0, 0, 0), *(colour(palette[name]) for name in self.mask_classes[1:]))

    @property
    def label_source(self) -> Literal["parent", "grandparent", "table", "pattern"] | None:
        """The source of the classes: `label_from`, or what `label_column` or `label_pattern` names."""
        return self.label_from or ("table" if self.label_column else "pattern" if self.label_pattern else None)

    @property
    def label_key(self) -> str:
        """The key that names the source of the classes."""
        return {"table": "label_column", "pattern": "label_pattern"}.get(self.label_source or "", "label_from")

    @property
    def columns(self) -> dict[str, str]:
        """The configured columns by role."""
        named = {meaning: getattr(self, f"{meaning}_column") for meaning in COLUMNS}
        return {meaning: column for meaning, column in named.items() if column}

    @field_validator("modality")
    @classmethod
    def _modality_is_said(cls, modality: str) -> str:
        if modality.strip() in ("", "TODO"):
            raise ValueError("say what the images are, in the words of a prompt, such as breast ultrasound")
        return modality.strip()

    @field_validator("table")
    @classmethod
    def _table_is_a_path(cls, table: str | None) -> str | None:
        if table is not None:
            check_pattern(table, ())
        return table

    @field_validator("label_pattern", "group_pattern", "split_pattern")
    @classmethod
    def _pattern_has_a_group(cls, pattern: str | None, info: ValidationInfo) -> str | None:
        if pattern is None:
            return None
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        if not compiled.groups:
            meaning = str(info.field_name).removesuffix("_pattern")
            raise ValueError(f"put the part that is the {meaning} in parentheses, as in '^([^/]+)/'")
        return pattern

    @field_validator("masks", mode="before")
    @classmethod
    def _masks_are_patterns(cls, masks: Any) -> Any:
        if masks is None or isinstance(masks, str):
            return masks
        if (
            not masks
            or not isinstance(masks, dict)
            or not all(isinstance(text, str) and text.strip() for pair in masks.items() for text in pair)
        ):
            raise ValueError(
                "give a pattern, or a mapping from class to pattern, such as {disc: 'masks/{stem}_disc.png'}"
            )
        named = {canonical(name): pattern for name, pattern in masks.items()}
        if comparable(BACKGROUND) in map(comparable, named) or len(set(map(comparable, named))) < len(masks):
            raise ValueError(f"name each class once, and not {BACKGROUND}, which is where no mask is white")
        if len(named) >= MAX_CLASSES:
            raise ValueError(f"names {len(named)} classes; at most {MAX_CLASSES - 1} fit a mask")
        return named

    @field_validator("mask_values", "palette", mode="before")
    @classmethod
    def _names_are_canonical(cls, named: Any, info: ValidationInfo) -> Any:
        """Normalise class names, so that names that look the same are one class."""
        if not isinstance(named, dict):
            return named
        if info.field_name == "palette":
            return {canonical(key) if isinstance(key, str) else key: value for key, value in named.items()}
        named = {key: canonical(value) if isinstance(value, str) else value for key, value in named.items()}
        names = {name for name in named.values() if isinstance(name, str)}
        if clash := case_clash(names):
            raise ValueError(f"{clash}; write them in one way, or give them names that differ in more")
        return named

    @field_validator("labels")
    @classmethod
    def _labels_are_a_list(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        labels = None if labels is None else tuple(map(canonical, labels))
        if labels is not None and (not labels or not all(labels) or len(set(labels)) < len(labels)):
            raise ValueError("name each class once")
        return labels

    @field_validator("prompts")
    @classmethod
    def _prompts_are_templates(cls, prompts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for prompt in prompts or ():
            for name in _placeholders(prompt):
                if name not in ("modality", "label", *MASK_WORDS):
                    raise ValueError(
                        f"{prompt!r}: {{{name}}} is none of {{modality}}, {{label}}, {{{'}, {'.join(MASK_WORDS)}}}"
                    )
        if prompts is not None and all(_placeholders(prompt) & set(MASK_WORDS) for prompt in prompts):
            raise ValueError(
                f"at least one prompt must do without {{{'}, {'.join(MASK_WORDS)}}}, for images whose mask is empty"
            )
        return prompts

    @model_validator(mode="after")
    def _keys_suit_each_other(self) -> "FolderOptions":
        self._check_table()
        self._check_patterns()
        self._check_classes()
        return self

    def _check_table(self) -> None:
        columns = self.columns
        if self.table is None and columns:
            raise ValueError(
                f"{next(iter(columns))}_column={next(iter(columns.values()))!r} needs table: the file that has this column"
            )
        if self.table is not None and "image" not in columns:
            raise ValueError(f"image_column is missing: the column of {self.table} that names the image files")
        for meaning in ("group", "split"):
            if meaning in columns and getattr(self, f"{meaning}_pattern"):
                raise ValueError(f"{meaning}_column and {meaning}_pattern are both given; use one of them")
        if self.label_from == "table" and "label" not in columns:
            raise ValueError("label_from='table' needs label_column")
        if self.label_from in ("parent", "grandparent") and "label" in columns:
            raise ValueError(f"label_from={self.label_from!r} and label_column are both given; use one of them")
        if self.label_pattern and self.label_source != "pattern":
            raise ValueError(f"label_pattern and {self.label_key} are both given; use one of them")

    def _check_patterns(self) -> None:
        image_placeholders = ("image",) if self.table else ()
        mask_placeholders = (*PATH_PLACEHOLDERS, *(("mask",) if self.mask_column else ()))
        masks = (
            {f"masks.{name}": pattern for name, pattern in self.masks.items()} if isinstance(self.masks, dict) else {}
        )
        if isinstance(self.masks, str):
            masks = {"masks": self.masks}
        for key, pattern in {"images": self.image_pattern, **masks}.items():
            try:
                check_pattern(pattern, image_placeholders if key == "images" else mask_placeholders)
            except ValueError as error:
                raise ValueError(f"{key}={pattern!r}: {error}") from None
        if self.table and "{image}" not in self.image_pattern:
            raise ValueError(
                f"images={self.images!r}: with a table, say with {{image}} where its images are, as in 'images/{{image}}.png'"
            )
        if isinstance(self.masks, dict) and self.mask_column:
            raise ValueError("masks by class and mask_column are both given; use one of them")
        if self.masks and self.mask_column and "{mask}" not in self.masks:
            raise ValueError(
                f"masks={self.masks!r}: with mask_column, say with {{mask}} where its masks are, or leave one of them out"
            )

    def _check_classes(self) -> None:
        if self.labels is not None and self.label_source is None:
            raise ValueError(
                "labels are given, but not where an image's class is found: set label_from or label_column, or label_pattern"
            )
        if any("label" in _placeholders(prompt) for prompt in self.prompts or ()) and self.label_source is None:
            raise ValueError(
                "prompts use {label}, but the images have no classes: set label_from or label_column, or label_pattern"
            )
        if isinstance(self.masks, dict) and self.mask_values:
            raise ValueError("masks by class are black and white, and mask_values is given; leave it out")
        if not self.has_masks and (self.mask_values or self.palette):
            raise ValueError(
                f"{'mask_values' if self.mask_values else 'palette'} is given, but no masks: set masks or mask_column"
            )
        if self.palette is not None:
            self._check_palette(self.palette)

    def _check_palette(self, palette: dict[str, str]) -> None:
        foreground = set(self.mask_classes[1:])
        if set(palette) != foreground:
            raise ValueError(f"palette names {', '.join(palette)}; it must name {', '.join(self.mask_classes[1:])}")
        try:
            colours = {colour(text) for text in palette.values()}
        except ValueError as error:
            raise ValueError(f"palette: {error}") from None
        if len(colours) < len(foreground) or (0, 0, 0) in colours:
            raise ValueError("palette: the colours must differ from each other and from black, the background's")


def case_clash(names: Iterable[str]) -> str:
    """Return a sentence about two names that differ only in letter case or spaces; else empty."""
    first: dict[str, str] = {}
    for name in sorted(names):
        other = first.setdefault(comparable(name), name)
        if other != name:
            return f"the classes {other!r} and {name!r} differ in letter case only"
    return ""


def _placeholders(prompt: str) -> set[str]:
    """Return the names of a template's placeholders.

    Raises:
        ValueError: the template is malformed.
    """
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"{prompt!r} is not a template ({error})") from None
    return {name for _, name, _, _ in parts if name is not None}
