"""The membership-inference probe: what it recognises, its figures, and where it says that it cannot
measure.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from transformers import CLIPTextModel

from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.metrics import membership
from maskloom.evaluate.metrics.membership import LossProbe, drawn_rows, own_inputs
from maskloom.evaluate.scores.statistics import separation_interval
from maskloom.models.stable_diffusion.prompt_encoding import load_prompt_encoder, text_states
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import rgb_array
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import seal_folder
from maskloom.pipeline.results import Interval, MetricResult
from maskloom.pipeline.runs.answers import current_answers
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.fixed_steps import normalised
from maskloom.pipeline.training.randomness import keyed_generator
from tests.evaluate.runs import answer, leave_training, tiny_config, tiny_inputs
from tests.records import record_outputs
from tests.tiny_backbone import build_tiny_backbone
from tests.tiny_datasets import write_tiny_run

NAME = "membership"
UNET_ONLY: dict[str, Any] = {"controlnet": "none", "sd_locked": False}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone whose latents have about unit variance between images."""
    folder = build_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 8.0}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tiny_run(tmp_path, {})
    return tmp_path


def inputs_of(run: Path, backbone: Path, **train: Any) -> EvaluationInputs:
    return tiny_inputs(run, (), pretrained_model_name_or_path=str(backbone), **train)


