"""Does the generator know its training images by their loss?

A membership-inference probe. A generator that has memorised its training images denoises them better
than other real images. The denoising loss of real train images and of held-out ones is measured
with the networks that the stage `train` has left, and the AUC tells how well the loss alone tells
the two apart. Carlini et al., Extracting Training Data from Diffusion Models (2023),
arXiv:2301.13188; Matsumoto et al., Membership Inference Attacks against Diffusion Models (2023),
arXiv:2302.03262.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.statistics import Bootstrap, separation_interval, weighted_mean
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import EXPORTED
from maskloom.models.stable_diffusion.trained_pipeline import load_backbone, trained_parts, weights_digest
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.bounds import Rows, Timesteps
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.images import rgb_array
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.progress import progress
from maskloom.pipeline.results import Interval, MetricResult, Table, cell_text, skipped_result
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run

VERSION = 1
QUESTION = "Does the generator know its training images by their loss?"
FEW_GROUPS = 6
PURPOSE = "membership"  # of the random numbers


class Options(Section):
    """The images and timesteps of the probe."""

    images: Rows = Field(100, ge=2, le=2000, description="at most this many train images, and as many held-out ones")
    timesteps: list[Annotated[Timesteps, Field(ge=0)]] = Field(
        [50, 100, 200, 300, 400], min_length=1, max_length=100, description="of the noise schedule of the training"
    )


@dataclass(frozen=True)
class Side:
    """The losses of the train images, or of the held-out ones.

    Attributes:
        name: of the images, such as `real train`.
        losses: (N,) mean loss of each image over the timesteps.
        groups: the group of each image.
    """

    name: str
    losses: NDArray[np.float64]
    groups: list[str]


def own_inputs(run: Run, config: ExperimentConfig) -> dict[str, str]:
    """Return the digest of the trained weights and of the settings with which their loss is computed.

    Returns:
        `{"generator": digest}`; empty where nothing has been trained.

    Raises:
        MaskLoomError: the weights are damaged, or have changed since their training.
    """
    record = None if config.train is None else read_record(run, "train")
    if config.train is None or record is None:
        return {}
    train = config.train
    settings = [train.prediction_type, train.rescale_betas_zero_snr, train.prompt_chunks, train.max_train_samples]
    weights = weights_digest(config, run, trained_parts(config, run, EXPORTED))
    trained_on = record.inputs.get("dataset")
    return {"generator": value_digest([weights, trained_on, *settings, config.generate.mixed_precision])}


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare the losses of train images with those of held-out images.

    Raises:
        MaskLoomError: the weights are damaged, or a timestep is outside the noise schedule.
    """
    held_out = inputs.test if len(inputs.test) else inputs.validation
    reason = _obstacle(inputs, held_out)
    if inputs.config is None or reason:
        return skipped_result(QUESTION, reason or "no configuration is given")
    probe = LossProbe(inputs.config, inputs, options.timesteps)
    trained_on = inputs.config.fine_tuning.max_train_samples or len(inputs.train)
    chosen = [
        (one, drawn_rows(one.groups[:count], options.images, inputs.seed, one.split))
        for one, count in ((inputs.train, trained_on), (held_out, len(held_out)))
    ]
    with progress("measuring losses", sum(len(rows) for _, rows in chosen), "images") as advance:
        train, other = (_measured(probe, one, rows, advance) for one, rows in chosen)
    unknown = int((~np.isfinite(np.concatenate([train.losses, other.losses]))).sum())
    if unknown:
        return skipped_result(QUESTION, f"the loss of {unknown} images is not finite; set generate.mixed_precision=no")
    auc = separation_interval(train.losses, other.losses, train.groups, other.groups)
    groups = min(len(set(side.groups)) for side in (train, other))
    return MetricResult(
        question=QUESTION,
        verdict=verdict(auc, groups),
        tables=[_table(train, other, auc, options.timesteps, inputs.seed)],
        limits=[
            "A probe, not a guarantee: an attacker who knows more, or other timesteps, may find more.",
            "What the backbone knew of these images before the training counts too.",
            f"{other.name.capitalize()} images are of other groups than the train images and may differ from "
            "them in kind (device, pathology); then the losses differ without any memorisation.",
        ],
        values={
            "auc": auc.model_dump(),
            "timesteps": options.timesteps,
            "groups": {side.name: len(set(side.groups)) for side in (train, other)},
            "mean loss": {side.name: float(side.losses.mean()) for side in (train, other)},
        },
        n={side.name: len(side.losses) for side in (train, other)},
    )


