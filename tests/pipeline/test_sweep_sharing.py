"""Variants that train alike train once: the weights are those that each would have trained itself, and
a sweep or a stage that is killed is resumed to the same table.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from maskloom.pipeline.files.ownership import OwnedFolder, seal_folder
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.runner import run_stages
from maskloom.pipeline.sweep import sharing
from maskloom.pipeline.sweep import variant as variants_module
from maskloom.pipeline.sweep.sharing import share_training
from maskloom.pipeline.sweep.sweep import sweep
from maskloom.pipeline.training import loop
from tests.pipeline.test_sweep import PIX2PIX, calls_of, run_here, variants_of, write_sweep
from tests.processes import FORKS
from tests.records import record_outputs

STEPS = 4
TRAINED = {"pix2pix": {**PIX2PIX, "max_train_steps": STEPS, "checkpointing_steps": 1}}
VARIANTS = {"first": {}, "more": {"generate": {"num_images": 6}}}
MEASURED = {"training seconds", "peak memory in MB", "images per second"}


def trained_sweep(folder: Path, variants: dict[str, Any] = VARIANTS) -> Path:
    return write_sweep(folder, variants, baselines=TRAINED)


def figures(run: Path) -> dict[str, Any]:
    """Return the figures of a sweep's table by variant and generator, without what was timed."""
    rows = json.loads((run / "table.json").read_text())["rows"]
    return {
        f"{row['variant']} {row['of']}": {
            (metric, name): cell["value"]
            for metric, cells in row["figures"].items()
            for name, cell in cells.items()
            if name not in MEASURED
        }
        for row in rows
    }