def leave_unet(run: Path, backbone: Path, steps: int) -> EvaluationInputs:
    """Train the UNet on the train images alone, leave it in the run, and return the inputs."""
    inputs = inputs_of(run, backbone, **UNET_ONLY)
    assert inputs.config is not None
    rows = list(inputs.train.dataset.split("train"))
    unet = UNet2DConditionModel.from_pretrained(backbone, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(backbone, subfolder="vae")
    tokens = load_prompt_encoder(inputs.config.fine_tuning).tokens([row["text"] for row in rows])
    schedule = DDPMScheduler.from_pretrained(backbone, subfolder="scheduler")
    with torch.no_grad():
        text = text_states(CLIPTextModel.from_pretrained(backbone, subfolder="text_encoder"), tokens)
        pixels = normalised(np.stack([rgb_array(row["image"]) for row in rows]), "cpu")
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    optimizer, draws = torch.optim.Adam(unet.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    known = torch.tensor(membership.Options().timesteps)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (24,), generator=draws)
        noise = torch.randn(24, *latents.shape[1:], generator=draws)
        timesteps = known[torch.randint(len(known), (24,), generator=draws)]
        noisy = schedule.add_noise(latents[chosen], noise, timesteps)
        prediction = unet(noisy, timesteps, encoder_hidden_states=text[chosen]).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
    unet.save_pretrained(run / "generator" / "unet")
    seal_folder(run / "generator" / "unet")
    record_outputs(Run(run), "train", [run / "generator" / "unet"])
    return inputs


def auc_of(result: MetricResult) -> Interval:
    return Interval(**result.values["auc"])


def test_a_generator_that_memorised_its_images_is_recognised(run: Path, backbone: Path) -> None:
    result = answer(leave_unet(run, backbone, steps=250), NAME)
    auc = auc_of(result)
    assert auc.value is not None
    assert auc.value > 0.9
    assert result.verdict.startswith("Training images are recognised by their loss (AUC ")
    assert result.values["mean loss"]["real train"] < result.values["mean loss"]["real test"]


def test_a_fresh_generator_is_not(run: Path, backbone: Path) -> None:
    result = answer(leave_unet(run, backbone, steps=0), NAME)
    auc = auc_of(result)
    assert auc.low is not None
    assert auc.high is not None
    assert auc.low < 0.5 < auc.high
    assert result.verdict.endswith("no sign that training images can be recognised by their loss.")


def test_the_auc_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    train, other = random.normal(size=40).round(1), random.normal(0.4, 1, 23).round(1)  # with ties
    found = separation_interval(train, other, [str(i) for i in range(40)], [f"h{i}" for i in range(23)])
    scores = -np.concatenate([train, other])
    assert found.value == pytest.approx(roc_auc_score([1] * 40 + [0] * 23, scores), abs=1e-9)


def test_the_interval_is_that_of_a_jackknife_over_groups() -> None:
    random = np.random.default_rng(1)
    train, other = random.normal(size=30), random.normal(0.5, 1, 20)
    groups = [f"t{i // 3}" for i in range(30)], [f"h{i // 2}" for i in range(20)]
    scores, member = -np.concatenate([train, other]), np.array([1] * 30 + [0] * 20)
    of = np.array([*groups[0], *groups[1]])
    left_out = np.array([roc_auc_score(member[of != one], scores[of != one]) for one in sorted(set(of))])
    blocks = len(left_out)
    error = np.sqrt((blocks - 1) ** 2 / blocks * left_out.var(ddof=1))
    reach = student.ppf(0.975, blocks - 1) * error
    found = separation_interval(train, other, *groups)
    value = roc_auc_score(member, scores)
    assert [found.low, found.high] == pytest.approx([value - reach, value + reach], abs=1e-9)


def test_an_interval_ends_at_0_and_1_and_needs_two_groups_on_each_side() -> None:
    low, high = np.array([0.0, 1.0, 5.0]), np.array([4.0, 6.0, 7.0])
    found = separation_interval(low, high, ["a", "b", "c"], ["d", "e", "f"])
    assert found.high == 1.0
    assert separation_interval(low, high, ["a", "b", "c"], ["d"] * 3) == Interval(value=found.value)


@pytest.mark.parametrize(
    ("auc", "groups", "words"),
    [
        ((0.53, 0.46, 0.60), 9, "AUC 0.530 [0.460, 0.600]: no sign that training images can be recognised"),
        ((0.71, 0.60, 0.80), 9, "Training images are recognised by their loss (AUC 0.710 [0.600, 0.800]): "),
        ((0.30, 0.20, 0.40), 9, "Cannot tell (AUC 0.300 [0.200, 0.400]): held-out images have the lower loss"),
        (
            (0.71, 0.60, 0.80),
            5,
            "Cannot tell (AUC 0.710 [0.600, 0.800]): one side has fewer than 6 groups of images, only 5.",
        ),
        ((0.71, None, None), 1, "Cannot tell (AUC 0.710): one side has fewer than 6 groups of images, only 1."),
    ],
)
def test_the_verdict(auc: tuple[float, float | None, float | None], groups: int, words: str) -> None:
    value, low, high = auc
    assert membership.verdict(Interval(value=value, low=low, high=high), groups).startswith(words)


def test_rows_are_drawn_from_as_many_groups_as_possible() -> None:
    groups = ["big"] * 50 + ["a", "a", "b", "c"]
    rows = drawn_rows(groups, 4, 0, "train")
    assert {groups[row] for row in rows} == {"big", "a", "b", "c"}
    assert rows == drawn_rows(groups, 4, 0, "train") == sorted(rows)
    assert rows != drawn_rows(groups, 4, 1, "train")
    assert drawn_rows(groups, 100, 0, "train") == list(range(54))


def test_the_loss_is_that_of_the_training_with_keyed_noise(run: Path, backbone: Path) -> None:
    leave_training(run, backbone)
    inputs = inputs_of(run, backbone, prediction_type="v_prediction")
    assert inputs.config is not None
    probe, (row, *_) = LossProbe(inputs.config, inputs, [100]), list(inputs.train.dataset.split("train"))
    pipe, step = probe.pipe, torch.tensor([100])
    with torch.no_grad():
        pixels = torch.from_numpy(rgb_array(row["image"])).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mode() * 8.0
        noise = torch.randn(latents.shape[1:], generator=keyed_generator(0, "membership", row["sample_id"], 100))[None]
        kept = probe.schedule.alphas_cumprod[100]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        text = text_states(pipe.text_encoder, probe.encoder.tokens([row["text"]]))
        control = torch.from_numpy(rgb_array(row["conditioning_image"])).permute(2, 0, 1)[None] / 255
        down, middle = pipe.controlnet(noisy, step, text, control, return_dict=False)
        predicted = pipe.unet(
            noisy, step, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    assert probe.loss(row) == pytest.approx(float(((predicted - velocity) ** 2).mean()), rel=1e-5)


def test_the_probe_repeats_and_follows_its_options(run: Path, backbone: Path) -> None:
    leave_training(run, backbone)
    inputs = inputs_of(run, backbone, max_train_samples=10)
    first, again = (answer(inputs, NAME, timesteps=[10, 900]) for _ in range(2))
    assert first.as_json() == again.as_json()
    assert first.n == {"real train": 10, "real test": 12}
    assert answer(inputs, NAME, images=4).n == {"real train": 4, "real test": 4}
    assert answer(replace(inputs, seed=1), NAME, timesteps=[10, 900]).values != first.values


def test_validation_images_stand_in_for_test_images(tmp_path: Path, backbone: Path) -> None:
    write_tiny_run(tmp_path, {}, counts={"train": 12, "validation": 4})
    leave_training(tmp_path, backbone)
    assert answer(inputs_of(tmp_path, backbone), NAME).n == {"real train": 12, "real validation": 4}


def test_without_held_out_images_it_says_so(tmp_path: Path, backbone: Path) -> None:
    write_tiny_run(tmp_path, {}, counts={"train": 12})
    leave_training(tmp_path, backbone)
    assert answer(inputs_of(tmp_path, backbone), NAME).skipped == (
        "there are no held-out real images (test or validation)"
    )


def test_without_a_section_train_it_says_so(run: Path, backbone: Path) -> None:
    inputs = inputs_of(run, backbone)
    assert inputs.config is not None
    for config in (None, inputs.config.model_copy(update={"train": None})):
        result = answer(replace(inputs, config=config), NAME)
        assert result.skipped is not None
        assert result.skipped.startswith("the configuration has no section `train`")
        assert "GANs" in result.skipped
        assert config is None or own_inputs(Run(run), config) == {}


def test_without_a_finished_training_it_says_so(run: Path, backbone: Path) -> None:
    inputs = inputs_of(run, backbone)
    assert inputs.config is not None
    assert "the stage train has not finished in this run" in answer(inputs, NAME).verdict
    assert own_inputs(Run(run), inputs.config) == {}


def test_a_generator_of_another_dataset_is_not_measured(run: Path, backbone: Path) -> None:
    leave_training(run, backbone, inputs={"dataset": "0" * 64})
    assert answer(inputs_of(run, backbone), NAME).skipped == (
        "the generator was trained on another version of the dataset; run train again"
    )


def test_losses_that_are_not_finite(run: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_training(run, backbone)
    monkeypatch.setattr(LossProbe, "loss", lambda self, row: float("nan"))
    assert answer(inputs_of(run, backbone), NAME).skipped == (
        "the loss of 36 images is not finite; set generate.mixed_precision=no"
    )


def test_a_timestep_outside_the_schedule(run: Path, backbone: Path) -> None:
    leave_training(run, backbone)
    with pytest.raises(MaskLoomError, match=r"timesteps: 1000 is outside .* of 1000 steps; give numbers from 0 to 999"):
        answer(inputs_of(run, backbone), NAME, timesteps=[5, 1000])


def test_damaged_weights_are_refused(run: Path, backbone: Path) -> None:
    leave_training(run, backbone)
    config = tiny_config(run, {NAME: {}}, (), pretrained_model_name_or_path=str(backbone))
    inputs = inputs_of(run, backbone)
    with (run / "generator" / "controlnet" / "config.json").open("a") as file:
        file.write(" ")
    for refused in (lambda: evaluate(config, force=False), lambda: answer(inputs, NAME)):
        with pytest.raises(MaskLoomError, match="damaged since train wrote it; run train again"):
            refused()


def test_that_nothing_is_trained_holds_until_something_is(run: Path, backbone: Path) -> None:
    config = tiny_config(run, {NAME: {"images": 4}}, (), pretrained_model_name_or_path=str(backbone))
    evaluate(config, force=False)
    digests = {"real": MaskPromptDataset.open(run / "dataset").digest}
    (shown,), remarks = current_answers(Run(run), digests)
    assert shown.skipped is not None and "has not finished in this run" in shown.skipped and not remarks
    leave_training(run, backbone, results={"weights_digest": "w"})
    shown, remarks = current_answers(Run(run), digests)
    assert not shown
    assert remarks == [
        f"{NAME}: the answer is about other weights than train has trained since, and is not shown; run maskloom evaluate."
    ]
    evaluate(config, force=False)
    (shown,), remarks = current_answers(Run(run), digests)
    assert shown.skipped is None and not remarks


def test_only_its_own_key_follows_the_weights(run: Path, backbone: Path) -> None:
    options = {"quality": {"extractor_size": 32, "pairs": 20}, NAME: {"images": 4}}
    config = tiny_config(run, options, (), pretrained_model_name_or_path=str(backbone))

    def keys() -> dict[str, str]:
        evaluate(config, force=False)
        return {name: json.loads((run / "evaluation" / f"{name}.json").read_text())["key"] for name in options}

    untrained = keys()
    leave_training(run, backbone, results={"weights_digest": "w"})
    trained = keys()
    answers = {name: json.loads((run / "evaluation" / f"{name}.json").read_text()) for name in options}
    assert answers[NAME]["weights"] == {"train": "w"}  # the report hides it once others are trained
    assert "weights" not in answers["quality"]
    assert trained["quality"] == untrained["quality"]
    assert trained[NAME] != untrained[NAME]
    path = run / "generator" / "controlnet" / "config.json"
    path.write_text(path.read_text() + "\n")
    seal_folder(path.parent)
    record_outputs(Run(run), "train", [path.parent])
    retrained = keys()
    assert retrained["quality"] == untrained["quality"]
    assert retrained[NAME] not in (trained[NAME], untrained[NAME])
