"""What a training tells about itself: held-out losses, mask adherence, the verdict on the
condition, pictures.
"""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import CometMLTracker, WandBTracker
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.config.train import AdherenceConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.report.curves import training_curves
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task, train_stage
from maskloom.train_controlnet.validation.adherence import SEGMENTER_FILE
from maskloom.train_controlnet.validation.samples import configured_requests, sample_grid, show_in_trackers
from maskloom.train_controlnet.validation.verdict import (
    clearly_above,
    earlier_verdicts,
    right_masks_help,
    verdict,
    verdict_line,
)
from tests.tiny_backbone import build_tiny_controlnet
from tests.tiny_datasets import tiny_description, write_tiny_run
from tests.train_controlnet.conftest import tiny_config

ADHERENCE = {"num_images": 8, "num_inference_steps": 2, "image_size": 32, "steps": 20}
BINS = 4
QUICK = {"train_batch_size": 8, "validation_samples": 4, "checkpointing_steps": 100}
NANO_SD = Path(__file__).parents[2] / "assets" / "nano-sd"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with enough validation masks for a verdict; the last one has no foreground."""
    run = tmp_path_factory.mktemp("insight")

    def empty_last(sample: Any) -> None:
        if sample.sample_id == "validation-0010":
            sample.mask[:] = 0

    write_tiny_run(run, {}, {"train": 12, "validation": 11}, change=empty_last)
    return run / "dataset"


def experiment(folder: Path, data: Path, backbone: Path, **train: Any) -> ExperimentConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset").symlink_to(data)
    return tiny_config(folder, backbone, **train)


def task_of(config: ExperimentConfig, accelerator: Accelerator | None = None) -> DiffusionTask:
    run = Run(config.run_folder)
    return build_task(config, run, MaskPromptDataset.open(run.dataset), accelerator or Accelerator(cpu=True))


def logged(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "logs/train/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation/loss" in line]


def weights(run: Path) -> bytes:
    return (run / "generator/controlnet/diffusion_pytorch_model.safetensors").read_bytes()


# The loss with the right and with another conditioning image


def test_a_fresh_controlnet_gains_nothing_from_the_right_mask(tmp_path: Path, data: Path, backbone: Path) -> None:
    figures = task_of(experiment(tmp_path, data, backbone)).validate(1)
    bins = [f"condition_gain_bin_{i}" for i in range(BINS)]
    assert [figures[name] for name in ("condition_gain", *bins)] == [0.0] * (1 + BINS)
    assert (figures["condition_followed"], figures["condition_ignored"]) == (0.0, 1.0)
    assert figures["loss"] == pytest.approx(np.mean([figures[f"loss_bin_{i}"] for i in range(BINS)]))


def test_the_gain_compares_losses_at_the_same_noise(tmp_path: Path, data: Path, backbone: Path) -> None:
    start = build_tiny_controlnet(backbone, tmp_path / "start")
    config = experiment(tmp_path / "run", data, backbone, controlnet_model_name_or_path=str(start))
    task = task_of(config)
    figures = task.validate(1)
    swapped = task.validator
    swapped.rows, swapped.others = swapped.others, swapped.rows
    other = task.validate(1)
    for name in ("", *(f"_bin_{i}" for i in range(BINS))):
        right, wrong, gain = figures[f"loss{name}"], other[f"loss{name}"], figures[f"condition_gain{name}"]
        assert right != wrong
        assert gain == pytest.approx(1 - right / wrong)


def test_without_a_controlnet_there_is_no_condition_to_judge(tmp_path: Path, data: Path, backbone: Path) -> None:
    figures = task_of(experiment(tmp_path, data, backbone, controlnet="none", lora=["unet"])).validate(3)
    assert set(figures) == {"loss", *(f"loss_bin_{i}" for i in range(BINS))}
    picture = np.asarray(Image.open(tmp_path / "logs/train/images/step-000003.png"))
    row = MaskPromptDataset.open(tmp_path / "dataset").split("validation")[0]
    assert picture.shape == (2 * 32, 3 * 32, 3)
    assert (picture[:32, :32] == np.asarray(row["conditioning_image"])).all()


def test_a_single_validation_row_has_no_other_mask(tmp_path: Path, backbone: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 4, "validation": 1})
    assert "condition_gain" not in task_of(tiny_config(tmp_path, backbone)).validate(1)


# Adherence


def test_adherence_reads_real_images_and_asks_with_the_words_of_others(
    tmp_path: Path, data: Path, backbone: Path
) -> None:
    task = task_of(experiment(tmp_path, data, backbone, adherence={**ADHERENCE, "num_images": 10, "steps": 150}))
    meter = task.validator.meter
    assert meter is not None
    rows = list(MaskPromptDataset.open(data).split("validation"))
    seen = {np.asarray(row["conditioning_image"]).tobytes(): i for i, row in enumerate(rows)}
    asked = [seen[request.conditioning.tobytes()] for request in meter.requests]
    assert sorted(asked) == list(range(10))  # the eleventh has no foreground
    assert [rows[i]["label"] for i in asked] == [0] * 5 + [1] * 5
    assert [request.prompt for request in meter.requests] == [rows[i]["text"] for i in (asked[-1], *asked[:-1])]
    real = [np.repeat(np.asarray(rows[i]["image"])[..., None], 3, axis=2) for i in asked]
    faithful, of_the_words = meter.reading(real), meter.reading([real[-1], *real[:-1]])
    assert faithful.real.mean() > 0.85
    assert (faithful.asked == faithful.real).all()
    assert (of_the_words.shuffled == np.roll(faithful.real, 1)).all()
    assert clearly_above(faithful.asked, faithful.shuffled)
    assert not clearly_above(of_the_words.asked, of_the_words.shuffled)
    assert faithful.figures() == {
        "adherence": faithful.real.mean(),
        "adherence_shuffled": faithful.shuffled.mean(),
        "adherence_real": faithful.real.mean(),
    }


def test_the_reader_is_trained_once(tmp_path: Path, data: Path, backbone: Path) -> None:
    config = experiment(tmp_path, data, backbone, adherence=ADHERENCE)
    file = tmp_path / "generator" / SEGMENTER_FILE
    figures = task_of(config).validate(1)
    written = file.stat().st_mtime_ns
    assert task_of(config).validate(2) == figures
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:-8])  # damaged: made again
    assert task_of(config).validate(3) == figures
    longer = {"adherence": AdherenceConfig(**{**ADHERENCE, "steps": 31})}
    before = load_file(file)
    task_of(config.model_copy(update={"train": config.train.model_copy(update=longer)}))
    assert any(not torch.equal(value, before[name]) for name, value in load_file(file).items())


def test_colour_images_are_read_in_colour(tmp_path: Path, backbone: Path) -> None:
    def coloured(sample: Any) -> None:
        sample.image = np.stack([sample.image, 255 - sample.image, sample.image // 2], axis=2)

    write_tiny_run(
        tmp_path, {}, {"train": 8, "validation": 8}, description=tiny_description(32, channels=3), change=coloured
    )
    meter = task_of(tiny_config(tmp_path, backbone, adherence={**ADHERENCE, "image_size": [16, 24]})).validator.meter
    assert meter is not None
    rows = {
        np.asarray(row["conditioning_image"]).tobytes(): row
        for row in MaskPromptDataset.open(tmp_path / "dataset").split("validation")
    }
    reading = meter.reading([np.asarray(rows[request.conditioning.tobytes()]["image"]) for request in meter.requests])
    assert (reading.asked == reading.real).all()


def test_a_small_lesion_is_still_there_at_the_readers_size(tmp_path: Path, backbone: Path) -> None:
    def dot(sample: Any) -> None:
        sample.mask[:] = 0
        sample.mask[9, 9] = 1

    write_tiny_run(tmp_path, {}, {"train": 8, "validation": 8}, change=dot)
    meter = task_of(tiny_config(tmp_path, backbone, adherence={**ADHERENCE, "image_size": 16})).validator.meter
    assert meter is not None
    assert meter.masks.sum(axis=(1, 2)).tolist() == [1] * 8


def test_adherence_without_masks_is_refused(tmp_path: Path, backbone: Path) -> None:
    def without_mask(sample: Any) -> None:
        sample.mask = None

    about = tiny_description().model_copy(update={"mask_classes": (), "palette": (), "conditioning": "edges"})
    write_tiny_run(tmp_path, {}, {"train": 4, "validation": 8}, description=about, change=without_mask)
    with pytest.raises(MaskLoomError, match=r"train\.adherence: dataset tiny has no masks to follow"):
        task_of(tiny_config(tmp_path, backbone, adherence=ADHERENCE))


def test_adherence_without_masked_train_rows_is_refused(tmp_path: Path, backbone: Path) -> None:
    def only_validation(sample: Any) -> None:
        if sample.sample_id.startswith("train"):
            sample.mask = None

    write_tiny_run(tmp_path, {}, {"train": 4, "validation": 8}, change=only_validation)
    with pytest.raises(MaskLoomError, match=r"train\.adherence: no train image has a mask"):
        task_of(tiny_config(tmp_path, backbone, adherence=ADHERENCE))


@pytest.mark.parametrize(("validation", "found"), [(7, 7), (0, 0)])
def test_adherence_with_few_masks_is_refused(tmp_path: Path, backbone: Path, validation: int, found: int) -> None:
    write_tiny_run(tmp_path, {}, {"train": 4, "validation": validation} if validation else {"train": 4})
    with pytest.raises(MaskLoomError, match=rf"train\.adherence: {found} validation images have a mask"):
        task_of(tiny_config(tmp_path, backbone, adherence=ADHERENCE))


def test_what_adherence_lacks_is_told_before_the_caches_fill(tmp_path: Path, backbone: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 4, "validation": 7})
    with pytest.raises(MaskLoomError, match=r"train\.adherence: 7 validation images"):
        train_stage(tiny_config(tmp_path, backbone, adherence=ADHERENCE), force=False)
    assert not (tmp_path / "generator").exists()


def test_adherence_without_a_controlnet_is_refused(tmp_path: Path, data: Path, backbone: Path) -> None:
    config = experiment(tmp_path, data, backbone, adherence=ADHERENCE, controlnet="none", lora=["unet"])
    with pytest.raises(MaskLoomError, match=r"train\.adherence: without a ControlNet"):
        task_of(config)


@pytest.mark.parametrize("size", [20, 8, [32, 36]])
def test_sizes_that_the_reader_cannot_halve_are_refused(size: Any) -> None:
    with pytest.raises(MaskLoomError, match=r"both sides must be multiples of 8, and at least 16"):
        validated({"image_size": size}, AdherenceConfig, "c.yaml")


def test_images_are_sampled_in_half_precision(tmp_path: Path, data: Path, backbone: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    config = experiment(tmp_path, data, backbone, adherence=ADHERENCE, mixed_precision="bf16", **QUICK)
    task = task_of(config, accelerator)
    figures = task.validate(1)
    assert np.isfinite(list(figures.values())).all()
    assert not task.parts.controlnet._forward_hooks


# What is trained is not touched


def test_validation_leaves_no_trace(tmp_path: Path, data: Path, backbone: Path) -> None:
    config = experiment(tmp_path, data, backbone, adherence=ADHERENCE)
    task = task_of(config)

    def state() -> list[Any]:
        parts = [task.parts.controlnet, task.parts.unet, task.parts.vae, task.parts.text_encoder]
        tensors = [value.clone() for part in parts for value in part.state_dict().values()]
        modes = [module.training for part in parts for module in part.modules()]
        tiles = [task.parts.vae.use_slicing, task.parts.vae.use_tiling]
        return [torch.get_rng_state(), *tensors, torch.tensor(modes), torch.tensor(tiles)]

    cache = sorted((tmp_path / "generator/cache").rglob("*"))
    before, numpy_state = state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    task.validate(1)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert np.random.get_state()[1].tobytes() == numpy_state  # noqa: NPY002
    assert sorted((tmp_path / "generator/cache").rglob("*")) == cache


def test_networks_are_as_before_even_if_a_validation_fails(
    tmp_path: Path, data: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What raises here is the sampling of pictures, the innermost of the blocks that change
    something.
    """
    task = task_of(experiment(tmp_path, data, backbone))
    networks, hooks = dict(task.networks), len(task.parts.controlnet._forward_hooks)

    def failing(*_: Any, **__: Any) -> None:
        raise KeyError

    monkeypatch.setattr(task.parts.vae, "decode", failing)
    with pytest.raises(KeyError):
        task.validate(1)
    assert task.networks == networks
    assert all(module.training for network in networks.values() for module in network.modules())
    assert len(task.parts.controlnet._forward_hooks) == hooks


