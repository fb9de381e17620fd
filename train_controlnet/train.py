"""The train stage: real dataset + frozen backbone -> ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import ExperimentConfig
from pipeline.contract import Contract
from pipeline.errors import MaskLoomError, told_when_unwritable
from pipeline.files import atomic_folder, model_digest, remove_folder
from pipeline.runs import Run, Stage, open_run
from pipeline.verification import verify_quickly

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train_controlnet.task import ControlNetTask

WEIGHTS = "controlnet"


def train_stage(config: ExperimentConfig, force: bool) -> None:
    """Train, or skip where nothing has changed.

    Args:
        config: the experiment.
        force: throw earlier checkpoints away and train from the start.

    Raises:
        MaskLoomError: the dataset, the backbone or a setting cannot be used; the loss was not finite.
    """
    run = open_run(config)
    contract = verify_quickly(run.dataset)
    _check_trainable(run, contract)
    stage = _stage(config, run, contract)
    if stage.skips(force):
        return
    from accelerate.utils import set_seed

    from pipeline.training import make_accelerator, train
    from train_controlnet.task import ControlNetTask

    accelerator = make_accelerator(config.train, run.logs("train"))
    with stage.recorded(accelerator.is_main_process) as results:
        if force and accelerator.is_main_process:
            remove_folder(run.generator)
        accelerator.wait_for_everyone()
        set_seed(config.seed)  # the layers of a new ControlNet that are not copied from the UNet start at random
        task = ControlNetTask(config, run, contract, accelerator)
        train(task, config.train, accelerator, run.generator, config.seed, stage.inputs)
        if accelerator.is_main_process:
            _export(task, config, run, contract, accelerator)
            results["weights_digest"] = model_digest(str(run.generator / WEIGHTS))
            results["trained_parameters"] = task.trained_parameters


def _stage(config: ExperimentConfig, run: Run, contract: Contract) -> Stage:
    inputs = {
        "dataset": contract.digest,
        "backbone": model_digest(config.train.pretrained_model_name_or_path, config.train.revision),
    }
    if config.train.controlnet_model_name_or_path:
        inputs["controlnet"] = model_digest(config.train.controlnet_model_name_or_path)
    settings = {"train": config.train.model_dump(mode="json"), "seed": config.seed}
    return Stage(run, "train", inputs, settings, [run.generator / WEIGHTS / "config.json"])


def _check_trainable(run: Run, contract: Contract) -> None:
    if contract.description.origin != "real":
        raise MaskLoomError(f"{run.dataset}: a synthetic dataset; a generator is trained on real images only")
    if "train" not in contract.splits:
        raise MaskLoomError(
            f"{run.dataset}: the train split is empty; lower data.splits.validation and data.splits.test"
        )


def _export(
    task: ControlNetTask, config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator
) -> None:
    """Write the weights and the model card; the folder appears whole."""
    from train_controlnet.model_card import model_card

    weights = run.generator / WEIGHTS
    with told_when_unwritable(weights), atomic_folder(weights) as folder:
        accelerator.unwrap_model(task.networks[WEIGHTS]).save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(model_card(config, contract, _last_pictures(run)), encoding="utf-8")
        if picture := _last_pictures(run):
            (folder / "samples.png").write_bytes(picture.read_bytes())


def _last_pictures(run: Run) -> Path | None:
    """Return the newest grid of validation pictures, if any was made."""
    return max((run.logs("train") / "images").glob("step-*.png"), default=None)