def weights(run: Run) -> dict[str, bytes]:
    folder = run.baselines / "pix2pix" / "weights"
    return {name: (folder / name).read_bytes() for name in OwnedFolder(folder).files()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A sweep of two variants that train alike; its folder, and the trainings that were run."""
    folder, trainings = tmp_path_factory.mktemp("whole"), []

    def run(stages: Sequence[str], arguments: Sequence[str], accelerate: Path | None) -> int:
        if "--architecture" in arguments:
            before = set(Path(folder).rglob("checkpoint-*"))
            code = run_here(stages, arguments, accelerate)
            trainings.extend(Path(arguments[1]).stem for _ in {*Path(folder).rglob("checkpoint-*")} - before)
            return code
        return run_here(stages, arguments, accelerate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants_module, "run_stages", run)
        sweep(trained_sweep(folder), [], False, None)
    return folder / "run", trainings


def test_a_shared_training_gives_what_the_variant_would_have_trained(
    whole: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, trainings = whole
    assert set(trainings) == {"first"}
    first, more = Run(run / "first"), Run(run / "more")
    model = "pix2pix/weights/generator/diffusion_pytorch_model.safetensors"
    assert (first.baselines / model).samefile(more.baselines / model)
    monkeypatch.setattr(variants_module, "run_stages", run_here)
    sweep(trained_sweep(tmp_path, {"more": VARIANTS["more"]}), [], False, None)
    alone = Run(tmp_path / "run" / "more")
    assert weights(more) == weights(alone)
    contracts = [read_json(one.synthetic / "pix2pix" / "contract.json", "") for one in (more, alone)]
    assert contracts[0] == contracts[1]
    names = ["more pix2pix", "more real images"]
    assert figures(tmp_path / "run") == {name: figures(run)[name] for name in names}
    assert read_record(more, "baselines/pix2pix").key == read_record(alone, "baselines/pix2pix").key  # type: ignore[union-attr]


def killed_at(place: str, path: Path) -> None:
    """Run the sweep of a file in this process, which is killed at a place, as by `kill -9`."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_second_call(original: Callable[..., None]) -> Callable[..., None]:
        calls: list[object] = []

        def call(*arguments: Any) -> None:
            calls.append(arguments)
            die() if len(calls) > 1 else original(*arguments)

        return call

    variants_module.run_stages = run_here  # type: ignore[assignment]
    if place == "training":
        loop.save_checkpoint = die_in_second_call(loop.save_checkpoint)
    elif place == "links":  # the first folder is the dataset
        sharing._link_folder = die_in_second_call(sharing._link_folder)
    else:
        sharing._copy_logs = die_in_second_call(sharing._copy_logs)
    sweep(path, [], False, None)


@pytest.mark.parametrize("place", ["training", "links", "logs"])
def test_a_killed_sweep_is_resumed_to_the_same_table(
    whole: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    path = trained_sweep(tmp_path)
    process = FORKS.Process(target=killed_at, args=(place, path))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / "table.json").exists()
    monkeypatch.setattr(variants_module, "run_stages", run_here)
    sweep(path, [], False, None)
    assert figures(tmp_path / "run") == figures(whole[0])
    assert weights(Run(tmp_path / "run" / "more")) == weights(Run(whole[0] / "more"))
    assert not list((tmp_path / "run").rglob("*.maskloom-tmp"))


def test_a_killed_stage_fails_its_variant_alone_and_is_resumed(
    whole: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The process of the first variant's training gets a real `kill -9` after a checkpoint."""
    path, begun = trained_sweep(tmp_path), tmp_path / "run" / "first" / "baselines" / "pix2pix" / "checkpoint-1"

    def kill_training() -> None:
        end = time.monotonic() + 200
        while not begun.is_dir() and time.monotonic() < end:
            time.sleep(0.001)
        for child in psutil.Process().children():
            if any("maskloom.train_baselines" in word for word in child.cmdline()):
                child.kill()

    def run(stages: Sequence[str], arguments: Sequence[str], accelerate: Path | None) -> int:
        if arguments[0] == "--config" and Path(arguments[1]).stem == "first" and "--architecture" in arguments:
            watcher = threading.Thread(target=kill_training)
            watcher.start()
            code = run_stages(stages, arguments, accelerate)
            watcher.join()
            assert code == 128 + signal.SIGKILL
            return code
        return run_here(stages, arguments, accelerate)

    monkeypatch.setattr(variants_module, "run_stages", run)
    with pytest.raises(MaskLoomError, match=r"^1 of 2 runs failed \(first at baselines\)"):
        sweep(path, [], False, None)
    assert set(figures(tmp_path / "run")) == {"more pix2pix", "more real images"}
    monkeypatch.setattr(variants_module, "run_stages", run_here)
    sweep(path, [], False, None)
    assert figures(tmp_path / "run") == figures(whole[0])


def trained_run(folder: Path, key: str = "a", names: Sequence[str] = ("controlnet",)) -> Run:
    """Write what the stage `train` leaves, with fake weights."""
    run = Run(folder)
    for name in names:
        weights_folder = run.generator / name
        weights_folder.mkdir(parents=True, exist_ok=True)
        (weights_folder / "model.safetensors").write_text(f"{key} {name}")
        seal_folder(weights_folder)
    run.mark()
    OwnedFolder(run.generator).mark()
    record_outputs(run, "train", [run.generator / name for name in names], key=key)
    (run.logs("train") / "metrics.jsonl").write_text("{}\n")
    return run


def test_weights_of_another_training_are_replaced_whole(tmp_path: Path):
    older, newer = trained_run(tmp_path / "a", "a", ("controlnet", "lora")), trained_run(tmp_path / "b", "b")
    target = Run(tmp_path / "c")
    assert share_training(older, target, "train")
    assert (target.generator / "lora" / "model.safetensors").read_text() == "a lora"
    inode = (target.logs("train") / "stage.json").stat().st_ino
    assert share_training(older, target, "train")
    assert (target.logs("train") / "stage.json").stat().st_ino == inode
    assert share_training(newer, target, "train")
    assert not (target.generator / "lora").exists()
    assert (target.generator / "controlnet" / "model.safetensors").read_text() == "b controlnet"
    assert read_record(target, "train").key == "b"  # type: ignore[union-attr]


def test_damaged_weights_and_records_are_shared_again(tmp_path: Path):
    source, target = trained_run(tmp_path / "a"), Run(tmp_path / "b")
    share_training(source, target, "train")
    weights_file = target.generator / "controlnet" / "model.safetensors"
    weights_file.unlink()  # a link: writing to it would change both
    weights_file.write_text("damaged")
    share_training(source, target, "train")
    assert weights_file.read_text() == "a controlnet"
    (target.logs("train") / "stage.json").write_text("{")
    share_training(source, target, "train")
    assert read_record(target, "train") == read_record(source, "train")


def test_a_training_of_its_own_and_the_users_files_stay(tmp_path: Path):
    source, own = trained_run(tmp_path / "a"), trained_run(tmp_path / "b", "other")
    (own.generator / "checkpoint-1").mkdir()
    assert not share_training(source, own, "train")
    assert read_record(own, "train").key == "other"  # type: ignore[union-attr]
    foreign = Run(tmp_path / "c")
    foreign.mark()
    (foreign.generator / "controlnet").mkdir(parents=True)
    (foreign.generator / "controlnet" / "mine").write_text("mine")
    with pytest.raises(MaskLoomError, match=r"controlnet: holds files that MaskLoom did not write \(mine\)"):
        share_training(source, foreign, "train")
    assert (foreign.generator / "controlnet" / "mine").read_text() == "mine"
    with pytest.raises(MaskLoomError, match=r"stage\.json: missing; run the sweep again"):
        share_training(foreign, Run(tmp_path / "d"), "train")


@pytest.mark.parametrize("taken", [True, False])
def test_what_is_taken_over_is_not_run_again_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool):
    calls = calls_of(monkeypatch)
    monkeypatch.setattr(variants_module, "share_dataset", lambda *_: None)
    monkeypatch.setattr(variants_module, "share_training", lambda *_: taken)
    finished: dict[str, Any] = {}
    for variant in variants_of(write_sweep(tmp_path, {"a": {}, "b": {"generate": {"num_images": 5}}})):
        calls.clear()
        assert variants_module.run_variant(variant, finished, True, None) == ""
    training = ["baselines", *([] if taken else ["--force"]), "--architecture", "pix2pix"]
    assert [["prepare"], ["train", "--force"], training, ["baselines"], ["generate", "--force"]] == calls[:5]


def test_variants_share_what_they_train_alike(tmp_path: Path):
    changes = {
        "images": {"generate": {"num_images": 5}},
        "steps": {"baselines": {"pix2pix": {"max_train_steps": 3}}},
        "seed": {"seed": 1},
        "data": {"data": {"image_size": 64}},
        "train": {"train": {"pretrained_model_name_or_path": "assets/nano-sd"}},
    }
    plain, *others = [one.shared_keys for one in variants_of(write_sweep(tmp_path, {"plain": {}, **changes}))]
    assert [one["baselines/pix2pix"] == plain["baselines/pix2pix"] for one in others] == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert ["train" in one for one in others] == [False, False, False, False, True]


def test_a_variant_that_cannot_take_over_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls_of(monkeypatch)  # nothing is written, so there is nothing to take over
    first, second = variants_of(write_sweep(tmp_path, {"a": {}, "b": {}}))
    finished: dict[str, Any] = {}
    assert variants_module.run_variant(first, finished, False, None) == ""
    assert variants_module.run_variant(second, finished, False, None) == "prepare"
    assert "error: " in (printed := capsys.readouterr()).err + printed.out