@pytest.mark.parametrize("lora", [[], ["text_encoder"]])
def test_the_trained_weights_do_not_depend_on_validation(
    tmp_path: Path, data: Path, backbone: Path, lora: list[str]
) -> None:
    watched = {"adherence": ADHERENCE, "validation_steps": 1}
    unwatched = {"num_validation_images": 0, "validation_steps": 100}
    for name, settings in (("watched", watched), ("unwatched", unwatched)):
        config = experiment(tmp_path / name, data, backbone, lora=lora, max_train_steps=3, **QUICK, **settings)
        train_stage(config, force=False)
    assert weights(tmp_path / "watched") == weights(tmp_path / "unwatched")


def test_a_resumed_training_logs_the_same(
    tmp_path: Path, data: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 1, "num_validation_images": 0}
    config = experiment(tmp_path, data, backbone, adherence=ADHERENCE, **{**QUICK, **steps})
    train_stage(config, force=False)
    log, said, bytes_before = logged(tmp_path), capsys.readouterr().err, weights(tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    for path in ("logs/train/stage.json", "generator/checkpoint-4", "generator/controlnet"):
        doomed = tmp_path / path
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    train_stage(config, force=False)
    assert logged(tmp_path) == log
    assert weights(tmp_path) == bytes_before
    news_before = [line for line in said.splitlines() if "mask is being" in line]
    assert [line for line in capsys.readouterr().err.splitlines() if "mask is being" in line] == news_before[-1:]


# The verdict


def test_clearly_above_asks_for_more_than_luck() -> None:
    low = np.linspace(0.2, 0.9, 8)
    assert clearly_above(low + np.linspace(0.01, 0.02, 8), low)
    assert not clearly_above(low, low)
    assert not clearly_above(low, low + np.linspace(0.01, 0.02, 8))
    mixed = np.array([0.01, 0.02, 0.03, 0.04, 0.05, -0.06, 0.07, -0.08])
    assert not clearly_above(low + mixed, low)
    few = low[:6]
    assert not clearly_above(few + np.linspace(0.01, 0.02, 6), few)  # p = 1/64: six images can convince nobody


def test_a_gain_must_be_clear_and_more_than_nothing() -> None:
    right = np.linspace(0.1, 0.5, 20).reshape(2, 10)
    noise = np.linspace(1e-5, 2e-5, 10)
    assert right_masks_help(right, right * 1.01)
    assert not right_masks_help(right, right)
    assert not right_masks_help(right * 1.01, right)
    assert not right_masks_help(right, right * (1 + noise))  # of the right sign in every row, and nothing
    uneven = right.copy()
    uneven[:, 0] *= 2  # one row alone makes the mean
    assert not right_masks_help(right, uneven)


@pytest.mark.parametrize(
    ("gains", "in_images", "followed", "ignored"),
    [
        (False, None, 0, 1),
        (True, None, 1, 0),
        (False, False, 0, 1),
        (True, False, 0, 0),
        (False, True, 1, 0),
        (True, True, 1, 0),
    ],
)
def test_images_decide_on_following_and_both_on_ignoring(
    gains: bool, in_images: bool | None, followed: int, ignored: int
) -> None:
    assert verdict(gains, in_images) == {"condition_followed": followed, "condition_ignored": ignored}


def test_earlier_verdicts_are_those_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert earlier_verdicts(log, 5) == []
    verdicts = {"validation/condition_followed": 0.0, "validation/condition_ignored": 1.0}
    lines = [{"step": 2, "loss": 1.0}, *({"step": step, "validation/loss": 1.0, **verdicts} for step in (2, 4, 6))]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["step"] for line in earlier_verdicts(log, 6)] == [2, 4]
    assert earlier_verdicts(log, 3) == [{"step": 2, "condition_followed": 0.0, "condition_ignored": 1.0}]


