"""What a training needs before it is started: parameters, memory of a GPU by phase, cache on disk, and the switches that make it fit.

Weights are never read: the networks are built from their `config.json` without content, and one step is run on them. See docs/plan.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from maskloom.models.stable_diffusion.prompt_encoding import training_prompts
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.contract import CONTRACT_FILE
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.precision import DTYPES
from maskloom.train_controlnet.memory_plan.networks import planned_networks
from maskloom.train_controlnet.memory_plan.phases import (
    StepMemory,
    encoding_peak,
    latent_shape,
    step_memory,
    validation_peak,
)
from maskloom.train_controlnet.networks import Networks

if TYPE_CHECKING:
    from torch import nn

GIB = 2**30
RESERVE_BYTES = 3 * GIB // 4  # a CUDA context and the workspaces of cuDNN and cuBLAS
RESERVE_SHARE = 0.05  # lost between the allocator's blocks
MIN_8BIT_ELEMENTS = 4096  # of bitsandbytes: smaller tensors keep two float32 moments
BLOCK_8BIT = 256  # elements that share a scale
# Settings without which validation takes what it takes with them.
NOT_OF_VALIDATION = {"gradient_checkpointing": False, "unet_gradient_checkpointing": False, "use_8bit_adam": False}


@dataclass(frozen=True)
class NetworkPlan:
    """A network.

    Attributes:
        trained: parameters that are trained.
        frozen: parameters that are not.
        weights: bytes, both kinds.
        leaves_the_gpu: whether it is on the CPU while the training steps.
    """

    trained: int
    frozen: int
    weights: int
    leaves_the_gpu: bool


@dataclass(frozen=True)
class CachePlan:
    """The caches on disk.

    Attributes:
        view_bytes: moments of an image or of a changed copy; 0: there is no such cache.
        prompt_bytes: embedding of a prompt; 0: there is no such cache.
        views: images and copies of the train and validation splits; None: not known before the dataset is prepared.
        prompts: unique prompts, the empty one included; None: not known before the dataset is prepared.
    """

    view_bytes: int
    prompt_bytes: int
    views: int | None
    prompts: int | None

    @property
    def total(self) -> int | None:
        """Bytes of both caches, if known."""
        if self.views is None or self.prompts is None:
            return None
        return self.views * self.view_bytes + self.prompts * self.prompt_bytes


@dataclass(frozen=True)
class Fixed:
    """What stays on a GPU all the time, in bytes.

    Attributes:
        networks: by name.
        gradients: of all trained weights.
        optimizer: its state.
        average: the moving average's weights.
    """

    networks: dict[str, NetworkPlan]
    gradients: int
    optimizer: int
    average: int

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
        """All but the gradients."""
        return self.weights + self.optimizer + self.average


@dataclass(frozen=True)
class Plan:
    """A training's needs, in bytes; memory is that of one GPU.

    Attributes:
        image_size: (height, width) in pixels.
        fixed: what stays on the GPU.
        step: what a micro-batch adds, gradients included.
        caching_peak: the most while the caches are filled; 0: there are none.
        training_peak: the most in a step.
        validation_peak: the most while validation runs.
        best_on_cpu: weights of the best validation, kept in the machine's own memory.
        cache: on disk.
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
        """Memory that a GPU must have: the highest of the phases, and a reserve."""
        peak = max(self.caching_peak, self.training_peak, self.validation_peak)
        return with_reserve(peak)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {**asdict(self), "needed": self.needed}


def with_reserve(size: int) -> int:
    """Return the memory of a GPU that has room for so many bytes of tensors."""
    return int(size * (1 + RESERVE_SHARE)) + RESERVE_BYTES


