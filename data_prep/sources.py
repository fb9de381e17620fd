"""The raw datasets of an experiment: the main one, and external ones that become test splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo
from maskloom.data_prep.readers.file_names import printable
from maskloom.pipeline.config.data import DataConfig, ExternalConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.dataset.contract import EXTERNAL_PREFIX
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import load_plugin

PACKAGE = "maskloom.data_prep.datasets"


@dataclass(frozen=True)
class Source:
    """A raw dataset: the main one, or one that becomes an external test split.

    Attributes:
        name: name of the dataset.
        adapter: its adapter.
        info: its description.
        labels: class names of the main dataset; an external dataset must use a subset of them.
        duplicates: which duplicates are searched for; see `DatasetInfo`.
        split: `external_NAME`, or None for the main dataset.
        has_signatures: whether near-duplicates are searched for, within it or against the main
            dataset.
    """

    name: str
    adapter: DatasetAdapter
    info: DatasetInfo
    labels: tuple[str, ...]
    duplicates: str
    split: str | None = None
    has_signatures: bool = False

    @property
    def section(self) -> str:
        """The section of the configuration that sets its `raw_dir` and `options`."""
        return f"data.external.{self.name}" if self.split else "data"

    def holds(self, path: str) -> bool:
        """Whether a path lies in its raw folder."""
        raw_dir = self.adapter.raw_dir
        return raw_dir is not None and Path(printable(path)).is_relative_to(printable(str(raw_dir)))


def open_sources(data: DataConfig) -> tuple[Source, ...]:
    """Return the main dataset and the external ones.

    Raises:
        MaskLoomError: as for `open_adapter`; or the mask classes of an external dataset differ from
            those of the main one, or the dataset lacks what the conditioning needs.
    """
    adapter = open_adapter(data)
    info = adapter.info()
    _check_conditioning(data, info)
    duplicates = data.duplicates or info.duplicates
    main = Source(data.dataset, adapter, info, info.labels, duplicates, has_signatures=duplicates == "near")
    sources = (main, *(_external_source(name, section, main) for name, section in data.external.items()))
    for source in sources:
        # Such a dataset may return values that are no longer in raw units.
        if data.intensity is not None and "window" in source.adapter.Options.model_fields:
            raise MaskLoomError(
                f"data.intensity: {source.name} has its own window on the raw values; set data.intensity=null and "
                f"{source.section}.options.window"
            )
    return sources


def open_adapter(data: DataConfig) -> DatasetAdapter:
    """Return the configured adapter with validated options.

    Raises:
        MaskLoomError: the dataset is unknown, an option is wrong, or the raw folder is missing.
    """
    return load_adapter(data.dataset, data.raw_dir, data.options, "data.options")


def load_adapter(name: str, raw_dir: Path | None, options: dict[str, Any], where: str) -> DatasetAdapter:
    """Return the adapter of a dataset; errors in its options name `where` they are set.

    Raises:
        MaskLoomError: as for `open_adapter`.
    """
    adapter: type[DatasetAdapter] = load_plugin(PACKAGE, name, "dataset").Adapter
    return adapter(raw_dir, validated(options, adapter.Options, where))


def _external_source(name: str, section: ExternalConfig, main: Source) -> Source:
    where = f"data.external.{name}"
    if name == main.name:
        raise MaskLoomError(f"{where}: this is the main dataset; name another one")
    try:
        adapter = load_adapter(name, section.raw_dir, section.options, f"{where}.options")
    except MaskLoomError as error:
        raise MaskLoomError(str(error).replace("data.raw_dir", f"{where}.raw_dir")) from None
    info = adapter.info()
    if info.mask_classes != main.info.mask_classes:
        raise MaskLoomError(
            f"{where}: its mask classes ({', '.join(info.mask_classes)}) are not those of {main.name} "
            f"({', '.join(main.info.mask_classes)}); set {where}=false, or prepare it as a separate experiment"
        )
    near = "near" in (main.duplicates, info.duplicates)
    return Source(name, adapter, info, main.labels, info.duplicates, f"{EXTERNAL_PREFIX}{name}", has_signatures=near)


def _check_conditioning(data: DataConfig, info: DatasetInfo) -> None:
    if data.conditioning in ("mask", "both") and len(info.mask_classes) < 2:
        raise MaskLoomError(
            f"data.conditioning={data.conditioning} needs masks and {data.dataset} has none; "
            "set data.conditioning=edges or data.conditioning=foreground"
        )
    if data.conditioning == "image" and info.paired_image is None:
        raise MaskLoomError(
            f"data.conditioning=image needs a second image of every sample and {data.dataset} has none; "
            "set data.conditioning=mask or data.conditioning=edges"
        )


def shown_path(path: str, sources: Sequence[Source]) -> str:
    """Return a path relative to its raw folder, so that the published ledger has no local path."""
    for source in sources:
        if source.holds(path):
            relative = str(Path(printable(path)).relative_to(printable(str(source.adapter.raw_dir))))
            return f"{source.name}/{relative}" if source.split else relative
    return printable(path)
