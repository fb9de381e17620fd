"""The needs of a training, before it starts: parameters, GPU memory by phase, cache on disk.

Weights are never read: the networks are built from `config.json` on the meta device, and one step
is run on them. See docs/plan.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Self

from maskloom.models.stable_diffusion.prompt_encoding import training_prompts
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.training.precision import DTYPES
from maskloom.train_controlnet.memory_plan.networks import planned_networks
from maskloom.train_controlnet.memory_plan.phases import (
    StepMemory,
    encoding_peak,
    latent_shape,
    step_memory,
    validation_peak,
)
from maskloom.train_controlnet.memory_plan.prepared import matching_dataset
from maskloom.train_controlnet.networks import Networks

if TYPE_CHECKING:
    from torch import nn

GIB = 2**30
RESERVE_BYTES = 3 * GIB // 4  # a CUDA context and the workspaces of cuDNN and cuBLAS
RESERVE_SHARE = 0.05  # for gaps between the allocator's blocks
MIN_8BIT_ELEMENTS = 4096  # in bitsandbytes, smaller tensors keep two float32 moments
BLOCK_8BIT = 256  # number of elements with a common scale
# Settings that do not change the memory of validation.
IRRELEVANT_TO_VALIDATION = {
    "gradient_checkpointing": False,
    "unet_gradient_checkpointing": False,
    "use_8bit_adam": False,
}


@dataclass(frozen=True)
class NetworkPlan:
    """A network.

    Attributes:
        trained: number of trained parameters.
        frozen: number of frozen parameters.
        weights: bytes of both.
        leaves_the_gpu: whether it is on the CPU during training steps.
    """

    trained: int
    frozen: int
    weights: int
    leaves_the_gpu: bool

    @classmethod
    def of(cls, network: nn.Module, leaves_the_gpu: bool) -> Self:
        """Count the parameters of a network."""
        parameters = list(network.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters) - trained
        return cls(trained, frozen, sum(p.nbytes for p in parameters), leaves_the_gpu)


@dataclass(frozen=True)
class CachePlan:
    """The caches on disk.

    Attributes:
        view_bytes: bytes of the moments of an image or an augmented copy; 0: not cached.
        prompt_bytes: bytes of the embedding of a prompt; 0: not cached.
        views: number of images and augmented copies in the train and validation splits; None:
            unknown until the dataset is prepared.
        prompts: number of unique prompts, with the empty one; None: unknown until the dataset is
            prepared.
    """

    view_bytes: int
    prompt_bytes: int
    views: int | None
    prompts: int | None

    @property
    def total(self) -> int | None:
        """Bytes of both caches, or None if unknown."""
        if self.views is None or self.prompts is None:
            return None
        return self.views * self.view_bytes + self.prompts * self.prompt_bytes


@dataclass(frozen=True)
class Fixed:
    """The memory that a training takes on a GPU the whole time, in bytes.

    Attributes:
        networks: the networks by name.
        gradients: gradients of all trained weights.
        optimizer: the state of the optimizer.
        average: the EMA weights.
    """

    networks: dict[str, NetworkPlan]
    gradients: int
    optimizer: int
    average: int

    @classmethod
    def of(cls, train: TrainConfig, networks: Networks) -> Self:
        """Return the memory of a training with these networks."""
        trained = [p for network in networks.trained().values() for p in network.parameters() if p.requires_grad]
        gradients = sum(p.nbytes for p in trained)
        leaving = {"vae"} if train.cache_latents else set()
        if "text_encoder" not in networks.trained():
            leaving.add("text_encoder")
        return cls(
            networks={name: NetworkPlan.of(network, name in leaving) for name, network in networks.loaded().items()},
            gradients=gradients,
            optimizer=sum(adam_bytes(p.numel(), train.use_8bit_adam) for p in trained),
            average=gradients if train.use_ema else 0,
        )

    @property
    def weights(self) -> int:
        """Weights of the networks that stay on the GPU."""
        return sum(network.weights for network in self.networks.values() if not network.leaves_the_gpu)

    @property
    def all_weights(self) -> int:
        """Weights of all networks."""
        return sum(network.weights for network in self.networks.values())

    @property
    def while_training(self) -> int:
        """All of it except the gradients."""
        return self.weights + self.optimizer + self.average


@dataclass(frozen=True)
class Plan:
    """The needs of a training in bytes; memory is that of one GPU.

    Attributes:
        image_size: (height, width) in pixels.
        fixed: the memory taken the whole time.
        step: the memory that a micro-batch adds, with gradients.
        caching_peak: the peak while caches are filled; 0: no caches.
        training_peak: the peak in a training step.
        validation_peak: the peak during validation.
        best_on_cpu: the weights of the best validation, in the memory of the CPU.
        cache: the caches on disk.
    """

    image_size: tuple[int, int]
    fixed: Fixed
    step: StepMemory
    caching_peak: int
    training_peak: int
    validation_peak: int
    best_on_cpu: int
    cache: CachePlan

    @property
    def needed(self) -> int:
        """The memory that a GPU must have: the peak of the highest phase, and a reserve."""
        peak = max(self.caching_peak, self.training_peak, self.validation_peak)
        return with_reserve(peak)

    def as_json(self) -> dict[str, Any]:
        """Return everything as values for JSON."""
        return {**asdict(self), "needed": self.needed}


def with_reserve(size: int) -> int:
    """Return the memory that a GPU needs for this number of bytes in tensors."""
    return int(size * (1 + RESERVE_SHARE)) + RESERVE_BYTES


class Planner:
    """Plans trainings of one experiment with various settings; each plan is computed once."""

    def __init__(self, config: ExperimentConfig, processes: int = 1) -> None:
        """Open the prepared dataset, if there is one that matches the configuration.

        Args:
            config: the experiment.
            processes: number of GPUs, with one process each.
        """
        self.config, self.processes = config, processes
        self.dataset = matching_dataset(config)
        self.image_size = config.data.image_size if self.dataset is None else self.dataset.description.image_size
        self._last: tuple[TrainConfig, Networks] | None = None
        self._fixed: dict[str, Fixed] = {}
        self._plans: dict[str, Plan] = {}
        self._validation_peaks: dict[str, int] = {}

    def fixed(self, train: TrainConfig) -> Fixed:
        """Return the memory taken the whole time; fast, because no step is run.

        Raises:
            MaskLoomError: the settings of a network cannot be read or do not fit the configuration.
        """
        key = train.model_dump_json()
        if key not in self._fixed:
            self._fixed[key] = Fixed.of(train, self._networks(train))
        return self._fixed[key]

    def plan(self, train: TrainConfig) -> Plan:
        """Return the whole plan.

        Raises:
            MaskLoomError: the settings of a network cannot be read or do not fit the configuration.
        """
        key = train.model_dump_json()
        if key not in self._plans:
            self._plans[key] = self._compute_plan(train)
        return self._plans[key]

    def _compute_plan(self, train: TrainConfig) -> Plan:
        """Run a step and a validation on the meta device, and add up their memory."""
        networks, fixed, size = self._networks(train), self.fixed(train), self.image_size
        cache = self._cache(train, networks)
        gradients_stay = self.processes > 1 or train.gradient_accumulation_steps > 1
        step = step_memory(train, networks, size, gradients_stay)
        text = (cache.prompts or 0) * cache.prompt_bytes
        validation = self._validation_peak(train, networks)
        buckets = fixed.gradients if self.processes > 1 else 0
        return Plan(
            image_size=size,
            fixed=fixed,
            step=step,
            caching_peak=fixed.all_weights + encoding_peak(networks, size) if train.cache_latents else 0,
            training_peak=fixed.while_training + text + step.peak,
            validation_peak=fixed.all_weights + fixed.optimizer + fixed.average + buckets + text + validation,
            best_on_cpu=fixed.gradients if train.early_stopping_patience else 0,
            cache=cache,
        )

    def _networks(self, train: TrainConfig) -> Networks:
        """Return the networks of a training; the last ones are kept."""
        if self._last is None or self._last[0] != train:
            self._last = (train, planned_networks(train))
        return self._last[1]

    def _validation_peak(self, train: TrainConfig, networks: Networks) -> int:
        """Return the peak memory of validation in bytes, without weights."""
        key = train.model_copy(update=IRRELEVANT_TO_VALIDATION).model_dump_json()
        if key not in self._validation_peaks:
            images = min(train.train_batch_size, train.num_validation_images)
            guided = self.config.generate.guidance_scale > 1
            self._validation_peaks[key] = validation_peak(train, networks, self.image_size, images, guided)
        return self._validation_peaks[key]

    def _cache(self, train: TrainConfig, networks: Networks) -> CachePlan:
        """Return the size of the caches, without prompts that augmented copies may add."""
        item = DTYPES[train.mixed_precision].itemsize
        channels, *rest = latent_shape(networks, self.image_size)
        text, prompt_bytes = networks.text_encoder.config, 0
        if "text_encoder" not in train.lora:
            tokens = (train.prompt_chunks or 1) * text.max_position_embeddings
            prompt_bytes = tokens * text.hidden_size * item
        views = prompts = None
        if self.dataset is not None:
            views = count_views(self.dataset, train)
            prompts = len({"", *training_prompts(self.dataset, train.max_train_samples)})
        view_bytes = 2 * channels * prod(rest) * item if train.cache_latents else 0
        return CachePlan(view_bytes, prompt_bytes, views, prompts)


def count_views(dataset: MaskPromptDataset, train: TrainConfig) -> int:
    """Return the number of images in the cache, with augmented copies."""
    splits = dataset.contract.splits
    rows = {name: splits[name].rows if name in splits else 0 for name in ("train", "validation")}
    copies = 1 + (train.augment.variants if train.augment else 0)
    return min(rows["train"], train.max_train_samples or rows["train"]) * copies + rows["validation"]


def adam_bytes(elements: int, eight_bit: bool) -> int:
    """Return the bytes of AdamW's two moments of a tensor.

    They are float32 or, with bitsandbytes, one byte per element and a float32 scale per block.
    """
    if eight_bit and elements >= MIN_8BIT_ELEMENTS:
        return 2 * elements + 2 * 4 * -(-elements // BLOCK_8BIT)
    return 8 * elements
