"""Atomic checkpoints: `checkpoint-N/` is written under a temporary name, then renamed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, load
from accelerate.utils.constants import RNG_STATE_NAME
from diffusers import ModelMixin
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn

from maskloom.pipeline.errors import MaskLoomError, excerpt, one_line, report_write_errors
from maskloom.pipeline.files.atomic import TEMPORARY_SUFFIX, write_json
from maskloom.pipeline.files.ownership import (
    MANIFEST,
    OwnedFolder,
    delete_folder,
    file_problem,
    put_in_place,
    seal_folder,
)
from maskloom.pipeline.files.reading import Record, read_model
from maskloom.pipeline.progress import say
from maskloom.pipeline.training.ema import EMAWeights

LOOP_FILE = "loop.json"
LENGTH_SETTINGS = frozenset({"max_train_steps", "num_train_epochs"})
"""Settings that may differ on resuming: a checkpoint may come from a shorter or longer training."""


class LoopRecord(Record):
    """The content of `loop.json`.

    Attributes:
        step: number of optimizer steps done.
        averages: state that `EMAWeights.save` returned.
        identity: everything that the training depends on.
    """

    step: int = Field(ge=0, lt=2**63)
    averages: dict[str, Any]
    identity: dict[str, Any]


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Return the checkpoints that MaskLoom wrote to a folder, by ascending step."""
    return {step: path for step, path in _named_checkpoints(folder).items() if _is_checkpoint(path)}


def _named_checkpoints(folder: Path) -> dict[int, Path]:
    """Return all paths with the name of a checkpoint, by ascending step."""
    named = ((re.fullmatch(r"checkpoint-(\d{1,12})", path.name), path) for path in folder.glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def check_checkpoint_names(folder: Path) -> None:
    """Check that no file or folder of the user has the name of a checkpoint.

    It would prevent saving the checkpoint of that step, and deleting all checkpoints.

    Raises:
        MaskLoomError: there is one; the error names it.
    """
    for path in _named_checkpoints(folder).values():
        OwnedFolder(path).check()


def _is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint; damaged ones count, so that they are reported."""
    try:
        return (path / LOOP_FILE).exists() or LOOP_FILE in OwnedFolder(path).files()
    except MaskLoomError:
        return True


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in a folder; the user's own files in them stay."""
    for path in checkpoint_steps(folder).values():
        delete_folder(path)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    ema: EMAWeights,
    identity: Mapping[str, Any],
    limit: int | None,
) -> None:
    """Write `checkpoint-STEP` with the state of all processes; delete the oldest beyond the limit.

    Args:
        accelerator: holds models, optimizers, schedulers and the random state of each process.
        folder: folder of the checkpoints.
        step: number of optimizer steps done.
        ema: EMA weights, and the best weights of early stopping.
        identity: everything that the training depends on; `resume` compares it.
        limit: number of checkpoints to keep; None keeps all.
    """
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}{TEMPORARY_SUFFIX}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with report_write_errors(temporary):
        accelerator.save_state(str(temporary))
        kept = ema.save(temporary) if accelerator.is_main_process else {}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = LoopRecord(step=step, averages=kept, identity=json.loads(json.dumps(dict(identity))))
        with report_write_errors(temporary):
            write_json(temporary / LOOP_FILE, record.model_dump(mode="json"))
            seal_folder(temporary)
        put_in_place(temporary, final)
        old = list(checkpoint_steps(folder).values())[: -limit if limit else 0]
        for path in old:
            delete_folder(path)
    accelerator.wait_for_everyone()


def resume(
    accelerator: Accelerator,
    folder: Path,
    wanted: str | None,
    ema: EMAWeights,
    identity: Mapping[str, Any],
) -> int:
    """Load a checkpoint into the accelerator's objects and the EMA weights.

    Args:
        accelerator: its models, optimizers, schedulers and random states are restored.
        folder: folder of the checkpoints.
        wanted: `latest`, the path of a checkpoint folder, or None to start from scratch.
        ema: EMA weights, and the best weights of early stopping.
        identity: everything that the training depends on.

    Returns:
        The number of optimizer steps done; 0 if nothing was loaded.

    Raises:
        MaskLoomError: an explicit path is missing, or the checkpoint is damaged or belongs to
            another configuration or dataset.
    """
    path = _wanted_checkpoint(folder, wanted)
    if path is None:
        return 0
    record = read_checkpoint(path)
    _check_identity(path, record.identity, identity)
    _check_random_states(path, accelerator)
    try:
        accelerator.load_state(str(path), load_kwargs={"weights_only": True})
        ema.load(path, record.averages)
    except Exception as error:  # the libraries raise many kinds of errors; the remedy is the same
        raise MaskLoomError(f"{path}: cannot be read ({excerpt(error)}); {_remedy(path)}") from error
    _check_random_states_restored(path, accelerator)
    if accelerator.is_main_process:
        say(f"resuming from {path}")
    return record.step


def read_checkpoint(path: Path, whole: bool = True) -> LoopRecord:
    """Return the record of a checkpoint after comparing its files with their digests.

    Args:
        path: folder of the checkpoint.
        whole: compare every file; otherwise only the record.

    Raises:
        MaskLoomError: a file is missing or has changed, or the record is damaged.
    """
    remedy = _remedy(path)
    try:
        written = OwnedFolder(path).digests()
    except MaskLoomError as error:
        raise MaskLoomError(f"{one_line(error)}; {remedy}") from None
    if LOOP_FILE not in written:
        raise MaskLoomError(f"{path}: its {MANIFEST} lists no {LOOP_FILE}; {remedy}")
    compared = written if whole else {LOOP_FILE: written[LOOP_FILE]}
    problem = next((p for name, known in compared.items() if (p := file_problem(path / name, known))), None)
    if problem:
        raise MaskLoomError(f"{problem}; {remedy}")
    return read_model(path / LOOP_FILE, LoopRecord, remedy)