def _obstacle(inputs: EvaluationInputs, held_out: ImageSet) -> str | None:
    """Return why the probe cannot run, or None."""
    if inputs.config is None or inputs.config.train is None:
        return (
            "the configuration has no section `train`; the probe reads the denoising loss of a fine-tuned "
            "backbone, which GANs and other baselines do not have"
        )
    record = read_record(Run(inputs.real.folder.parent), "train")
    if record is None:
        return "the stage train has not finished in this run, so there are no trained weights"
    if record.inputs.get("dataset", inputs.real.digest) != inputs.real.digest:
        return "the generator was trained on another version of the dataset; run train again"
    return None if len(held_out) else "there are no held-out real images (test or validation)"


def drawn_rows(groups: Sequence[str], most: int, seed: int, split: str) -> list[int]:
    """Return at most `most` rows, drawn from as many groups as possible: one of each group in turn.

    Args:
        groups: the group of each row.
        most: number of rows to draw.
        seed: the experiment's.
        split: the split of the rows.
    """
    import torch

    from maskloom.pipeline.training.randomness import keyed_generator

    order = torch.randperm(len(groups), generator=keyed_generator(seed, PURPOSE, split)).tolist()
    drawn: Counter[str] = Counter()
    turns = {}
    for row in order:
        turns[row] = drawn[groups[row]]
        drawn[groups[row]] += 1
    return sorted(sorted(order, key=lambda row: turns[row])[:most])


