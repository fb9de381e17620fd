"""Writes the trained weights as diffusers users load them, with a model card beside each."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from pipeline.config import ExperimentConfig
from pipeline.contract import Contract
from pipeline.errors import told_when_unwritable
from pipeline.files import atomic_folder
from pipeline.runs import Run
from train_controlnet.model_card import model_card
from train_controlnet.outputs import exported_names

if TYPE_CHECKING:
    from train_controlnet.task import DiffusionTask


def export(
    task: DiffusionTask, config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator
) -> list[str]:
    """Write every folder of `exported_names`, each whole or not at all, and return their names."""
    names = exported_names(config.train)
    for name in names:
        with told_when_unwritable(run.generator / name), atomic_folder(run.generator / name) as folder:
            _save(name, task, folder)
            picture = last_pictures(run)
            (folder / "README.md").write_text(model_card(config, contract, picture), encoding="utf-8")
            if picture:
                (folder / "samples.png").write_bytes(picture.read_bytes())
    return names


def last_pictures(run: Run) -> Path | None:
    """Return the newest grid of validation pictures, if any was made."""
    return max((run.logs("train") / "images").glob("step-*.png"), default=None)


def _save(name: str, task: DiffusionTask, folder: Path) -> None:
    if name == "lora":
        adapters = {f"{part}_lora_layers": _adapters(getattr(task.parts, part)) for part in ("unet", "text_encoder")}
        StableDiffusionPipeline.save_lora_weights(folder, **adapters)
    else:
        _without_adapters(getattr(task.parts, name)).save_pretrained(folder, safe_serialization=True)


def _adapters(network: Any) -> dict[str, Any] | None:
    """Return a network's adapters under diffusers' names, or None where it has none."""
    if not hasattr(network, "peft_config"):
        return None
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(network))


def _without_adapters(network: Any) -> Any:
    """Return a network with its adapters merged into the weights: `from_pretrained` knows no adapters."""
    if not hasattr(network, "peft_config"):
        return network
    merged = deepcopy(network)
    for module in merged.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(merged)
    del merged.peft_config
    return merged
