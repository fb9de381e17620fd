"""Pushing the weights of the stage `baselines`: dry runs, which ask no Hub, and what would go."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from maskloom.models.pix2pix import MaskToImageUNet
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import content_digest, write_json
from maskloom.pipeline.hub.client import PushOptions
from maskloom.pipeline.hub.push import push
from maskloom.pipeline.hub.uploads import Target, Upload, check_leaks, find_targets, pack
from maskloom.pipeline.runs.run import Run
from tests.pipeline import fake_run
from tests.records import write_record

WEIGHTS = "diffusion_pytorch_model.safetensors"
REPO = "me/fake-pix2pix"


class World:
    """A run with the weights of a tiny pix2pix, its checkpoints, and an evaluation."""

    def __init__(self, folder: Path) -> None:
        path = fake_run.write_config(folder, baselines={"pix2pix": {}})
        self.config: ExperimentConfig = load_experiment(path, [])
        self.run = Run(self.config.run_folder)
        self.real: Contract = fake_run.write_real(self.run)
        self.folder = self.run.baselines / "pix2pix" / "weights"
        fake_run.write_records(self.run, ("baselines/pix2pix",))
        self.record(inputs={"dataset": self.real.digest})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            MaskToImageUNet(1, 1, (4, 8, 8, 8), 0.5, (64, 64)).save_pretrained(self.folder / "generator")
        Image.new("L", (24, 8)).save(self.folder / "samples.png")
        card = "---\nlicense: other\ntags: [medical, pix2pix]\n---\n\n# `pix2pix`\n\n![previews](samples.png)\n"
        (self.folder / "README.md").write_text(card)
        for stays in (
            "checkpoint-3/optimizer.bin",
            "checkpoint-3/generator/" + WEIGHTS,
            "weights/generator/optimizer.bin",
        ):
            file = self.run.baselines / "pix2pix" / stays
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"stays here")
        self.record_weights()

    def record_weights(self) -> None:
        """Have the training's record list what lies there now."""
        kept = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "optimizer.bin"]
        self.record(files={path.relative_to(self.run.folder).as_posix(): content_digest(path) for path in kept})

    def record(self, **changes: object) -> None:
        write_record(self.run, "baselines/pix2pix", **changes)

    def upload(self) -> Upload:
        if (self.run.logs("baselines/pix2pix") / "stage.json").is_file():
            self.record_weights()
        return pack(self.run, Target("baseline", "pix2pix"), REPO)

    def card(self) -> tuple[dict[str, object], str]:
        text = self.upload().files["README.md"]
        assert isinstance(text, bytes)
        _, metadata, body = text.decode().split("---\n", 2)
        return yaml.safe_load(metadata), body

    def evaluate(self) -> None:
        """Leave figures of pix2pix's images."""
        made = fake_run.write_synthetic(self.run, "pix2pix", self.real)
        row = ["pix2pix", {"value": 0.5, "low": 0.4, "high": 0.6}]
        table = {"title": "Faithfulness", "columns": ["set", "Dice"], "rows": [row]}
        answer = fake_run.evaluation("faith", tables=[table], inputs={"real": self.real.digest, "pix2pix": made.digest})
        fake_run.write_evaluation(self.run, "faith", answer)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_dry_run_lists_the_networks_and_nothing_that_stays(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    push(world.config, ["baseline:pix2pix"], PushOptions(dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("baseline:pix2pix -> NAMESPACE/fake-pix2pix (model, private): not compared")
    sent = {line.split()[-1] for line in lines[1:]}
    assert sent == {"README.md", "generator/config.json", "generator/" + WEIGHTS, "samples.png"}


def test_the_card_says_how_to_load_the_network_and_where_it_came_from(world: World):
    metadata, body = world.card()
    assert metadata["library_name"] == "diffusers"
    assert metadata["tags"] == ["diffusers", "pix2pix", "medical"]
    assert "base_model" not in metadata
    assert "from maskloom.models.pix2pix import MaskToImageUNet" in body
    assert f'generator = MaskToImageUNet.from_pretrained("{REPO}", subfolder="generator")' in body
    assert "SHA-256 of `generator/diffusion_pytorch_model.safetensors`" in body
    assert body.count("samples.png") == 1


def test_networks_of_diffusers_are_loaded_with_diffusers(world: World):
    config = world.folder / "unet" / "config.json"
    write_json(config, {"_class_name": "UNet2DConditionModel"})
    body = world.card()[1]
    assert "from diffusers import UNet2DConditionModel" in body
    assert f'unet = UNet2DConditionModel.from_pretrained("{REPO}", subfolder="unet")' in body


def test_figures_of_its_own_images_stand_on_the_card(world: World):
    world.evaluate()
    metadata, body = world.card()
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.5
    assert result["task"]["type"] == "unconditional-image-generation"  # the set does not say that it was given masks
    assert "Does it faith?" in body


def test_figures_of_other_images_are_left_out(world: World):
    world.evaluate()
    fake_run.write_synthetic(world.run, "pix2pix", world.real, parents=(0, 1))
    metadata, body = world.card()
    assert "model-index" not in metadata
    assert "Does it faith?" not in body
    assert "run generate and evaluate again" in world.upload().notes[0]


def test_a_path_of_this_machine_in_a_network_is_found(world: World):
    config = world.folder / "generator" / "config.json"
    write_json(config, {**json.loads(config.read_text()), "from": str(world.run.folder / "x")})
    with pytest.raises(MaskLoomError, match=re.escape("weights/generator/config.json: names a path of this machine")):
        check_leaks(world.upload(), world.config, world.run)


def test_weights_of_another_dataset_do_not_go(world: World):
    world.record(inputs={"dataset": "0" * 64})
    with pytest.raises(MaskLoomError, match=r"trained on another dataset than .* is now; run baselines again"):
        world.upload()


def test_an_unfinished_training_does_not_go(world: World):
    (world.run.logs("baselines/pix2pix") / "stage.json").unlink()
    with pytest.raises(MaskLoomError, match="the training has not ended; run baselines again"):
        world.upload()


def test_weights_must_be_there(world: World):
    (world.folder / "generator" / WEIGHTS).unlink()
    with pytest.raises(MaskLoomError, match=r"no weights to push \(\*\.safetensors\); run baselines again"):
        world.upload()


def test_an_architecture_that_was_not_trained_is_named(world: World, tmp_path: Path):
    with pytest.raises(MaskLoomError, match=r"baseline:pix3pix: no such part of .*; did you mean 'baseline:pix2pix'\?"):
        find_targets(world.run, ["baseline:pix3pix"])
    with pytest.raises(MaskLoomError, match="no other generator has been trained yet; run baselines first"):
        find_targets(Run(tmp_path / "other"), ["baseline:pix2pix"])
