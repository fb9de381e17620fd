"""The configurations of published projects, and beside each the one whose settings work: both can be run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskloom.data_prep.datasets.medmnist import MedMNISTOptions
from maskloom.pipeline.config.loading import load_experiment
from maskloom.preflight import find_problems
from maskloom.train_baselines.train import architecture_options, train_baselines
from tests.pipeline.line_task import forget_accelerator
from tests.tiny_datasets import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {
    "joint_gan_busi": "joint_gan",
    "joint_diffusion_busi": "joint_diffusion",
    "class_gan_isic9": "class_gan",
    "pix2pix_lidc": "pix2pix",
}
NARROW: dict[str, dict[str, Any]] = {
    "joint_gan": {"image_size": 32, "channels": 16, "discriminator_channels": 8},
    "joint_diffusion": {"model_channels": 16, "channel_multipliers": "[1,1]", "attention_side": 8, "transformer_depth": 1,
                        "mixed_precision": "no", "preview_steps": 1},
    "class_gan": {"base_channels": 8},
    "pix2pix": {"channels": "[8,8,8,8]"},
}  # fmt: skip
FIRST_STEP = {"train_batch_size": 2, "max_train_steps": 1, "logging_steps": 1, "validation_steps": 1,
              "checkpointing_steps": 1, "preview_images_per_class": 1, "dataloader_num_workers": 0}  # fmt: skip
FORMS = [f"{name}{end}" for name in ARCHITECTURES for end in ("", "_as_published")]
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_run(folder, {}, {"train": 4, "validation": 2}, size=32)
    yield folder / "dataset"
    forget_accelerator()


def architecture_of(form: str) -> str:
    return ARCHITECTURES[form.removesuffix("_as_published")]


def overrides(name: str, run: Path) -> list[str]:
    """Return overrides for one step of narrow networks on a tiny dataset."""
    values: dict[str, Any] = {**FIRST_STEP, **NARROW[name]}
    of_epochs = {f"{part}_epochs": "null" for part in ("num_train", "logging", "validation", "checkpointing")}
    if name in {"class_gan", "joint_diffusion"}:
        of_epochs.pop("logging_epochs")
    if name == "class_gan":
        of_epochs = {}
    changed = [f"baselines.{name}.{key}={value}" for key, value in {**values, **of_epochs}.items()]
    return [f"run_dir={run}", "data.dataset=tiny", "data.image_size=32", "data.options={}", *changed]


@every_form
def test_it_names_itself_and_its_settings_are_valid(form: str) -> None:
    config = load_experiment(ROOT / f"configs/{form}.yaml", [])
    assert config.experiment == form
    assert list(config.baselines) == [architecture_of(form)]
    architecture_options(config, architecture_of(form))
    text = (ROOT / f"configs/{form}.yaml").read_text(encoding="utf-8")
    assert f"maskloom run --config configs/{form}.yaml data.raw_dir=PATH" in text


@every_form
def test_nothing_but_missing_data_and_hardware_stops_it(form: str, tmp_path: Path) -> None:
    name = architecture_of(form)
    config = load_experiment(
        ROOT / f"configs/{form}.yaml", [f"run_dir={tmp_path}", f"baselines.{name}.mixed_precision=no"]
    )
    assert find_problems(config, ("baselines", "generate", "evaluate")) == []


@every_form
def test_it_takes_a_first_step(form: str, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset").symlink_to(dataset)
    name = architecture_of(form)
    train_baselines(load_experiment(ROOT / f"configs/{form}.yaml", overrides(name, tmp_path)), force=False)
    forget_accelerator()
    assert (tmp_path / "baselines" / name / "checkpoint-1").is_dir()
    assert list((tmp_path / "baselines" / name / "weights").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_settings_of_the_training_differ(name: str) -> None:
    ours, published = (
        load_experiment(ROOT / f"configs/{form}.yaml", []).model_dump(mode="json")
        for form in (name, f"{name}_as_published")
    )
    differing = {key for key in ours if ours[key] != published[key]}
    assert differing == {"experiment", "baselines"}
    assert yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["extends"] == f"{name}_as_published.yaml"


@pytest.mark.parametrize("form", ["class_gan_isic9", "class_gan_isic9_as_published"])
def test_class_gan_trains_on_any_classes_by_overrides(form: str) -> None:
    overridden = ["data.dataset=medmnist", "data.options.flag=pathmnist", "data.raw_dir=raw"]
    config = load_experiment(ROOT / f"configs/{form}.yaml", overridden)
    MedMNISTOptions.model_validate(config.data.options)
    assert config.data.dataset == "medmnist"