IGNORED = {"condition_gain": 0.0004, "condition_followed": 0.0, "condition_ignored": 1.0}
FOLLOWED = {"condition_gain": 0.05, "condition_followed": 1.0, "condition_ignored": 0.0}


def told(step: int, figures: dict[str, float], *earlier: dict[str, float]) -> str | None:
    before = [{"step": 100.0 * (i + 1), **line} for i, line in enumerate(earlier)]
    return verdict_line(step, 1000, figures, before, tiny_config(Path("run"), Path("backbone")).train)


def test_an_ignored_mask_is_told_from_half_of_the_steps_on() -> None:
    assert told(499, IGNORED) is None
    line = told(500, IGNORED, IGNORED)
    assert line is not None
    assert line.startswith("warning: the mask is being ignored after 500 of 1000 steps")
    assert "changes the held-out loss by -0.04 %" in line
    assert "here 0.001" in line
    assert told(600, IGNORED, *[IGNORED] * 5) is None  # told at 500
    assert told(1000, IGNORED, *[IGNORED] * 9) is not None
    assert told(600, {**IGNORED, "condition_ignored": 0.0}) is None


def test_the_first_mask_that_is_followed_is_told() -> None:
    figures = {**FOLLOWED, "adherence": 0.612, "adherence_shuffled": 0.4, "adherence_real": 0.87}
    line = told(300, figures, IGNORED, IGNORED)
    assert line is not None
    assert line.startswith("the mask has been followed since step 300: ")
    assert "at Dice 0.61, another mask at 0.40 (real images show their own at 0.87)" in line
    assert told(400, figures, IGNORED, IGNORED, FOLLOWED) is None
    assert told(400, {**figures, "condition_followed": 0.0}) is None


