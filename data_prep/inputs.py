"""What the dataset is made from: the places and digests of the inputs, and the settings.

The stage is skipped if digests and settings are those of the dataset that it would write.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloom.data_prep.sources import Source
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import file_digest


def input_places(sources: Sequence[Source], stain_reference: Path | None) -> dict[str, Path | None]:
    """Return the files and folders that are read, by the key that names them."""
    places = {f"{source.section}.raw_dir": source.adapter.raw_dir for source in sources}
    return {**places, "data.stain.reference": stain_reference}


def input_digests(sources: Sequence[Source], stain_reference: Path | None) -> dict[str, str]:
    """Return a digest of each input.

    Raises:
        MaskLoomError: the stain reference does not exist.
    """
    digests = {source.split or "raw": source.adapter.fingerprint() for source in sources}
    if stain_reference is not None:
        if not stain_reference.is_file():
            raise MaskLoomError(
                f"data.stain.reference={stain_reference}: no such file; give an image of the stain to imitate"
            )
        digests["stain_reference"] = file_digest(stain_reference)
    return digests


def dataset_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return the settings that the dataset depends on.

    Not the location of the raw files, whose content has a fingerprint, nor the number of workers.
    """
    places = {"raw_dir": True, "num_workers": True, "stain": {"reference"}}
    data = config.data.model_dump(mode="json", exclude=places)  # type: ignore[arg-type]
    data["external"] = {name: section.options for name, section in config.data.external.items()}
    if not config.data.buckets:  # keeps the key of datasets of a single size
        del data["buckets"]
    data["options"] = {name: _ordered(value) for name, value in data["options"].items()}
    return {"data": data, "seed": config.seed}


def _ordered(option: Any) -> Any:
    """Return an option whose digest depends on the order of its keys, the order of mask classes."""
    if not isinstance(option, dict) or list(map(str, option)) == sorted(map(str, option)):
        return option
    return [[str(key), value] for key, value in option.items()]
