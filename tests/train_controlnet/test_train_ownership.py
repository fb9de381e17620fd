"""What a training deletes, keeps and refuses of a run folder."""

from pathlib import Path
from typing import Any

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.train import train_stage
from tests.train_controlnet.conftest import tiny_config

SHORT = {"max_train_steps": 2, "checkpointing_steps": 1, "num_validation_images": 0}


def trained(run: Path, backbone: Path, force: bool = False, **settings: Any) -> None:
    train_stage(tiny_config(run, backbone, **{**SHORT, **settings}), force=force)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def run(tmp_path: Path, dataset: Path, backbone: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "dataset").symlink_to(dataset)
    trained(folder, backbone)
    return folder


def test_beginning_afresh_keeps_the_users_files(run: Path, backbone: Path) -> None:
    generator = run / "generator"
    cache = next(path for path in (generator / "cache").iterdir())
    mine = [
        "notes.md",
        "cache/mine.txt",
        f"cache/{cache.name}/mine.txt",
        "checkpoint-1/mine.txt",
        "controlnet/mine.txt",
        "checkpoint-x/a",
    ]
    for name in mine:
        (generator / name).parent.mkdir(exist_ok=True)
        (generator / name).write_text("mine")
    trained(run, backbone, force=True)
    assert all((generator / name).read_text() == "mine" for name in mine)
    assert OwnedFolder(generator / "controlnet").problem("diffusion_pytorch_model.safetensors") is None


@pytest.mark.parametrize("force", [False, True])
def test_weights_that_would_be_replaced_are_no_input(run: Path, backbone: Path, force: bool) -> None:
    before = files(run)
    with pytest.raises(
        MaskLoomError, match=r"train\.controlnet_model_name_or_path=.*: lies in .*generator, which is written to"
    ):
        trained(run, backbone, force=force, controlnet_model_name_or_path=str(run / "generator" / "controlnet"))
    assert files(run) == before


def test_a_refused_training_leaves_everything_as_it_was(run: Path, backbone: Path) -> None:
    before = files(run)
    with pytest.raises(MaskLoomError, match=r"learning_rate"):
        trained(run, backbone, learning_rate=0.5)
    assert files(run) == before


def test_damaged_weights_are_made_anew_from_the_last_checkpoint(run: Path, backbone: Path, capsys: Any) -> None:
    weights = run / "generator" / "controlnet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    trained(run, backbone)
    assert f"train: damaged: {weights}: changed since it was written; writing it again" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_weights_of_an_earlier_training_do_not_stay_beside_new_ones(run: Path, backbone: Path) -> None:
    other = {"controlnet": "none", "lora": ["unet"]}
    trained(run, backbone, force=True, **other)
    assert not (run / "generator" / "controlnet").exists()
    assert (run / "generator" / "lora").is_dir()
    record = read_record(Run(run), "train")
    assert record is not None
    assert {Path(name).parts[1] for name in record.files} == {"lora"}


def test_a_folder_of_the_users_is_not_written_to(tmp_path: Path, dataset: Path, backbone: Path) -> None:
    (tmp_path / "dataset").symlink_to(dataset)
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator" / "thesis.tex").write_text("mine")
    with pytest.raises(MaskLoomError, match=r"holds generator, which MaskLoom did not write"):
        trained(tmp_path, backbone)
    assert files(tmp_path / "generator") == {"thesis.tex": b"mine"}


def test_force_does_not_delete_the_checkpoint_that_is_to_be_gone_on_from(run: Path, backbone: Path) -> None:
    before = files(run)
    for path in (run / "generator" / "checkpoint-1", run / "elsewhere"):
        with pytest.raises(
            MaskLoomError, match=r"train\.resume_from_checkpoint=.*: --force deletes earlier .*leave one"
        ):
            trained(run, backbone, force=True, resume_from_checkpoint=str(path))
    assert files(run) == before


@pytest.mark.parametrize("name", ["checkpoint-1", "checkpoint-7", "vae_training/checkpoint-1", "controlnet", "vae"])
@pytest.mark.parametrize("force", [False, True])
def test_the_name_of_weights_or_of_a_checkpoint_is_in_the_way_before_anything_is_computed(
    tmp_path: Path, dataset: Path, backbone: Path, name: str, force: bool
) -> None:
    (tmp_path / "dataset").symlink_to(dataset)
    OwnedFolder(tmp_path / "generator").claim()
    (tmp_path / "generator" / name).mkdir(parents=True)
    (tmp_path / "generator" / name / "mine").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(MaskLoomError, match=rf"generator/{name}: holds files that MaskLoom did not write \(mine\)"):
        trained(tmp_path, backbone, force=force, vae_decoder={})
    assert files(tmp_path) == before
