"""`maskloom plan`: a plan as text and as JSON."""

from pathlib import Path

from maskloom.models.stable_diffusion.prompt_encoding import load_prompt_encoder, training_prompts
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.named_files import named_file
from maskloom.train_controlnet.memory_plan.plan import GIB, Plan, Planner
from maskloom.train_controlnet.memory_plan.switches import Switches, cheapest_fit

MIB = 2**20
GPUS_GIB = (24, 16, 12)
Fit = tuple[Switches, Plan] | None
"""The switches that make a training fit a GPU, and its plan with them; None: nothing does."""


def print_plan(config: ExperimentConfig, processes: int, json: Path | None) -> None:
    """Plan a training, print the plan, and write it as JSON if a file is given.

    Raises:
        MaskLoomError: the settings of a network cannot be read, or do not fit the configuration.
    """
    file = named_file("--json", json, "plan")
    planner = Planner(config, processes)
    plan = planner.plan(config.fine_tuning)
    fits = {size: cheapest_fit(planner, config.fine_tuning, size * GIB) for size in GPUS_GIB}
    print(plan_text(config, plan, fits, processes))
    if planner.dataset is not None:
        print("\n" + "\n".join(prompt_lines(config.fine_tuning, planner.dataset)))
    if file:
        answers = {
            str(size): None if fit is None else {"switches": fit[0], "needed": fit[1].needed}
            for size, fit in fits.items()
        }
        file.write_json({"plan": plan.as_json(), "fits_gib": answers})


def plan_text(config: ExperimentConfig, plan: Plan, fits: dict[int, Fit], processes: int) -> str:
    """Return the plan as text.

    Args:
        config: the experiment.
        plan: the plan with the configured settings.
        fits: what makes the training fit, by the memory of a GPU in GiB.
        processes: number of GPUs.
    """
    sections = [
        [headline(config, plan, processes)],
        network_lines(plan),
        memory_lines(plan, config.fine_tuning),
        disk_lines(plan, config.fine_tuning),
        [fit_line(size, plan, fit) for size, fit in fits.items()],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def headline(config: ExperimentConfig, plan: Plan, processes: int) -> str:
    """Return image size, batch size and precision."""
    train, (height, width) = config.fine_tuning, plan.image_size
    images = train.train_batch_size * train.gradient_accumulation_steps * processes
    return (
        f"{config.experiment}: images {height} x {width}, {images} per step ({train.train_batch_size} per micro-batch, "
        f"{train.gradient_accumulation_steps} accumulated, {processes} GPU{'s' * (processes > 1)}), "
        f"mixed_precision={train.mixed_precision}"
    )


def network_lines(plan: Plan) -> list[str]:
    """Return the table of networks: parameters and weights."""
    lines = [f"{'parameters':14}{'trained':>14}{'frozen':>14}{'weights':>12}"]
    for name, network in plan.fixed.networks.items():
        place = "  on the CPU during training steps" if network.leaves_the_gpu else ""
        lines.append(f"{name:14}{network.trained:14,}{network.frozen:14,}{size_text(network.weights):>12}{place}")
    return lines


def memory_lines(plan: Plan, train: TrainConfig) -> list[str]:
    """Return the table of GPU memory by phase."""
    fixed, step = plan.fixed, plan.step
    optimizer = "AdamW, 8 bits per moment" if train.use_8bit_adam else "AdamW, two float32 moments"
    kept = ", ".join(f"{name} {size_text(size)}" for name, size in step.activations.items())
    caching, reserve = "all networks, and encoding images; before the training", "5 % and 0.75 GiB"
    omitted = [name for name in ("vae_decoder", "adherence") if getattr(train, name)]
    return [
        "GPU memory",
        size_line("weights", fixed.weights),
        size_line("optimizer", fixed.optimizer, optimizer),
        *([size_line("EMA weights", fixed.average)] if fixed.average else []),
        size_line("micro-batch", step.peak, "peak of activations and gradients together"),
        size_line("  gradients", fixed.gradients, "all of them, once activations are freed"),
        size_line("  activations", step.kept, f"kept for the backward pass: {kept}"),
        size_line("training", plan.training_peak, "weights, optimizer, EMA weights, micro-batch"),
        *([size_line("caching", plan.caching_peak, caching)] if plan.caching_peak else []),
        size_line("validation", plan.validation_peak, "all networks, held-out loss and sampled images; estimated"),
        size_line(
            "needed", plan.needed, f"the largest of these, and {reserve} for the allocator, CUDA and its libraries"
        ),
        *([f"  not counted: {', '.join(f'train.{name}' for name in omitted)}"] if omitted else []),
    ]


def disk_lines(plan: Plan, train: TrainConfig) -> list[str]:
    """Return the sizes of the caches on disk and of weights kept on the CPU."""
    cache = plan.cache
    parts = [
        f"{size_text(size)} {what}"
        for size, what in ((cache.view_bytes, "per image"), (cache.prompt_bytes, "per prompt"))
        if size
    ]
    lines = [f"cache on disk: {' and '.join(parts) or 'none'}"]
    if parts and cache.total is None:
        lines[0] += "; their number is known when the dataset is prepared"
    elif parts:
        more = "; augmented copies may add prompts" if train.augment else ""
        lines[0] += (
            f"; {cache.views:,} images and {cache.prompts:,} prompts, with the empty one: "
            f"{size_text(cache.total or 0)}{more}"
        )
    if plan.best_on_cpu:
        lines.append(f"CPU memory: {size_text(plan.best_on_cpu)} for the weights of the best validation")
    return lines


def prompt_lines(train: TrainConfig, dataset: MaskPromptDataset) -> list[str]:
    """Return which prompts are truncated; those of augmented copies are not known yet."""
    try:
        encoder = load_prompt_encoder(train)
    except MaskLoomError as error:
        return [f"prompts: not checked ({error})"]
    cuts = encoder.truncation([*training_prompts(dataset, train.max_train_samples), *train.validation_prompt])
    whole = f"none of {cuts.prompts} is truncated, the longest has {cuts.longest} of {cuts.room} tokens"
    return [f"prompts: {line}" for line in cuts.lines() or [whole]]


def fit_line(size: int, plan: Plan, fit: Fit) -> str:
    """Return whether the training fits a GPU with `size` GiB, and with which switches."""
    if fit is None:
        return f"{size} GB: does not fit, even with all switches; use smaller images or a larger GPU"
    switches, fitting = fit
    if not switches:
        return f"{size} GB: fits, {size_text(size * GIB - plan.needed)} to spare"
    return f"{size} GB: fits with {overrides(switches)} (needed: {size_text(fitting.needed)})"


def overrides(switches: Switches) -> str:
    """Return switches as overrides on the command line."""
    values = {key: f"[{','.join(v)}]" if isinstance(v, list) else str(v).lower() for key, v in switches.items()}
    return " ".join(f"train.{key}={value}" for key, value in values.items())


def size_line(name: str, size: int, note: str = "") -> str:
    """Return a line of the table of memory."""
    return f"  {name:18}{size_text(size):>12}  {note}".rstrip()


def size_text(size: int) -> str:
    """Return a number of bytes in GiB, MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1024:.1f} KiB"