class LossProbe:
    """The trained networks of a run, and the noise that they have to remove."""

    def __init__(self, config: ExperimentConfig, inputs: EvaluationInputs, timesteps: Sequence[int]) -> None:
        """Load the networks with which `generate` samples, and the noise schedule of the training.

        Args:
            config: the experiment.
            inputs: give the run, the device and the seed.
            timesteps: the timesteps whose losses are averaged.

        Raises:
            MaskLoomError: the weights are damaged, or a timestep is outside the noise schedule.
        """
        import torch

        from maskloom.models.stable_diffusion.loading import load_noise_schedule
        from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder

        train, run = config.fine_tuning, Run(inputs.real.folder.parent)
        self.schedule = load_noise_schedule(
            BackboneSource.of(train), train.prediction_type, train.rescale_betas_zero_snr
        )
        length = self.schedule.config.num_train_timesteps
        if max(timesteps) >= length:
            raise MaskLoomError(
                f"evaluate.metrics.membership.timesteps: {max(timesteps)} is outside the backbone's noise schedule "
                f"of {length} steps; give numbers from 0 to {length - 1}"
            )
        parts = trained_parts(config, run, EXPORTED)
        weights_digest(config, run, parts)  # refuses damaged weights
        self.device, self.seed, self.numbers = torch.device(inputs.device), inputs.seed, list(timesteps)
        self.timesteps = torch.tensor(self.numbers, device=self.device)
        self.pipe = load_backbone(config, self.device, parts, inputs.real.description.sizes)
        self.encoder = PromptEncoder.of(self.pipe.tokenizer, self.pipe.text_encoder.config, train.prompt_chunks)
        self.has_controlnet = "controlnet" in parts

    def loss(self, row: dict[str, Any]) -> float:
        """Return the denoising loss of a row of the dataset, averaged over the timesteps.

        The latents are the mean of the VAE's posterior. The noise depends on (seed, sample,
        timestep) alone.
        """
        import torch

        from maskloom.models.stable_diffusion.objective import denoising_losses, prediction_target, sample_latents
        from maskloom.models.stable_diffusion.sampling import prompt_embedding
        from maskloom.pipeline.training.fixed_steps import normalised
        from maskloom.pipeline.training.randomness import keyed_generator

        vae, count = self.pipe.vae, len(self.numbers)
        with torch.inference_mode():
            images = normalised(rgb_array(row["image"])[None], str(self.device))
            moments = vae.encode(images.to(vae.dtype)).latent_dist.parameters.float()
            no_noise = torch.zeros_like(moments.chunk(2, dim=1)[0])
            latents = sample_latents(moments, no_noise, vae.config.scaling_factor).expand(count, -1, -1, -1)
            keys = [keyed_generator(self.seed, PURPOSE, row["sample_id"], number) for number in self.numbers]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=key) for key in keys]).to(self.device)
            noisy = self.schedule.add_noise(latents, noise, self.timesteps).to(vae.dtype)
            text = prompt_embedding(self.pipe, self.encoder, row["text"]).expand(count, -1, -1)
            residuals = self._residuals(noisy, text, row) if self.has_controlnet else {}
            prediction = self.pipe.unet(
                noisy, self.timesteps, encoder_hidden_states=text, return_dict=False, **residuals
            )[0]
            target = prediction_target(self.schedule, latents, noise, self.timesteps)
            return float(denoising_losses(prediction, target).mean())

    def _residuals(self, noisy: Any, text: Any, row: dict[str, Any]) -> dict[str, Any]:
        """Return what the ControlNet adds to the UNet for the row's own conditioning image."""
        import torch

        pixels = torch.from_numpy(rgb_array(row["conditioning_image"])).permute(2, 0, 1)
        conditioning = pixels.to(self.device, noisy.dtype).expand(len(noisy), -1, -1, -1) / 255
        down, middle = self.pipe.controlnet(
            noisy, self.timesteps, encoder_hidden_states=text, controlnet_cond=conditioning, return_dict=False
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def _measured(probe: LossProbe, image_set: ImageSet, rows: Sequence[int], advance: Any) -> Side:
    table, losses = image_set.dataset.split(image_set.split), []
    for row in rows:
        losses.append(probe.loss(table[row]))
        advance()
    return Side(image_set.name, np.array(losses), [image_set.groups[row] for row in rows])


def verdict(auc: Interval, groups: int) -> str:
    """Return what an AUC says.

    Args:
        auc: of train images against held-out ones; above 0.5 where train images have lower losses.
        groups: number of groups on the side that has fewer.
    """
    found = f"AUC {cell_text(auc)}"
    if auc.low is None or auc.high is None or groups < FEW_GROUPS:
        return f"Cannot tell ({found}): one side has fewer than {FEW_GROUPS} groups of images, only {groups}."
    if auc.low > 0.5:
        return f"Training images are recognised by their loss ({found}): the generator has memorised something of them."
    if auc.high < 0.5:
        return (
            f"Cannot tell ({found}): held-out images have the lower loss, so the two sides differ in kind, "
            "which hides what the generator may have memorised."
        )
    return f"{found}: no sign that training images can be recognised by their loss."


def _table(train: Side, other: Side, auc: Interval, timesteps: Sequence[int], seed: int) -> Table:
    means = [Bootstrap(side.groups, seed=seed).interval(weighted_mean(side.losses)) for side in (train, other)]
    return Table(
        title="Losses of train and held-out images",
        note="Denoising loss of the trained generator with each image's own prompt and conditioning image, averaged "
        f"over timesteps {', '.join(map(str, timesteps))}. AUC: the probability that a train image has a lower loss than a "
        "held-out one; 0.5 is chance. 95 % intervals over groups (bootstrap for losses, jackknife for the AUC).",
        columns=["images", "N", "groups", "loss", "AUC"],
        rows=[
            [side.name, len(side.losses), len(set(side.groups)), mean, auc if side is train else None]
            for side, mean in zip((train, other), means, strict=True)
        ],
    )
