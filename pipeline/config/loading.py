"""Load configuration files: YAML -> `extends` -> command-line overrides -> validated models."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.yaml_reading import NotYaml, parsed_yaml, plain_text, read_yaml
from maskloom.pipeline.errors import MaskLoomError, SeveralMistakes, nearest_name, one_line
from maskloom.pipeline.files.shipped import shipped, shipped_names, shipped_only

Model = TypeVar("Model", bound=BaseModel)

DROPPABLE = frozenset(
    {("data", "external"), ("baselines",), ("generate", "generators"), ("evaluate", "metrics"), ("sweep", "variants")}
)
"""Sections of named entries, in which the value `false` removes an inherited entry."""

MAX_PARENTS = 50
MOST_PROBLEMS = 5  # of one configuration, in messages
MOST_KEYS = 5  # that are listed where a key is unknown
MAX_SHOWN = 100  # characters of a value or key in a message
TEXT = re.compile(r"\s*[|>]|[^'\"\s].*\s#|#")  # YAML would read a block scalar, or cut the value off
QUOTES = "in quotes a value is text: {key}='\"…\"'"


def load_experiment(path: Path, overrides: list[str]) -> ExperimentConfig:
    """Return the validated configuration of an experiment.

    Args:
        path: a YAML file, or the name of a shipped one, such as `configs/demo.yaml`. The file named
            by its `extends` (relative to it, or shipped) is read first.
        overrides: `key.subkey=value` strings, applied last.

    Raises:
        MaskLoomError: the file is missing or not YAML; it describes a sweep; a key is unknown (the
            error suggests the nearest one); a value is invalid.
    """
    values = read_values(path, overrides)
    if "sweep" in values:
        raise MaskLoomError(
            f"{path}: describes a sweep, not one experiment; use `maskloom sweep --config {path}`, and for one of its "
            "variants the configuration that this writes, RUN/sweep/VARIANT.yaml"
        )
    return validated(values, ExperimentConfig, str(path))


def load_config(path: Path, overrides: list[str], model: type[Model]) -> Model:
    """Return `model` with the values of a file and overrides; see `load_experiment`."""
    return validated(read_values(path, overrides), model, str(path))


def read_values(path: Path, overrides: list[str], between: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the merged values of a file, of those that it extends, and of overrides, unvalidated.

    Args:
        path: see `load_experiment`.
        overrides: see `load_experiment`.
        between: values that override the file's and are overridden by `overrides`.

    Raises:
        MaskLoomError: the file is missing or not YAML, or the parts cannot be merged.
    """
    values = merged(_with_parents(shipped(path), ()), between or {}, str(path))
    for override in overrides:
        values = merged(values, parsed_override(override), f"override {_shown(override)}")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any], where: str, place: tuple[str, ...] = ()) -> Any:
    """Return `values` with `changes` merged in.

    Mappings are merged key by key, anything else is replaced; see `DROPPABLE` for the value
    `false`.

    Args:
        values: nested mappings.
        changes: nested mappings.
        where: source of the changes, for messages.
        place: path of keys to these mappings.

    Raises:
        MaskLoomError: a mapping would replace another kind of value, or a list a mapping.
    """
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        here = (*place, str(key))
        if change is False and place in DROPPABLE and key in result:
            del result[key]
        elif isinstance(change, dict) and isinstance(old, dict):
            result[key] = merged(old, change, where, here)
        elif (isinstance(change, dict) and old is not None) or (isinstance(change, list) and isinstance(old, dict)):
            given, there = _kind(change), _kind(old)
            raise MaskLoomError(
                f"{where}: {_shown('.'.join(here))}: {given} cannot replace {there} ({_shown(repr(old))}); give {there}"
            )
        else:
            result[key] = change
    return result