class Planner:
    """Plans trainings that differ in their settings only; a plan is made once."""

    def __init__(self, config: ExperimentConfig, processes: int = 1) -> None:
        """Look at the prepared dataset, if there is one.

        Args:
            config: the experiment.
            processes: GPUs, each with one process.
        """
        self.config, self.processes = config, processes
        folder = Run(config.run_folder).dataset
        self.dataset = MaskPromptDataset.open(folder) if (folder / CONTRACT_FILE).is_file() else None
        self.image_size = config.data.image_size if self.dataset is None else self.dataset.description.image_size
        self._last: tuple[TrainConfig, Networks] | None = None
        self._fixed: dict[str, Fixed] = {}
        self._plans: dict[str, Plan] = {}
        self._validation_peaks: dict[str, int] = {}

    def fixed(self, train: TrainConfig) -> Fixed:
        """Return what stays on the GPU; quickly, for no step is run.

        Raises:
            MaskLoomError: a network's settings cannot be read, or do not fit the configuration.
        """
        key = train.model_dump_json()
        if key not in self._fixed:
            self._fixed[key] = _fixed(train, self._networks(train))
        return self._fixed[key]

    def plan(self, train: TrainConfig) -> Plan:
        """Return the whole plan.

        Raises:
            MaskLoomError: a network's settings cannot be read, or do not fit the configuration.
        """
        key = train.model_dump_json()
        if key not in self._plans:
            self._plans[key] = self._planned(train)
        return self._plans[key]

    def _planned(self, train: TrainConfig) -> Plan:
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
        """Return the networks of a training; those asked for last are kept."""
        if self._last is None or self._last[0] != train:
            self._last = (train, planned_networks(train))
        return self._last[1]

    def _validation_peak(self, train: TrainConfig, networks: Networks) -> int:
        key = train.model_copy(update=NOT_OF_VALIDATION).model_dump_json()
        if key not in self._validation_peaks:
            images = min(train.train_batch_size, train.num_validation_images)
            guided = self.config.generate.guidance_scale > 1
            self._validation_peaks[key] = validation_peak(train, networks, self.image_size, images, guided)
        return self._validation_peaks[key]

    def _cache(self, train: TrainConfig, networks: Networks) -> CachePlan:
        item = DTYPES[train.mixed_precision].itemsize
        channels, *rest = latent_shape(networks, self.image_size)
        settings = networks.text_encoder.config
        return CachePlan(
            view_bytes=2 * channels * prod(rest) * item if train.cache_latents else 0,
            prompt_bytes=0
            if "text_encoder" in train.lora
            else (train.prompt_chunks or 1) * settings.max_position_embeddings * settings.hidden_size * item,
            views=None if self.dataset is None else _views(self.dataset, train),
            prompts=None if self.dataset is None else _prompts(self.dataset, train),
        )


def _prompts(dataset: MaskPromptDataset, train: TrainConfig) -> int:
    """Return how many unique prompts the rows have, and the empty one; those of changed copies are not known yet."""
    return len({"", *training_prompts(dataset, train.max_train_samples)})


def _views(dataset: MaskPromptDataset, train: TrainConfig) -> int:
    """Return how many images, changed copies among them, the cache holds."""
    splits = dataset.contract.splits
    rows = {name: splits[name].rows if name in splits else 0 for name in ("train", "validation")}
    copies = 1 + (train.augment.variants if train.augment else 0)
    return min(rows["train"], train.max_train_samples or rows["train"]) * copies + rows["validation"]


def _fixed(train: TrainConfig, networks: Networks) -> Fixed:
    trained = [p for network in networks.trained().values() for p in network.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    leaving = {"vae"} if train.cache_latents else set()
    if "text_encoder" not in networks.trained():
        leaving.add("text_encoder")
    return Fixed(
        networks={name: _network(network, name in leaving) for name, network in networks.loaded().items()},
        gradients=gradients,
        optimizer=sum(_adam_bytes(p.numel(), train.use_8bit_adam) for p in trained),
        average=gradients if train.use_ema else 0,
    )


def _network(network: nn.Module, leaves_the_gpu: bool) -> NetworkPlan:
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return NetworkPlan(
        trained=trained,
        frozen=sum(p.numel() for p in parameters) - trained,
        weights=sum(p.nbytes for p in parameters),
        leaves_the_gpu=leaves_the_gpu,
    )


def _adam_bytes(elements: int, eight_bit: bool) -> int:
    """Return the size of AdamW's two moments of a tensor: float32, or bytes with a float32 scale a block (bitsandbytes)."""
    if eight_bit and elements >= MIN_8BIT_ELEMENTS:
        return 2 * elements + 2 * 4 * -(-elements // BLOCK_8BIT)
    return 8 * elements
