"""A finished training goes on where more steps are asked for.

A refused one leaves everything as it was.
"""

from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from maskloom.train_controlnet.train import train_stage
from tests.train_controlnet.conftest import tiny_config
from tests.train_controlnet.test_resume import prepared, trained, weights

QUICK = {"use_ema": False, "num_validation_images": 0, "validation_samples": 2, "validation_timestep_bins": 1}
DECODER = {"max_train_steps": 2, "train_batch_size": 2, "crop": 64}
CONSTANT = {"lr_scheduler": "constant"}


def content(run: Path) -> dict[str, bytes]:
    """Return every file of a run but the dataset's, by path."""
    files = (path for path in run.rglob("*") if path.is_file() and "dataset" not in path.relative_to(run).parts)
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "kind",
    [
        {"use_ema": True, "ema_decay": 0.9},
        {"controlnet": "none", "lora": ["unet", "text_encoder"]},
        {"controlnet": "shallow", "controlnet_blocks": 1, "num_train_epochs": 1},
    ],
)
def test_more_steps_are_as_many_from_the_start(
    tmp_path: Path, dataset: Path, backbone: Path, capsys: pytest.CaptureFixture[str], kind: dict[str, Any]
) -> None:
    epochs = "num_train_epochs" in kind
    few, many = ({**kind, "num_train_epochs": n} if epochs else {**kind, "max_train_steps": 3 * n} for n in (1, 2))
    expected = trained(prepared(tmp_path / "whole", dataset), backbone, **many, **CONSTANT)
    run = prepared(tmp_path / "longer", dataset)
    assert trained(run, backbone, **few, **CONSTANT) != expected
    capsys.readouterr()
    assert trained(run, backbone, **many, **CONSTANT) == expected
    end = 12 if epochs else 6
    said = capsys.readouterr().err
    assert f"train: continuing at step {end // 2} of {end}" in said
    assert "as if it had been started with" in said
    assert read_json(run / "logs" / "train" / "stage.json", "")["results"]["samples_seen"] == 2 * end


def test_the_decoders_training_goes_on_too(
    tmp_path: Path, dataset: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepared(tmp_path / "run", dataset)
    settings = {"controlnet": "none", "lora": ["unet"], "max_train_steps": 1}
    trained(run, backbone, vae_decoder=DECODER, **settings)
    before = content(run)
    capsys.readouterr()
    trained(run, backbone, vae_decoder={**DECODER, "max_train_steps": 3}, **settings)
    assert "continuing at step 2 of 3" in capsys.readouterr().err
    name = "generator/vae/diffusion_pytorch_model.safetensors"
    assert content(run)[name] != before[name]
    with pytest.raises(MaskLoomError, match=r"train\.vae_decoder, .*max_train_steps=2: 2 steps, .* has made 3"):
        trained(run, backbone, vae_decoder=DECODER, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path, backbone: Path) -> Path:
    run = prepared(tmp_path_factory.mktemp("finished") / "run", dataset)
    trained(run, backbone, lora=["unet"], vae_decoder=DECODER)
    return run


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 5e-4}, "learning_rate: 0.001 there, 0.0005 now"),
        ({"max_train_steps": 5}, "max_train_steps=5: 5 steps, and the newest checkpoint has made 6"),
        ({"num_train_epochs": 1, "train_batch_size": 6}, "train_batch_size: 2 there, 6 now"),
        ({"rank": 8}, "rank: 4 there, 8 now"),
        ({"vae_decoder": {**DECODER, "learning_rate": 1e-5}}, r"train\.vae_decoder, .*learning_rate: 0\.0001 there, 1e-05 now"),
        ({"vae_decoder": {**DECODER, "max_train_steps": 1}}, r"train\.vae_decoder, .*max_train_steps=1: 1 steps"),
        ({"resume_from_checkpoint": "elsewhere"}, "resume_from_checkpoint=elsewhere: no such checkpoint"),
        ({"validation_prompt": ["a"], "validation_image": ["absent.png"]}, r"train\.validation_image: absent\.png cannot be read"),
        ({"validation_prompt": ["a"], "validation_image": ["$SMALL"]}, r"train\.validation_image: .* is 8 x 8, the dataset 32 x 32"),
        ({"tokenizer_name": "$EMPTY"}, "has no tokenizer"),
        ({"pretrained_model_name_or_path": "$EMPTY"}, r"train\.pretrained_model_name_or_path"),
        ({"use_8bit_adam": True}, r"train\.use_8bit_adam needs bitsandbytes"),
        ({"mixed_precision": "fp16"}, r"train\.mixed_precision=fp16 needs a GPU"),
        ({"report_to": "comet_ml"}, r"train\.report_to=comet_ml: it is not installed"),
        ({"enable_xformers_memory_efficient_attention": True}, "enable_xformers_memory_efficient_attention"),
        ({"adherence": {}}, r"train\.adherence: "),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_everything_as_it_was(
    tmp_path: Path, finished: Path, backbone: Path, changes: dict[str, Any], told: str
) -> None:
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "small.png")
    places = {"EMPTY": str(tmp_path / "empty"), "SMALL": str(tmp_path / "small.png")}
    named = yaml.safe_load(Template(yaml.safe_dump(changes)).substitute(places))
    values = {
        "checkpoints_total_limit": None,
        "logging_steps": 1,
        "lora": ["unet"],
        "vae_decoder": DECODER,
        "validation_samples": 2,
    }
    before = content(finished)
    where = named.pop("pretrained_model_name_or_path", str(backbone))
    with pytest.raises(MaskLoomError, match=told):
        train_stage(tiny_config(finished, Path(where), **{**QUICK, **values, **named}), force=False)
    after = content(finished)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []


@pytest.mark.parametrize("changes", [{"tokenizer_name": "EMPTY"}, {"controlnet_model_name_or_path": "EMPTY"}])
def test_a_forced_training_that_is_refused_throws_nothing_away(
    tmp_path: Path, finished: Path, backbone: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "empty").mkdir()
    before = weights(finished)
    with pytest.raises(MaskLoomError):
        train_stage(
            tiny_config(finished, backbone, **{**QUICK, **dict.fromkeys(changes, str(tmp_path / "empty"))}), force=True
        )
    assert weights(finished) == before
    assert (finished / "logs" / "train" / "stage.json").is_file()


@pytest.mark.parametrize(
    "check",
    ["maskloom.pipeline.training.distributed.check_engine", "maskloom.train_controlnet.decoder.check_decoder_engine"],
)
def test_an_engine_that_cannot_train_it_is_told_before_anything_is_thrown_away(
    finished: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    def refuse(*_: object) -> None:
        raise MaskLoomError("FSDP trains one network")

    monkeypatch.setattr(check, refuse)
    before = content(finished)
    with pytest.raises(MaskLoomError, match="FSDP trains one network"):
        train_stage(tiny_config(finished, backbone, **QUICK, lora=["unet"], vae_decoder=DECODER), force=True)
    after = content(finished)
    assert [name for name in before if after.get(name) != before[name]] == []
