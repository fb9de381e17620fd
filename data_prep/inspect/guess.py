"""The section `data` that reads a raw folder, as far as its files tell."""

from pathlib import Path
from typing import Any

from maskloom.data_prep.adapter import DatasetAdapter
from maskloom.data_prep.inspect.advice import fitting_configuration
from maskloom.data_prep.inspect.content import IMAGES, kinds_of
from maskloom.data_prep.inspect.layout import guessed_options
from maskloom.data_prep.inspect.observation import listing_of, sample_of
from maskloom.data_prep.inspect.raw_tree import tables_of, tree_of
from maskloom.data_prep.inspect.yaml_text import experiment_name
from maskloom.data_prep.readers.file_names import is_text, printable
from maskloom.data_prep.sources import PACKAGE
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.config.loading import read_values, validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import load_plugin, plugin_names

MODALITY = "medical image"


def guessed_data(raw_dir: Path) -> dict[str, Any]:
    """Return `dataset`, `conditioning` and `options` of a folder: of the dataset that it is, or else guessed for `folder`.

    Raises:
        MaskLoomError: the folder is missing, unreadable or empty, holds several datasets, or no image that is read.
    """
    check_readable(raw_dir)
    names, _ = recognised(raw_dir)
    for name in names:
        adapter: type[DatasetAdapter] = load_plugin(PACKAGE, name, "dataset").Adapter
        sets = adapter.needed_options(raw_dir)
        if len(sets) > 1:
            shown = "; ".join(", ".join(f"options.{key}={value}" for key, value in one.items()) for one in sets[:3])
            raise MaskLoomError(
                f"{raw_dir}: holds {len(sets)} datasets of the kind {name}; choose one: {shown} (with dataset={name})"
            )
        if (opened := _usable(adapter, raw_dir, sets[0])) is not None:
            masks = len(opened.info().mask_classes) > 1
            return {"dataset": name, "conditioning": "mask" if masks else "edges", "options": sets[0]}
    tree = tree_of(raw_dir)
    kinds = kinds_of(raw_dir, tree.files)
    pictures = tree.without([file for file, kind in kinds.items() if kind not in IMAGES])
    guess = guessed_options(raw_dir, pictures, tables_of(raw_dir, tree)[0])
    if guess is None:
        raise MaskLoomError(
            f"{raw_dir}: no image of a format that is read (PNG, JPEG, BMP, TIFF, npy); give the folder that holds the images"
        )
    return {
        "dataset": "folder",
        "conditioning": "mask" if {"masks", "mask_column"} & guess.options.keys() else "edges",
        "options": {"modality": MODALITY, **guess.options},
    }


def guessed_configuration(raw_dir: Path, samples: int) -> dict[str, Any]:
    """Return a configuration of all stages for a folder, which extends the one that ships for its dataset.

    Args:
        raw_dir: the folder.
        samples: largest number of images to decode, for the size of the images of an unknown dataset.

    Raises:
        MaskLoomError: as for `guessed_data`.
    """
    data = guessed_data(raw_dir)
    if data["dataset"] == "folder":
        data |= fitting_settings(raw_dir, data["options"], samples)
    preset = Path(f"configs/{data['dataset']}.yaml")
    shipped = read_values(preset, [])
    guessed = {"dataset": data["dataset"], "raw_dir": str(raw_dir.resolve()), **data}
    if data["conditioning"] == "edges" and shipped["data"].get("conditioning") in ("foreground", "image"):
        del guessed["conditioning"]  # needs no mask either, and suits the dataset
    values = {"extends": str(preset), "experiment": experiment_name(raw_dir), "data": guessed}
    if data["conditioning"] == "edges" and (shipped.get("train") or {}).get("adherence") is not None:
        values["train"] = {"adherence": None}  # which needs masks
    return values


def fitting_settings(raw_dir: Path, options: dict[str, Any], samples: int) -> dict[str, Any]:
    """Return the keys of `data` that a sample of a folder's images decides, as the page of `inspect` prints them.

    Args:
        raw_dir: a folder of the dataset `folder`.
        options: what was guessed of it.
        samples: largest number of images to decode.
    """
    adapter: type[DatasetAdapter] = load_plugin(PACKAGE, "folder", "dataset").Adapter
    data = DataConfig(dataset="folder")
    try:
        opened = adapter(raw_dir, validated(options, adapter.Options, "data.options"))
        data = fitting_configuration(sample_of(opened, opened.info(), listing_of(opened), samples))
    except MaskLoomError:
        pass  # `prepare` says what is wrong with the folder, and the page of `inspect` keeps these values too
    return {"image_size": data.image_size[0], "conditioning": data.conditioning}


def recognised(raw_dir: Path) -> tuple[list[str], dict[str, str]]:
    """Return the datasets whose layout matches a folder, most specific first, and why others were not checked."""
    adapters: dict[str, type[DatasetAdapter]] = {}
    unchecked = {}
    for name in plugin_names(PACKAGE):
        try:
            adapter = load_plugin(PACKAGE, name, "dataset").Adapter
            if adapter.recognises(raw_dir):
                adapters[name] = adapter
        except OSError as error:
            unchecked[name] = f"{error.strerror}: {error.filename}"
        except MaskLoomError as error:
            unchecked[name] = str(error)
    # Adapters of a file format (named FORMAT_folder) match any such files; adapters of a dataset
    # are more specific.
    order = {name: (not one.states_layout, name.endswith("_folder"), name) for name, one in adapters.items()}
    return sorted(order, key=lambda name: order[name]), unchecked


def check_readable(raw_dir: Path) -> None:
    """Check that a raw folder can be listed and holds something.

    Raises:
        MaskLoomError: it is missing, not a folder, unreadable or empty.
    """
    if not is_text(str(raw_dir)):
        raise MaskLoomError(f"{printable(str(raw_dir))}: a name in this path is not valid UTF-8; rename it")
    if not raw_dir.is_dir():
        what = "is a file; give the folder that holds it" if raw_dir.exists() else "no such folder"
        raise MaskLoomError(f"{raw_dir}: {what}")
    try:
        empty = not any(raw_dir.iterdir())
    except OSError as error:
        raise MaskLoomError(f"{raw_dir}: cannot be read ({error.strerror}); fix the permissions") from None
    if empty:
        raise MaskLoomError(f"{raw_dir}: the folder is empty")


def _usable(adapter: type[DatasetAdapter], raw_dir: Path, options: dict[str, Any]) -> DatasetAdapter | None:
    """Return the adapter of a folder if it lists an image; None if the folder only looks like its dataset."""
    try:
        opened = adapter(raw_dir, validated(options, adapter.Options, "data.options"))
        return opened if listing_of(opened).items else None
    except (MaskLoomError, OSError):
        return None