# Pictures


def test_further_pictures_are_drawn_below_the_validation_rows(tmp_path: Path, data: Path, backbone: Path) -> None:
    row = MaskPromptDataset.open(data).split("validation")[3]
    row["conditioning_image"].save(tmp_path / "request.png")
    request = {"validation_prompt": ["toy imaging"], "validation_image": [str(tmp_path / "request.png")]}
    task_of(experiment(tmp_path / "run", data, backbone, num_validation_images=1, **request)).validate(1)
    picture = np.asarray(Image.open(tmp_path / "run/logs/train/images/step-000001.png"))
    assert picture.shape == (64, 96, 3)
    assert (picture[32:, :32] == np.asarray(row["conditioning_image"])).all()
    assert (picture[32:, 32:64] == 255).all()  # there is no real image


def test_no_pictures_are_drawn_where_none_are_wanted(tmp_path: Path, data: Path, backbone: Path) -> None:
    task_of(experiment(tmp_path, data, backbone, num_validation_images=0)).validate(1)
    assert not (tmp_path / "logs/train/images").exists()


def test_further_prompts_need_no_image_without_a_controlnet(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, controlnet="none", lora=["unet"], validation_prompt=["a", "b"])
    requests = configured_requests(config.train, [(16, 24), (32, 32)])
    assert [request.prompt for request in requests] == ["a", "b"]
    assert all(request.conditioning.shape == (16, 24, 3) for request in requests)


