"""Configurations and the backbone are found from any folder, and what is recorded of them is the
same text everywhere.
"""

from pathlib import Path

import pytest
import yaml

from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.source import KEY, BackboneSource, folder_of
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.shipped import shipped, shipped_names, shipped_only
from maskloom.pipeline.runs.runner import check_accelerate_config, stage_command

ROOT = Path(__file__).parents[3]
DEMO, NANO_SD, DDP = Path("configs/demo.yaml"), Path("assets/nano-sd"), Path("configs/accelerate/ddp.yaml")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [DEMO, NANO_SD, DDP])
def test_a_shipped_file_or_folder_is_found_from_anywhere(elsewhere, path):
    assert shipped(path).resolve() == ROOT / path


def test_what_is_in_the_current_folder_comes_first(elsewhere):
    (elsewhere / "configs").mkdir()
    (elsewhere / DEMO).write_text("mine")
    assert shipped(DEMO) == DEMO
    assert shipped_only(DEMO).resolve() == ROOT / DEMO


@pytest.mark.parametrize(
    "name", ["pipeline/cli.py", "configs/none.yaml", "configs/../pyproject.toml", "", ".", "configs/" + "x" * 5000]
)
def test_nothing_else_of_the_package_is_found(elsewhere, name):
    assert shipped(Path(name)) == Path(name)
    assert shipped_only(Path(name)) is None


def test_an_absolute_path_is_left_alone(elsewhere):
    assert shipped(elsewhere / DEMO) == elsewhere / DEMO


def test_a_configuration_is_equal_from_anywhere(elsewhere, monkeypatch):
    found = load_experiment(DEMO, [])
    assert found.train.pretrained_model_name_or_path == "assets/nano-sd"
    monkeypatch.chdir(ROOT)
    assert load_experiment(DEMO, []) == found


@pytest.mark.parametrize("parent", ["configs/demo.yaml", "demo.yaml"])
def test_an_own_configuration_extends_a_shipped_one(elsewhere, parent):
    path = elsewhere / "deep" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({"extends": parent, "seed": 5}))
    assert load_experiment(path, []).seed == 5
    assert load_experiment(path, []).data.dataset == "mni152"


def test_a_file_beside_an_own_configuration_comes_before_a_shipped_one(elsewhere):
    (elsewhere / "demo.yaml").write_text(yaml.safe_dump({"extends": "configs/demo.yaml", "seed": 6}))
    (elsewhere / "mine.yaml").write_text("extends: demo.yaml")
    assert load_experiment(elsewhere / "mine.yaml", []).seed == 6


def test_a_missing_configuration_lists_those_that_ship(elsewhere):
    with pytest.raises(
        MaskLoomError, match=r"configs/demmo\.yaml: no such .* configs/busi\.yaml, .*configs/demo\.yaml"
    ):
        load_experiment(Path("configs/demmo.yaml"), [])
    assert all((ROOT / name).is_file() for name in shipped_names("configs", "*.yaml"))


def test_the_backbone_is_the_same_from_anywhere(elsewhere, monkeypatch):
    source = BackboneSource(str(NANO_SD))
    check_backbone(source)
    found = source.inputs()
    assert source.is_folder and source.weights_folder().resolve() == ROOT / NANO_SD
    assert folder_of(str(NANO_SD), None, (), KEY).resolve() == ROOT / NANO_SD
    as_tokenizer = BackboneSource(str(NANO_SD), tokenizer_name=f"{NANO_SD}/tokenizer").inputs()
    monkeypatch.chdir(ROOT)
    assert source.inputs() == found
    assert BackboneSource(str(NANO_SD), tokenizer_name=f"{NANO_SD}/tokenizer").inputs() == as_tokenizer


def test_an_accelerate_configuration_is_found_from_anywhere(elsewhere):
    check_accelerate_config(DDP)
    command = stage_command("train", DDP)
    assert Path(command[command.index("--config_file") + 1]).resolve() == ROOT / DDP


def test_a_missing_accelerate_configuration_lists_those_that_ship(elsewhere):
    with pytest.raises(MaskLoomError, match=r"configs/dp\.yaml: no such file.* configs/accelerate/ddp\.yaml"):
        check_accelerate_config(Path("configs/dp.yaml"))
