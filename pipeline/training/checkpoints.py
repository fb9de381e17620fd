"""Checkpoints that are whole or absent: `checkpoint-N/`, written beside and renamed."""

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
"""How far a training goes is not what it is: a checkpoint may be of a shorter or longer one."""


class LoopRecord(Record):
    """The content of `loop.json`.

    Attributes:
        step: number of optimizer steps done.
        averages: what `EMAWeights.save` returned.
        identity: what the training depends on.
    """

    step: int = Field(ge=0, lt=2**63)
    averages: dict[str, Any]
    identity: dict[str, Any]


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Return the finished checkpoints in a folder by step, ascending; a folder of that name that is not the program's is not one."""
    return {step: path for step, path in _named_checkpoints(folder).items() if _is_checkpoint(path)}


def _named_checkpoints(folder: Path) -> dict[int, Path]:
    """Return what has the name of a checkpoint, by step, ascending."""
    named = ((re.fullmatch(r"checkpoint-(\d{1,12})", path.name), path) for path in folder.glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def check_checkpoint_names(folder: Path) -> None:
    """Check that nothing of the user's has the name of a checkpoint: it would be in the way when that step is saved, or when all are deleted.

    Raises:
        MaskLoomError: names it.
    """
    for path in _named_checkpoints(folder).values():
        OwnedFolder(path).check()


def _is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint was written there; a damaged one counts, so that it is not passed over in silence."""
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
    """Write `checkpoint-STEP` with the state of all processes, then drop the oldest beyond the limit.

    Args:
        accelerator: holds models, optimizers, schedulers and each process's random state.
        folder: where checkpoints live.
        step: number of optimizer steps done.
        ema: the averaged weights, and the best ones of early stopping.
        identity: what the training depends on; `resume` refuses a checkpoint of another one.
        limit: how many checkpoints stay; None keeps all.
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
    """Load a checkpoint into the accelerator's objects and the averaged weights.

    Args:
        accelerator: its models, optimizers, schedulers and random states are filled.
        folder: where checkpoints live.
        wanted: `latest`, a checkpoint folder's path, or None to start afresh.
        ema: the averaged weights, and the best ones of early stopping.
        identity: what the training depends on.

    Returns:
        The number of optimizer steps done; 0 where nothing was loaded.

    Raises:
        MaskLoomError: an explicit path is missing, or the checkpoint is damaged or belongs to another configuration or dataset.
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
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise MaskLoomError(f"{path}: cannot be read ({excerpt(error)}); {_remedy(path)}") from error
    _check_random_states_restored(path, accelerator)
    if accelerator.is_main_process:
        say(f"resuming from {path}")
    return record.step


def read_checkpoint(path: Path, whole: bool = True) -> LoopRecord:
    """Return a checkpoint's record, after comparing the files of the checkpoint with their digests.

    Args:
        path: the checkpoint's folder.
        whole: compare every file; else the record alone.

    Raises:
        MaskLoomError: a file is missing or not what was written, or the record is damaged.
    """
    remedy = _remedy(path)
    try:
        written = OwnedFolder(path).digests()
    except MaskLoomError as error:
        raise MaskLoomError(f"{one_line(error)}; {remedy}") from None
    if LOOP_FILE not in written:
        raise MaskLoomError(f"{path}: lists no files that were written ({MANIFEST}); {remedy}")
    compared = written if whole else {LOOP_FILE: written[LOOP_FILE]}
    problem = next((p for name, known in compared.items() if (p := file_problem(path / name, known))), None)
    if problem:
        raise MaskLoomError(f"{problem}; {remedy}")
    return read_model(path / LOOP_FILE, LoopRecord, remedy)


def _remedy(path: Path) -> str:
    return f"the checkpoint is damaged: delete {path} and run again, which continues from the one before it"


def _check_random_states(path: Path, accelerator: Accelerator) -> None:
    """Check that this process's random state is there: accelerate itself continues without it.

    Raises:
        MaskLoomError: it is missing.
    """
    if not _random_states(path, accelerator).is_file():
        raise MaskLoomError(
            f"{_random_states(path, accelerator)}: missing, and this training has {accelerator.num_processes} process(es); {_remedy(path)}"
        )


def _check_random_states_restored(path: Path, accelerator: Accelerator) -> None:
    """Compare this process's generators with the kept states: accelerate only logs where it cannot restore them.

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
            f"{_random_states(path, accelerator)}: the random states cannot be restored on these devices; resume on as many devices "
            "of the same kind, or start afresh with --force"
        )


def _random_states(path: Path, accelerator: Accelerator) -> Path:
    return path / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl"


def checkpoint_to_resume(
    folder: Path, wanted: str | None, identity: Mapping[str, Any], whole: bool = True
) -> LoopRecord | None:
    """Return the record of the checkpoint that `resume` would load, or None where it would start afresh; loads and changes nothing.

    Args:
        folder: where checkpoints live.
        wanted: as for `resume`.
        identity: what the training depends on.
        whole: as for `read_checkpoint`.

    Raises:
        MaskLoomError: an explicit path is missing, a file is damaged, or it belongs to another configuration or dataset.
    """
    path = _wanted_checkpoint(folder, wanted)
    if path is None:
        return None
    record = read_checkpoint(path, whole)
    _check_identity(path, record.identity, identity)
    return record


def register_network_hooks(accelerator: Accelerator, networks: Mapping[str, nn.Module]) -> None:
    """Make the accelerator keep each network under its own name, as safetensors.

    A diffusers model that is trained itself becomes a folder that `from_pretrained` loads; of any other module, and of a network with adapters,
    the trained weights become `NAME.safetensors`. Engines that shard weights keep their own files.
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
    """Whether a network is kept as diffusers keeps models; one with adapters keeps what is trained of it."""
    return isinstance(module, ModelMixin) and not hasattr(module, "peft_config")


def _save_network(module: Any, folder: Path, name: str) -> None:
    if _is_whole(module):
        module.save_pretrained(folder / name, safe_serialization=True)
    else:
        save_file({k: v.contiguous().cpu() for k, v in _kept(module).items()}, folder / f"{name}.safetensors")


def _load_network(module: nn.Module, folder: Path, name: str) -> None:
    if _is_whole(module):
        module.load_state_dict(load_file(next((folder / name).glob("*.safetensors"))))
    else:
        kept = load_file(folder / f"{name}.safetensors")
        for key, value in _kept(module).items():
            value.copy_(kept[key])


def _kept(module: nn.Module) -> dict[str, torch.Tensor]:
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
            "restore the old settings, use another experiment name, or start afresh with --force"
        )
