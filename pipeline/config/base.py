"""The base class of all configuration sections, and the types that several sections share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from maskloom.pipeline.config.bounds import Side, unbounded_number

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NOTHING_TO_DROP = "{name}=false removes an inherited entry, but no entry of this name is inherited"
MAX_NAME = 128  # file systems allow 255 bytes, and names get suffixes
PluginName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=MAX_NAME)]
"""File name of a plug-in without its extension. It also names folders of the run, so it must not
contain a path."""

Size = Annotated[tuple[Side, Side], BeforeValidator(lambda value: (value, value) if isinstance(value, int) else value)]
"""(height, width) in pixels; a single number means a square."""


def with_home(path: Path) -> Path:
    """Return a path with the home folder in place of a leading `~`, which shells leave in `key=~/folder`."""
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: the name begins with ~
        return path


UserPath = Annotated[Path, AfterValidator(with_home)]
"""A path as users write it."""

# YAML reads an unquoted `no` as false.
Precision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)]
"""Mixed precision, with accelerate's names."""


@dataclass(frozen=True)
class Resumable:
    """Marks a setting that may differ when a training is resumed.

    Such a setting changes how the training runs, not what it computes. Every other setting is part
    of the checkpoint's identity. A subclass that only changes the default keeps the mark.

    Attributes:
        with_early_stopping: false if the setting decides which weights early stopping keeps; it may
            then differ only in a training without early stopping.
    """

    with_early_stopping: bool = True


RESUMABLE = Resumable()
RESUMABLE_UNLESS_STOPPED_EARLY = Resumable(with_early_stopping=False)


def _kinds(annotation: Any) -> set[Any]:
    """Return the types in an annotation, including the members of unions and of `Annotated`."""
    return {annotation}.union(
        *(_kinds(part) for part in get_args(annotation) if isinstance(part, type) or get_args(part))
    )


class Section(BaseModel):
    """Base class of configuration sections.

    Unknown keys are errors, numbers must be finite and bounded, and instances are immutable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, values: Any) -> Any:
        """Reject booleans in place of numbers.

        YAML reads `yes` and `on` as true, which pydantic would accept as 1.
        """
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            kinds = _kinds(field.annotation)
            if isinstance(values.get(name), bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{name}={values[name]}: give a number, not true or false")
        return values

    @model_validator(mode="after")
    def _numbers_are_bounded(self) -> Self:
        for key, value in self:
            if (number := unbounded_number(value)) is not None:
                raise ValueError(f"{key}: {number:.3g} is larger than the largest supported number")
        return self


class DigestedSection(Section):
    """A section whose values are parts of digests: keys without effect are left out of what is written.

    A new key therefore leaves the digests, and so the answers, of settings that do not use it.
    """

    def unused_keys(self) -> set[str]:
        """Return the keys that have no effect with these values; subclasses add to those of `super()`."""
        return set()

    @model_serializer(mode="wrap")
    def _without_unused_keys(self, values_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values, unused = values_of(self), self.unused_keys()
        return {name: value for name, value in values.items() if name not in unused}


def plugin_options(*defaults: str) -> BeforeValidator:
    """Return a validator for named entries and their options.

    An entry without options gets empty ones, and an entry with the value `false` is removed. If all
    entries are `false`, they are removed from the default entries.

    Args:
        defaults: names of the default entries.
    """

    def entries(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        dropped = [name for name, options in value.items() if options is False]
        unknown = [name for name in dropped if name not in defaults]
        if unknown:
            raise ValueError(NOTHING_TO_DROP.format(name=unknown[0]))
        if dropped and len(dropped) == len(value):
            return {name: {} for name in defaults if name not in dropped}
        return {name: {} if options is None else options for name, options in value.items() if name not in dropped}

    return BeforeValidator(entries)


Plugins = dict[PluginName, dict[str, Any]]
"""Options of plug-ins: file name -> options."""