@pytest.mark.parametrize(
    ("name", "said"), [("none.png", "cannot be read"), ("small.png", "is 8 x 16, the dataset 32 x 32 or 16 x 24")]
)
def test_a_further_image_that_does_not_fit_is_named(tmp_path: Path, name: str, said: str) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "small.png")
    config = tiny_config(tmp_path, tmp_path, validation_prompt=["a"], validation_image=[str(tmp_path / name)])
    with pytest.raises(MaskLoomError, match=rf"train\.validation_image: .*{name} {said}"):
        configured_requests(config.train, [(32, 32), (16, 24)])


def test_missing_and_smaller_tiles_leave_white() -> None:
    tile, small = np.zeros((2, 3, 3), dtype=np.uint8), np.zeros((1, 3, 3), dtype=np.uint8)
    picture = sample_grid([[tile, None], [small, tile]])
    assert picture.shape == (4, 6, 3)
    assert (picture == 255).all(axis=2).tolist() == [[False] * 3 + [True] * 3] * 2 + [
        [False] * 6,
        [True] * 3 + [False] * 3,
    ]


def test_tensorboard_gets_the_grid(tmp_path: Path, data: Path, backbone: Path) -> None:
    config = experiment(tmp_path, data, backbone, report_to="tensorboard", max_train_steps=2)
    train_stage(config, force=False)
    (events,) = {path.parent for path in (tmp_path / "logs/train").rglob("events.out.*")}
    found = EventAccumulator(str(events)).Reload()
    (image,) = found.Images("validation")
    assert (image.step, image.width, image.height) == (2, 96, 64)
    assert found.Scalars("validation/condition_gain")[0].step == 2


