"""Runs over every export format found in `pipeline/dataset/exporters`.

A new one is tested by existing.
"""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.dataset.export import PACKAGE, PROVENANCE_FILE, ExportOptions, export
from maskloom.pipeline.dataset.exporter import DatasetExporter, ExportSource, Options
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import MANIFEST
from maskloom.pipeline.plugins import load_plugin, plugin_names
from tests.tiny_datasets import tiny_description, tiny_samples, write_dataset

pytestmark = pytest.mark.parametrize("name", plugin_names(PACKAGE))
COUNTS = {"train": 6, "validation": 4, "test": 4, "external_other": 2}
EVIL = (
    "../../escaped",
    "/etc/passwd",
    "a/b",
    "..",
    ".hidden",
    "trail.",
    "nul\x00byte",
    "überschall 1",
    "x" * 300,
    "C:\\x",
    "",
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_real(folder: Path, **description: object) -> Contract:
    """Write a dataset with every kind of split."""
    splits = {split: tiny_samples(split, count) for split, count in COUNTS.items()}
    return write_dataset(folder, tiny_description(**description), splits)  # type: ignore[arg-type]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    write_real(tmp_path / "real")
    return tmp_path / "real"


def test_it_declares_what_the_protocol_asks_for(name: str):
    plugin = load_plugin(PACKAGE, name, "format")
    assert issubclass(plugin.Exporter, DatasetExporter)
    assert issubclass(plugin.Exporter.Options, Options)
    assert plugin.__doc__
    assert plugin.Exporter.__doc__


def test_the_same_dataset_gives_the_same_bytes(real: Path, tmp_path: Path, name: str):
    export(real, ExportOptions(name, tmp_path / "one"))
    export(real, ExportOptions(name, tmp_path / "two"))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_every_image_is_there_as_it_was(real: Path, tmp_path: Path, name: str):
    export(real, ExportOptions(name, tmp_path / "out"))
    written = sorted(content for path, content in files_of(tmp_path / "out").items() if path.endswith(".png"))
    for split, count in COUNTS.items():
        for sample in tiny_samples(split, count):
            assert png_bytes(sample.image) in written  # type: ignore[arg-type]


def test_only_the_splits_that_are_asked_for_are_read(real: Path, tmp_path: Path, name: str):
    provenance = export(real, ExportOptions(name, tmp_path / "out", splits=("train",)))
    assert provenance["splits"] == {"train": 6}
    images = [content for path, content in files_of(tmp_path / "out").items() if path.endswith(".png")]
    assert not {png_bytes(sample.image) for sample in tiny_samples("test", 4)} & set(images)  # type: ignore[arg-type]


def test_its_provenance_names_the_dataset_and_its_licence(real: Path, tmp_path: Path, name: str):
    provenance = export(real, ExportOptions(name, tmp_path / "out"))
    text = (tmp_path / "out" / PROVENANCE_FILE).read_text()
    assert json.loads(text) == provenance
    assert provenance["licence"] == "CC0"
    assert provenance["format"] == name
    assert len(provenance["digest"]) == 64
    assert "lesion" in provenance["masks"]
    assert str(tmp_path) not in text


def test_odd_ids_and_class_names_stay_inside(tmp_path: Path, name: str):
    samples = tiny_samples("train", len(EVIL), per_group=1)
    for sample, odd in zip(samples, EVIL, strict=True):
        sample.sample_id = odd
    write_dataset(tmp_path / "real", tiny_description(labels=("../up", "a/b")), {"train": samples})
    before = set(tmp_path.rglob("*"))
    export(tmp_path / "real", ExportOptions(name, tmp_path / "out"))
    assert {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before} == {"out"}
    written = files_of(tmp_path / "out")
    assert sum(png_bytes(sample.image) in written.values() for sample in samples) == len(EVIL)  # type: ignore[arg-type]
    assert all(not part.startswith(".") for path in written if path != MANIFEST for part in Path(path).parts)


def test_colour_images_stay_colour(tmp_path: Path, name: str):
    samples = tiny_samples("train", 2)
    for sample in samples:
        sample.image = np.repeat(np.asarray(sample.image)[..., None], 3, 2)
    write_dataset(tmp_path / "real", tiny_description(channels=3), {"train": samples})
    export(tmp_path / "real", ExportOptions(name, tmp_path / "out"))
    modes = [Image.open(path).mode for path in (tmp_path / "out").rglob("*.png")]
    assert modes.count("RGB") == 2


def test_a_damaged_dataset_is_refused_and_leaves_nothing(real: Path, tmp_path: Path, name: str):
    (real / "README.md").write_text("edited")
    with pytest.raises(MaskLoomError, match="SHA-256 differs"):
        export(real, ExportOptions(name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_without_masks_are_told_before_anything_is_written(tmp_path: Path, name: str):
    samples = tiny_samples("train", 4)
    samples[2].mask = None
    write_dataset(tmp_path / "real", tiny_description(), {"train": samples})
    if load_plugin(PACKAGE, name, "format").Exporter.needs_masks:
        with pytest.raises(MaskLoomError, match="sample train-0002 has no mask"):
            export(tmp_path / "real", ExportOptions(name, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    else:
        export(tmp_path / "real", ExportOptions(name, tmp_path / "out"))


@pytest.mark.parametrize("labels", [(), ("disc", "square")])
def test_rows_without_classes_are_told_or_kept(tmp_path: Path, name: str, labels: tuple[str, ...]):
    samples = tiny_samples("train", 4)
    for sample in samples:
        sample.label = None if not labels or sample.sample_id == "train-0001" else sample.label
    write_dataset(tmp_path / "real", tiny_description(labels=labels), {"train": samples})
    if load_plugin(PACKAGE, name, "format").Exporter.needs_labels:
        with pytest.raises(MaskLoomError, match="has no class"):
            export(tmp_path / "real", ExportOptions(name, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    else:
        export(tmp_path / "real", ExportOptions(name, tmp_path / "out"))
        written = files_of(tmp_path / "out").values()
        assert all(png_bytes(sample.image) in written for sample in samples)  # type: ignore[arg-type]


def test_it_holds_a_few_rows_at_a_time(real: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """The rows are a stream: nothing keeps a mask after the next ones have come."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    rows = ExportSource.rows

    def watched(source: ExportSource, split: str):
        nonlocal most
        for row in rows(source, split):
            mask = np.array(row.mask)
            object.__setattr__(row, "mask", mask)
            alive.append(weakref.ref(mask))
            del mask
            yield row
            del row
            most = max(most, sum(one() is not None for one in alive))

    monkeypatch.setattr(ExportSource, "rows", watched)
    export(real, ExportOptions(name, tmp_path / "out"))
    assert len(alive) == sum(COUNTS.values())
    assert most <= 2
