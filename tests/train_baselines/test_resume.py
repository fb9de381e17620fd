"""A training that was cut off and goes on writes the same bytes as one that never stopped: a GAN
and the joint diffusion.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import TEMPORARY_SUFFIX
from maskloom.pipeline.files.ownership import seal_folder
from maskloom.pipeline.training.checkpoints import checkpoint_steps
from tests.processes import Command
from tests.train_baselines.workbench import tiny_values, trained, weights, write_config
from tests.train_controlnet.test_resume import kill_when

MakeRun = Callable[..., Path]
AUGMENTED = ["brightness", "translation", "cutout"]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "two optimizers, dropout": ("pix2pix", {}),
    "averages, accumulation, augmentation": (
        "pix2pix",
        {"use_ema": True, "ema_decay": 0.9, "gradient_accumulation_steps": 2, "diff_augment": AUGMENTED, "random_flip": True},
    ),
    "penalty, spectral norm, falling rate": (
        "pix2pix",
        {"r1_gamma": 1.0, "spectral_norm": True, "gan_loss": "hinge", "lr_warmup_steps": 2},
    ),
    "workers, bf16": ("pix2pix", {"dataloader_num_workers": 2, "mixed_precision": "bf16"}),
    "joint GAN": ("joint_gan", {"soft_edges": 3}),
    "joint GAN, noise, no norms": (
        "joint_gan",
        {"noise_planes": 2, "discriminator_norm": False, "batch_deviation": True, "r1_gamma": 0.2},
    ),
    "joint diffusion": ("joint_diffusion", {}),
    "joint diffusion, accumulation, flips": (
        "joint_diffusion",
        {"gradient_accumulation_steps": 2, "random_flip": True, "prediction_type": "v_prediction"},
    ),
}  # fmt: skip
KEPT = {"checkpoints_total_limit": None, "logging_steps": 1}


def losses(run: Path, architecture: str) -> list[dict[str, float]]:
    """Return what was logged of the losses, by step."""
    rows = map(json.loads, (run / "logs" / "baselines" / architecture / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if key == "step" or "loss" in key} for row in rows]


def cut_back(run: Path, other: Path, architecture: str, step: int) -> Path:
    """Copy a finished run to what a kill after `step` would have left of it."""
    shutil.copytree(run, other, symlinks=True)
    for number, folder in checkpoint_steps(other / "baselines" / architecture).items():
        if number > step:
            shutil.rmtree(folder)
    shutil.rmtree(other / "baselines" / architecture / "weights")
    for stage in ("baselines", f"baselines/{architecture}"):
        (other / "logs" / stage / "stage.json").unlink()
    return other


@pytest.mark.parametrize("case", SETTINGS)
def test_a_resumed_training_ends_with_the_same_bytes(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    architecture, settings = SETTINGS[case]
    whole = make_run("whole")
    expected = trained(whole, architecture, **KEPT, **settings)
    assert expected
    resumed = cut_back(whole, tmp_path / "resumed", architecture, 2)
    assert trained(resumed, architecture, **KEPT, **settings) == expected
    assert f"resuming from {resumed / 'baselines' / architecture / 'checkpoint-2'}" in capsys.readouterr().err
    assert losses(resumed, architecture) == losses(whole, architecture)


def test_a_gan_resumes_with_its_discriminator_and_both_optimizers(tmp_path: Path, make_run: MakeRun) -> None:
    """Each part of a checkpoint is needed: with another one's in its place the training ends
    elsewhere.
    """
    whole = make_run("whole")
    expected = trained(whole, "pix2pix", **KEPT)
    steps = whole / "baselines" / "pix2pix"
    for part in ("discriminator.safetensors", "optimizer.bin", "optimizer_1.bin"):
        other = cut_back(whole, tmp_path / part, "pix2pix", 4)
        place = other / "baselines" / "pix2pix" / "checkpoint-4"
        shutil.copy(steps / "checkpoint-2" / part, place / part)
        seal_folder(place)
        assert trained(other, "pix2pix", **KEPT) != expected, part


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path, make_run: MakeRun) -> None:
    whole = make_run("whole")
    trained(whole, "pix2pix", **KEPT)
    run = cut_back(whole, tmp_path / "run", "pix2pix", 4)
    told = r"checkpoint-4: this checkpoint belongs to another training \(l1_weight: 100\.0 there, 50\.0 now\); .* with --force"
    with pytest.raises(MaskLoomError, match=told):
        trained(run, "pix2pix", l1_weight=50.0, **KEPT)


@pytest.mark.parametrize("architecture", ["pix2pix", "joint_diffusion"])
def test_a_training_killed_while_it_writes_a_checkpoint_goes_on(
    tmp_path: Path, make_run: MakeRun, architecture: str
) -> None:
    """`kill -9`, as a user's machine that goes down."""
    settings = {**KEPT, "max_train_steps": 12}
    expected = trained(make_run("whole"), architecture, **settings)
    run = make_run("killed")
    config = write_config(tmp_path / "killed.yaml", tiny_values(run, {architecture: settings}))
    folder = run / "baselines" / architecture
    command = Command("train_baselines", ["--config", str(config)])
    kill_when(command, (folder / f".checkpoint-4{TEMPORARY_SUFFIX}").exists)
    assert 2 in checkpoint_steps(folder)
    assert not weights(run, architecture)
    assert trained(run, architecture, **settings) == expected
    assert not list(folder.glob(f".*{TEMPORARY_SUFFIX}"))