def test_wandb_gets_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B is an extra and may be missing; accelerate's tracker, which calls it, is the real one."""
    sent: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Image=lambda picture: ("image", picture.shape)))
    tracker = WandBTracker("maskloom")
    tracker.run = types.SimpleNamespace(log=lambda values, step: sent.append((values, step)))
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [tracker]
    show_in_trackers(accelerator, np.zeros((4, 6, 3), dtype=np.uint8), 7)
    assert sent == [({"validation": [("image", (4, 6, 3))]}, 7)]


def test_comet_gets_the_grid() -> None:
    """Comet is an extra, too."""
    sent: list[Any] = []
    tracker = CometMLTracker("maskloom")
    tracker.writer = types.SimpleNamespace(log_image=lambda picture, **how: sent.append((picture.shape, how)))
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [tracker]
    show_in_trackers(accelerator, np.zeros((4, 6, 3), dtype=np.uint8), 7)
    assert sent == [((4, 6, 3), {"name": "validation", "step": 7})]


def test_the_report_draws_a_figure_beside_what_it_is_compared_with(tmp_path: Path) -> None:
    names = ("adherence", "adherence_shuffled", "adherence_real", "condition_gain", "condition_gain_bin_0")
    names += ("condition_followed", "condition_ignored", "loss")
    line = {"step": 1, "loss_scale": 1.0, **{f"validation/{name}": 0.5 for name in names}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    charts, _ = training_curves(tmp_path / "metrics.jsonl")
    assert {chart.title: len(chart.series) for chart in charts} == {
        "adherence": 3,
        "condition": 2,
        "condition gain": 1,
        "condition gain bin": 1,
        "loss": 1,
        "loss scale": 1,
    }


# The whole of it


def learnt(folder: Path, shuffled: bool) -> list[dict[str, Any]]:
    """Return the validations of a ControlNet for discs and squares on the small real backbone, 64 x
    64, at 50 and 100 steps.
    """
    write_tiny_run(folder, {}, {"train": 32, "validation": 16}, size=64)
    config = tiny_config(
        folder,
        NANO_SD,
        shuffle_conditioning=shuffled,
        max_train_steps=100,
        validation_steps=50,
        train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler="cosine",
        proportion_empty_prompts=1.0,
        use_ema=False,
        checkpointing_steps=1000,
        num_validation_images=0,
        validation_samples=16,
        adherence={"num_images": 16, "num_inference_steps": 6, "image_size": 32, "steps": 100},
    )
    train_stage(config, force=False)
    keys = (
        "adherence",
        "adherence_shuffled",
        "adherence_real",
        "condition_gain",
        "condition_followed",
        "condition_ignored",
    )
    return [{key: line[f"validation/{key}"] for key in keys} for line in logged(folder)]


def test_adherence_rises_with_the_right_masks_and_does_not_with_shuffled_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trainings that differ in `shuffle_conditioning` alone: 0.80 against 0.44 where chance is
    0.48 and 0.44.
    """
    half, end = learnt(tmp_path / "right", shuffled=False)
    said = capsys.readouterr().err
    assert end["adherence_real"] > 0.9
    assert end["adherence"] > max(half["adherence_shuffled"], end["adherence_shuffled"]) + 0.2
    assert end["condition_gain"] > 0.1
    assert (end["condition_followed"], end["condition_ignored"]) == (1, 0)
    assert "the mask has been followed since step" in said and "being ignored" not in said

    half, end = learnt(tmp_path / "shuffled", shuffled=True)
    said = capsys.readouterr().err
    for figures in (half, end):
        assert abs(figures["adherence"] - figures["adherence_shuffled"]) < 0.05
        assert abs(figures["condition_gain"]) < 0.005
        assert (figures["condition_followed"], figures["condition_ignored"]) == (0, 1)
    assert "the mask is being ignored after 100 of 100 steps" in said and "has been followed" not in said
