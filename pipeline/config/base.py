"""What every section of the configuration is built on: strict values, names of plug-ins, and the types that several sections share."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from maskloom.pipeline.config.bounds import (
    Side,
    unbounded_number,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NOTHING_TO_DROP = "{name}=false takes out an inherited entry, and none of this name is inherited"
MAX_NAME = 128  # file systems end at 255 bytes, and names get suffixes
PluginName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=MAX_NAME)]
"""File name of a plug-in without its ending: it names folders of the run as well, so it must not lead out of it."""


def _as_height_width(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Size = Annotated[tuple[Side, Side], BeforeValidator(_as_height_width)]
"""(height, width) in pixels; one number means a square."""


def _as_precision(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads an unquoted `no` as false


Precision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_as_precision)]
"""Of the computation; accelerate's names."""


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of, those of a union and of `Annotated` too."""
    return {annotation}.union(
        *(_kinds(part) for part in get_args(annotation) if isinstance(part, type) or get_args(part))
    )


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, numbers are finite and bounded, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, values: Any) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for 1."""
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            kinds = _kinds(field.annotation)
            if isinstance(values.get(name), bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{name}={values[name]}: a flag where a number belongs")
        return values

    @model_validator(mode="after")
    def _numbers_are_bounded(self) -> Self:
        for key, value in self:
            if (number := unbounded_number(value)) is not None:
                raise ValueError(f"{key}: {number:.3g} is larger than anything that can be computed with here")
        return self


def plugin_options(*defaults: str) -> BeforeValidator:
    """Return what fills in empty options, and takes out of the `defaults` what is `false` where nothing else is named."""

    def entries(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        dropped = [name for name, options in value.items() if options is False]
        unknown = [name for name in dropped if name not in defaults or len(dropped) < len(value)]
        if unknown:
            raise ValueError(NOTHING_TO_DROP.format(name=unknown[0]))
        if dropped:
            return {name: {} for name in defaults if name not in dropped}
        return {name: {} if options is None else options for name, options in value.items()}

    return BeforeValidator(entries)


Plugins = dict[PluginName, dict[str, Any]]
"""Options by plug-in: file name -> its own options."""