def validated(values: Any, model: type[Model], where: str) -> Model:
    """Return an instance of `model` with these values.

    Raises:
        SeveralMistakes: keys or values are invalid; it names `where`, each key and value, and
            suggests the nearest known key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [f"{where}: {_problem(one, model)}" for one in error.errors()[:MOST_PROBLEMS]]
        if (left := error.error_count() - MOST_PROBLEMS) > 0:
            problems.append(f"{where}: {left} more problem(s), shown once these are fixed")
        raise SeveralMistakes(problems) from None


def key_names(model: type[BaseModel] = ExperimentConfig, place: str = "") -> list[str]:
    """Return the full names of all keys below a section, such as `train.learning_rate`."""
    names = []
    for key, field in model.model_fields.items():
        names.append(f"{place}{key}")
        if (section := _section(field.annotation)) is not None:
            names += key_names(section, f"{place}{key}.")
    return names


def _with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """Return the merged values of a file and of the files that it extends."""
    if not _is_file(path):
        known = shipped_names("configs", "*.yaml")
        raise MaskLoomError(
            f"{_shown(str(path))}: no such configuration file; {_meant(path, known)}give a path, or one that ships with "
            f"MaskLoom: {', '.join(known)}"
        )
    if path.resolve() in children:
        raise MaskLoomError(f"{path}: `extends` forms a cycle: {' -> '.join(p.name for p in (*children, path))}")
    if len(children) >= MAX_PARENTS:
        raise MaskLoomError(f"{children[0]}: `extends` chains more than {MAX_PARENTS} files; merge some of them")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise MaskLoomError(f"{path}: must contain a mapping of keys to values, not {_kind(values)}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str) or not parent:
        raise MaskLoomError(f"{path}: extends={_shown(repr(parent))}: give the name of one file, or remove this key")
    # Next to this file, otherwise a shipped file, with or without `configs/` before its name.
    beside = path.parent / parent
    candidates = (beside, shipped_only(Path(parent)), shipped_only(Path("configs", parent)))
    extended = next((file for file in candidates if file is not None and _is_file(file)), beside)
    return merged(_with_parents(extended, (*children, path.resolve())), values, str(path))


def _meant(path: Path, known: Sequence[str]) -> str:
    """Return a question that names the nearest configuration beside a missing one, or else the nearest shipped one."""
    try:
        beside = {file.name: str(file) for file in path.parent.glob("*.yaml")}
    except (OSError, ValueError):  # as for `_is_file`
        beside = {}
    names = {Path(name).name: name for name in known} | beside
    near = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"did you mean {names[near[0]]}? Otherwise " if near else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or a symlink forms a loop
        return False


def parsed_override(override: str) -> dict[str, Any]:
    """Return `key.subkey=value` as nested mappings.

    The value is parsed as YAML. Invalid YAML such as `*/images/*.png` is text, as are values that
    YAML would truncate (` #`, `|`).

    Raises:
        MaskLoomError: the override is not of this form, or YAML rejects its value.
    """
    key, sign, text = override.partition("=")
    parts = key.split(".")
    if not sign or override.startswith("-") or not all(part.strip() for part in parts):
        raise MaskLoomError(f"override {_shown(repr(override))}: write key=value, for example train.learning_rate=1e-5")
    value: Any
    try:
        try:
            value = plain_text(text) if TEXT.match(text) else parsed_yaml(text)
        except NotYaml:
            value = plain_text(text)
    except ValueError as error:
        raise MaskLoomError(f"override {_shown(key)}={_shown(text)}: {error}") from None
    for part in reversed(parts):
        value = {part: value}
    return value


def _kind(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else "one value"


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _problem(error: ErrorDetails, model: type[BaseModel]) -> str:
    """Return one error of pydantic as one line."""
    place, kind, value = error["loc"], error["type"], error["input"]
    key = ".".join(_shown(str(part)) for part in place)
    if kind == "extra_forbidden":
        return f"unknown key {key!r}: {nearest_name(str(place[-1]), _known_keys(model, place[:-1]), MOST_KEYS)}"
    if kind == "missing":
        return f"{key}: this key is required"
    shown = f"={_shown(repr(value))}" if key and (not isinstance(value, dict) or "_type" in kind) else ""
    remedy = f"; {QUOTES.format(key=key)}" if kind in ("string_type", "path_type") else ""
    return f"{key}{shown}{': ' if key else ''}{one_line(error['msg']).removeprefix('Value error, ')}{remedy}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the model at a nested location."""
    for part in location:
        field = model.model_fields.get(str(part))
        section = None if field is None else _section(field.annotation)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the model in the annotation of a field, such as `TrainConfig | None`, or None."""
    candidates = (annotation, *get_args(annotation))
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)