def _remedy(path: Path) -> str:
    return f"the checkpoint is damaged: delete {path} and run again, which continues from the one before it"


def _check_random_states(path: Path, accelerator: Accelerator) -> None:
    """Check that the random state of this process exists; accelerate would continue without it.

    Raises:
        MaskLoomError: it is missing.
    """
    file = _random_states(path, accelerator)
    if not file.is_file():
        raise MaskLoomError(
            f"{file}: missing, and this training has {accelerator.num_processes} process(es); {_remedy(path)}"
        )


def _check_random_states_restored(path: Path, accelerator: Accelerator) -> None:
    """Check that the random states of this process were restored; accelerate only logs a failure.

    Raises:
        MaskLoomError: they differ, as on another number or kind of devices.
    """
    states = load(_random_states(path, accelerator), weights_only=True)
    pairs = [(states["torch_manual_seed"], torch.get_rng_state())]
    if torch.cuda.is_available():
        kept, now = states.get("torch_cuda_manual_seed", []), torch.cuda.get_rng_state_all()
        pairs += list(zip(kept, now, strict=False))
        if len(kept) != len(now):
            pairs.append((torch.zeros(1), torch.ones(1)))
    if not all(torch.equal(kept, now) for kept, now in pairs):
        raise MaskLoomError(
            f"{_random_states(path, accelerator)}: the random states cannot be restored on these devices; resume on the "
            "same number and kind of devices, or start from scratch with --force"
        )


def _random_states(path: Path, accelerator: Accelerator) -> Path:
    return path / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl"


def checkpoint_to_resume(
    folder: Path, wanted: str | None, identity: Mapping[str, Any], whole: bool = True
) -> LoopRecord | None:
    """Return the record of the checkpoint that `resume` would load, or None; load nothing.

    Args:
        folder: folder of the checkpoints.
        wanted: see `resume`.
        identity: everything that the training depends on.
        whole: see `read_checkpoint`.

    Raises:
        MaskLoomError: an explicit path is missing, or the checkpoint is damaged or belongs to
            another configuration or dataset.
    """
    path = _wanted_checkpoint(folder, wanted)
    if path is None:
        return None
    record = read_checkpoint(path, whole)
    _check_identity(path, record.identity, identity)
    return record


def register_network_hooks(accelerator: Accelerator, networks: Mapping[str, nn.Module]) -> None:
    """Make the accelerator save each network under its own name, as safetensors.

    A diffusers model without adapters is saved as a folder that `from_pretrained` loads. Of any
    other module, and of a network with adapters, the trained weights are saved as
    `NAME.safetensors`. Engines that shard weights write their own files.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    names = {id(accelerator.unwrap_model(module)): name for name, module in networks.items()}

    def save_networks(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], output: str) -> None:
        while weights:
            weights.pop()
        if accelerator.is_main_process:
            for model in models:
                module = accelerator.unwrap_model(model)
                _save_network(module, Path(output), names[id(module)])

    def load_networks(models: list[nn.Module], source: str) -> None:
        while models:
            module = accelerator.unwrap_model(models.pop())
            _load_network(module, Path(source), names[id(module)])

    accelerator.register_save_state_pre_hook(save_networks)
    accelerator.register_load_state_pre_hook(load_networks)


def _is_whole(module: nn.Module) -> bool:
    """Return whether a network is a diffusers model without adapters, which is saved whole."""
    return isinstance(module, ModelMixin) and not hasattr(module, "peft_config")


def _save_network(module: Any, folder: Path, name: str) -> None:
    if _is_whole(module):
        module.save_pretrained(folder / name, safe_serialization=True)
    else:
        save_file({k: v.contiguous().cpu() for k, v in _saved_tensors(module).items()}, folder / f"{name}.safetensors")


def _load_network(module: nn.Module, folder: Path, name: str) -> None:
    if _is_whole(module):
        module.load_state_dict(load_file(next((folder / name).glob("*.safetensors"))))
    else:
        saved = load_file(folder / f"{name}.safetensors")
        for key, value in _saved_tensors(module).items():
            value.copy_(saved[key])


def _saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained weights and the buffers of a network."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _wanted_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    if wanted is None:
        return None
    if wanted == "latest":
        found = list(checkpoint_steps(folder).values())
        return found[-1] if found else None
    path = Path(wanted)
    if not (path / LOOP_FILE).is_file():
        raise MaskLoomError(
            f"resume_from_checkpoint={wanted}: no such checkpoint; give a checkpoint-N folder or 'latest'"
        )
    return path


def _check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    fixed = sorted({*found, *expected} - LENGTH_SETTINGS)
    keys = [key for key in fixed if found.get(key) != expected.get(key)]
    if keys:
        differences = ", ".join(f"{key}: {found.get(key)} there, {expected.get(key)} now" for key in keys[:5])
        raise MaskLoomError(
            f"{path}: this checkpoint belongs to another training ({differences}); "
            "restore the old settings, use another experiment name, or start from scratch with --force"
        )
