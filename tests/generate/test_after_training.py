"""From training to a synthetic dataset, as a user would go: the folders that `train` leaves are
those that `generate` takes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from maskloom.generate.generate import generate
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.train import train_stage
from tests.generate.workbench import COUNTS, SIDE
from tests.tiny_datasets import write_tiny_run

SHORT = {
    "train_batch_size": 2,
    "max_train_steps": 2,
    "learning_rate": 1e-2,
    "validation_timestep_bins": 1,
    "validation_samples": 1,
    "num_validation_images": 0,
    "report_to": None,
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def experiment(folder: Path, models: Path, generators: list[str], **train: Any) -> ExperimentConfig:
    """Return an experiment over a tiny dataset in `folder`."""
    write_tiny_run(folder, {}, COUNTS, SIDE)
    return ExperimentConfig.model_validate(
        {
            "experiment": "tiny",
            "run_dir": str(folder),
            "data": {"dataset": "tiny", "image_size": SIDE},
            "train": {"pretrained_model_name_or_path": str(models / "backbone"), **SHORT, **train},
            "generate": {
                "generators": {name: {} for name in generators},
                "num_images": 2,
                "num_inference_steps": 2,
            },
        }
    )


@pytest.mark.parametrize(
    ("train", "generators", "parts"),
    [
        (
            {
                "lora": ["unet", "text_encoder"],
                "lora_alpha": 8,
                "vae_decoder": {"max_train_steps": 2, "crop": 64},
            },
            ["controlnet", "lora", "text_only"],
            {"controlnet", "lora", "vae"},
        ),
        ({"controlnet": "none", "lora": ["unet"]}, ["lora", "text_only"], {"lora"}),
        (
            {"controlnet": "zero_convs", "sd_locked": False, "lora": ["controlnet", "text_encoder"]},
            ["controlnet", "lora"],
            {"controlnet", "unet", "lora"},
        ),
        (
            {
                "lora": ["unet"],
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "noise_offset": 0.1,
            },
            ["controlnet"],
            {"controlnet", "lora"},
        ),
        ({"sd_locked": False, "prediction_type": "sample"}, ["controlnet"], {"controlnet", "unet"}),
    ],
)
def test_what_was_trained_generates(
    tmp_path: Path, models: Path, train: dict[str, Any], generators: list[str], parts: set[str]
) -> None:
    config, run = experiment(tmp_path, models, generators, **train), Run(tmp_path)
    train_stage(config, force=False)
    assert {path.parent.name for path in run.generator.glob("*/README.md")} == parts
    generate(config, force=False)
    for name in generators:
        contract = verify_fully(run.synthetic / name).contract
        assert contract.splits["train"].rows == 2
        assert contract.description.preprocessing["generation"]["uses_mask"] == (name == "controlnet")


def test_the_contract_states_what_the_generator_was_trained_on(tmp_path: Path, models: Path) -> None:
    config, run = experiment(tmp_path, models, ["controlnet", "text_only"]), Run(tmp_path)
    train_stage(config, force=False)
    generate(config, force=False)
    record = read_record(run, "train")
    assert record is not None
    real = verify_fully(run.dataset).digest
    how = {
        name: verify_fully(run.synthetic / name).description.preprocessing["generation"]
        for name in ("controlnet", "text_only")
    }
    assert record.results["weights_digest"]
    assert how["controlnet"]["training"] == {
        "stage": "train",
        "dataset": real,
        "weights": record.results["weights_digest"],
    }
    assert how["text_only"]["training"] == {"stage": None, "dataset": None, "weights": how["text_only"]["weights"]}
    assert "| training |" not in (run.synthetic / "controlnet" / "README.md").read_text()


def test_weights_that_were_trained_on_another_version_of_the_dataset_generate_nothing(
    tmp_path: Path, models: Path
) -> None:
    config, run = experiment(tmp_path, models, ["controlnet"]), Run(tmp_path)
    train_stage(config, force=False)
    write_tiny_run(tmp_path, {}, {**COUNTS, "test": 3}, SIDE)
    with pytest.raises(
        MaskLoomError,
        match=r"controlnet: its generator was trained \(train\) on another version of .*dataset.*; run train and generate",
    ):
        generate(config, force=False)
    assert not run.synthetic.exists()
    unfinetuned = config.model_copy(
        update={"generate": config.generate.model_copy(update={"generators": {"text_only": {}}})}
    )
    generate(unfinetuned, force=False)


def test_a_part_that_was_not_trained_yet_is_named(tmp_path: Path, models: Path) -> None:
    config = experiment(tmp_path, models, ["controlnet"])
    train_stage(config, force=False)
    more = config.model_copy(update={"train": config.train.model_copy(update={"lora": ["unet"]})})
    with pytest.raises(MaskLoomError, match=r"generator/lora: its training has not ended; run train first"):
        generate(more, force=False)


def test_adapters_learn_something(tmp_path: Path, models: Path) -> None:
    config = experiment(tmp_path, models, ["lora"], controlnet="none", lora=["unet", "text_encoder"])
    train_stage(config, force=False)
    weights = load_file(tmp_path / "generator/lora/pytorch_lora_weights.safetensors")
    second = {
        key: value
        for key, value in weights.items()
        if "lora_B" in key or "lora.up" in key or "lora_linear_layer.up" in key
    }
    assert {key.split(".")[0] for key in second} == {"unet", "text_encoder"}
    assert all(value.abs().max() > 0 for value in second.values())  # they start at zero
