"""Reads configuration files: YAML, `extends`, overrides, and errors that name the key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from pipeline.config import ExperimentConfig
from pipeline.errors import MaskLoomError, nearest_name, one_line

Model = TypeVar("Model", bound=BaseModel)


def load_experiment(path: Path, overrides: list[str]) -> ExperimentConfig:
    """Return the checked configuration of an experiment.

    Args:
        path: a YAML file; `extends: OTHER.yaml` (relative to it) is read first.
        overrides: `key.subkey=value` strings, applied last.

    Raises:
        MaskLoomError: the file is missing or not YAML; a key is unknown (names the nearest); a value does not fit.
    """
    return load_config(path, overrides, ExperimentConfig)


def load_config(path: Path, overrides: list[str], model: type[Model]) -> Model:
    """Return `model` filled from a YAML file and overrides. See `load_experiment`."""
    return validated(read_values(path, overrides), model, str(path))


def read_values(path: Path, overrides: list[str], between: Mapping[str, Any] | None = None) -> Any:
    """Return what a YAML file, the files that it extends and overrides say together, unchecked.

    Args:
        path: see `load_experiment`.
        overrides: likewise.
        between: values that come over the file's and under the overrides.

    Raises:
        MaskLoomError: the file is missing or not YAML, or the parts do not fit together.
    """
    file, changes = _with_parents(path, ()), _from_overrides(overrides)
    try:
        return OmegaConf.to_container(OmegaConf.merge(file, dict(between or {}), changes), resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:  # such as a list where the file has a mapping
        changed = f" with {' '.join(overrides)}" if overrides else ""
        raise MaskLoomError(f"{path}{changed}: {one_line(error)}") from None


def validated(values: Any, model: type[Model], where: str) -> Model:
    """Return `model` filled with `values`.

    Raises:
        MaskLoomError: names `where`, the key, the value, and for an unknown key the nearest known one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise MaskLoomError(f"{where}: {_first_problem(error, model)}") from None


def _with_parents(path: Path, children: tuple[Path, ...]) -> Any:
    """Return the file merged over the files that it extends, as an OmegaConf mapping."""
    if path.resolve() in children:
        raise MaskLoomError(f"{path}: `extends` runs in a circle: {' -> '.join(p.name for p in (*children, path))}")
    if not path.is_file():
        raise MaskLoomError(f"{path}: no such configuration file; see configs/ for those that exist")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise MaskLoomError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, DictConfig):
        raise MaskLoomError(f"{path}: must hold a mapping of keys to values")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return OmegaConf.merge(_with_parents(path.parent / parent, (*children, path.resolve())), values)


def _from_overrides(overrides: list[str]) -> Any:
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise MaskLoomError(f"override {override!r}: write key=value, for example train.learning_rate=1e-5")
    try:
        return OmegaConf.from_dotlist(overrides)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise MaskLoomError(f"override {' '.join(overrides)}: {one_line(error)}") from None


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line for the first of pydantic's errors, and how many more there are."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return (
            f"unknown key {key!r}: {nearest_name(str(first['loc'][-1]), _known_keys(model, first['loc'][:-1]))}{more}"
        )
    if first["type"] == "missing":
        return f"{key}: this key is required{more}"
    value = first["input"]
    shown = f"={value!r}" if key and not isinstance(value, dict) else ""
    return f"{key}{shown}: {first['msg'].removeprefix('Value error, ')}{more}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the model knows at a nested location."""
    for part in location:
        field = model.model_fields.get(str(part))
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
