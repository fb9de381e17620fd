"""Runs over every architecture found in `train_baselines/architectures`.

A new one is tested by existing.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from maskloom.generate.generate import open_generators
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.runs.run import Run
from maskloom.train_baselines.architecture import ArchitectureOptions, ArchitectureTask, Samples
from maskloom.train_baselines.rows import Rows, stacked
from maskloom.train_baselines.train import PACKAGE, train_baselines
from maskloom.train_baselines.train import architecture_options as checked_options
from tests.generate.workbench import ARCHITECTURES, ROOT, SIDE, architecture_options
from tests.pipeline.line_task import forget_accelerator
from tests.tiny_datasets import tiny_description, write_tiny_run

STEPS = {
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "validation_steps": 1,
    "logging_steps": 1,
    "preview_images_per_class": 1,
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("data")
    write_tiny_run(run, {}, {"train": 6, "validation": 2}, size=SIDE)
    return run / "dataset"


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Runs by architecture, each trained for two steps when it is first asked for."""

    class Runs(dict[str, Run]):
        def __missing__(self, name: str) -> Run:
            folder = tmp_path_factory.mktemp(name)
            (folder / "dataset").symlink_to(dataset)
            train_baselines(config(name, folder), force=False)
            forget_accelerator()
            self[name] = Run(folder)
            return self[name]

    yield Runs()
    forget_accelerator()


def config(name: str, run: Path):
    """Return an experiment of one architecture with its tiny configuration's options, at the
    bench's size and for two steps.
    """
    values = {
        "experiment": "tiny",
        "run_dir": str(run),
        "data": {"dataset": "tiny", "image_size": SIDE},
        "baselines": {name: {**architecture_options(name), **STEPS}},
        "generate": {"generators": {name: {}}, "num_inference_steps": 2},
    }
    return load_experiment(ROOT / "configs/tiny/dataset.yaml", []).model_validate(values)


def opened(name: str, dataset: Path, folder: Path) -> ArchitectureTask:
    """Return an architecture before its training."""
    from maskloom.pipeline.training.setup import make_accelerator

    plugin = load_plugin(PACKAGE, name, "architecture")
    options = plugin.Options(**{**architecture_options(name), **STEPS})
    rows = Rows(MaskPromptDataset.open(dataset), "train", (SIDE, SIDE), plugin.Architecture.needs_masks)
    torch.manual_seed(0)
    return plugin.Architecture(options, rows, rows, 3, make_accelerator(options, folder))


@every_architecture
def test_it_declares_what_the_protocol_asks_for(name: str):
    plugin = load_plugin(PACKAGE, name, "architecture")
    assert issubclass(plugin.Options, ArchitectureOptions)
    assert issubclass(plugin.Architecture, ArchitectureTask)
    assert isinstance(plugin.Architecture.needs_masks, bool)
    assert isinstance(plugin.Architecture.given_masks, bool)
    assert plugin.__doc__
    assert plugin.Options.__doc__
    assert plugin.Architecture.__doc__


@every_architecture
def test_its_defaults_are_whole(name: str):
    """The full setting is what a user gets who names the architecture and nothing else."""
    options = load_plugin(PACKAGE, name, "architecture").Options()
    assert options.num_train_epochs or options.max_train_steps
    if options.image_size:
        options.check_size(options.image_size)


@every_architecture
def test_there_is_a_tiny_configuration_of_it_alone(name: str):
    found = load_experiment(ROOT / f"configs/tiny/{name}.yaml", [])
    assert list(found.baselines) == list(found.generate.generators) == [name]
    options = checked_options(found, name)
    options.check_size(options.image_size or tuple(found.data.image_size))


@every_architecture
def test_it_trains_and_leaves_logs_previews_and_weights(trained: dict[str, Run], name: str):
    run = trained[name]
    logs = run.logs(f"baselines/{name}")
    assert [one.name for one in sorted((logs / "images").glob("*.png"))] == ["step-0000001.png", "step-0000002.png"]
    text = (logs / "metrics.jsonl").read_text()
    assert '"loss"' in text
    assert '"validation/diversity"' in text
    weights = run.baselines / name / "weights"
    assert list(weights.rglob("*.safetensors"))
    assert name in (weights / "README.md").read_text()
    assert (weights / "samples.png").read_bytes() == (logs / "images/step-0000002.png").read_bytes()


@every_architecture
def test_the_generator_of_the_same_name_reads_its_weights(trained: dict[str, Run], name: str):
    run = trained[name]
    generator = open_generators(config(name, run.folder), run)[name]
    assert len(generator.digest) > 8
    generator.check()
    generator.load(torch.device("cpu"), tiny_description(SIDE))


@every_architecture
def test_its_samples_follow_from_their_arguments(dataset: Path, tmp_path: Path, name: str):
    architecture = opened(name, dataset, tmp_path)
    for network in architecture.networks.values():
        network.eval()
    rows = stacked([architecture.rows[number] for number in (0, 1, 2)])
    masks = rows["mask"] if architecture.given_masks else None
    with torch.no_grad():
        first, same = (architecture.samples(rows["label"], masks, seed=4) for _ in range(2))
    for one, other in zip(first, same, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert isinstance(first, Samples)
    assert first.images.shape == (3, 1, SIDE, SIDE)
    assert first.images.isfinite().all()
    if first.masks is not None:
        assert (first.masks.shape, first.masks.dtype) == ((3, SIDE, SIDE), torch.uint8)
        assert not architecture.given_masks
    forget_accelerator()
