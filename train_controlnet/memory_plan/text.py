"""`maskloom plan`: a plan as a page of text, and as JSON."""

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
"""What makes a training fit a GPU, and its plan then; None: nothing does."""


def print_plan(config: ExperimentConfig, processes: int, json: Path | None) -> None:
    """Plan a training, print the plan, and write it where asked.

    Raises:
        MaskLoomError: a network's settings cannot be read, or do not fit the configuration.
    """
    file = named_file("--json", json, "plan")
    planner = Planner(config, processes)
    plan = planner.plan(config.fine_tuning)
    fits = {size: cheapest_fit(planner, config.fine_tuning, size * GIB) for size in GPUS_GIB}
    print(plan_text(config, plan, fits, processes))
    if planner.dataset is not None:
        print("\n" + "\n".join(_prompt_lines(config.fine_tuning, planner.dataset)))
    if file:
        answers = {
            str(size): None if fit is None else {"switches": fit[0], "needed": fit[1].needed}
            for size, fit in fits.items()
        }
        file.write_json({"plan": plan.as_json(), "fits_gib": answers})


def plan_text(config: ExperimentConfig, plan: Plan, fits: dict[int, Fit], processes: int) -> str:
    """Return the plan as a page of text.

    Args:
        config: the experiment.
        plan: its plan as it is configured.
        fits: by size of a GPU in GiB, what makes the training fit.
        processes: GPUs.
    """
    sections = [
        [_headline(config, plan, processes)],
        _network_lines(plan),
        _memory_lines(plan, config.fine_tuning),
        _disk_lines(plan, config.fine_tuning),
        [_fit_line(size, plan, fit) for size, fit in fits.items()],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _headline(config: ExperimentConfig, plan: Plan, processes: int) -> str:
    train, (height, width) = config.fine_tuning, plan.image_size
    images = train.train_batch_size * train.gradient_accumulation_steps * processes
    return (
        f"{config.experiment}: images {height} x {width}, {images} a step ({train.train_batch_size} a micro-batch, "
        f"{train.gradient_accumulation_steps} accumulated, {processes} GPU{'s' * (processes > 1)}), mixed_precision={train.mixed_precision}"
    )


def _network_lines(plan: Plan) -> list[str]:
    lines = [f"{'parameters':14}{'trained':>14}{'frozen':>14}{'weights':>12}"]
    for name, network in plan.fixed.networks.items():
        place = "  on the CPU while it trains" if network.leaves_the_gpu else ""
        lines.append(f"{name:14}{network.trained:14,}{network.frozen:14,}{size_text(network.weights):>12}{place}")
    return lines


def _memory_lines(plan: Plan, train: TrainConfig) -> list[str]:
    fixed, step = plan.fixed, plan.step
    optimizer = "AdamW, 8 bits a moment" if train.use_8bit_adam else "AdamW, two float32 moments"
    kept = ", ".join(f"{name} {size_text(size)}" for name, size in step.activations.items())
    return [
        "memory of a GPU",
        _line("weights", fixed.weights),
        _line("optimizer", fixed.optimizer, optimizer),
        *([_line("moving average", fixed.average)] if fixed.average else []),
        _line("a micro-batch", step.peak, "its highest moment, activations and gradients together"),
        _line("  gradients", fixed.gradients, "all of them, when the activations are gone"),
        _line("  activations", step.kept, f"kept for the backward pass: {kept}"),
        _line("training", plan.training_peak, "weights, optimizer, average, a micro-batch"),
        *(
            [_line("caching", plan.caching_peak, "before: all networks, and encoding images")]
            if plan.caching_peak
            else []
        ),
        _line("validation", plan.validation_peak, "all networks, held-out loss and sampled images; estimated"),
        _line(
            "needed",
            plan.needed,
            "the highest of these, 5 % and 0.75 GiB more for the allocator, CUDA and its libraries",
        ),
        *_not_counted(train),
    ]


def _not_counted(train: TrainConfig) -> list[str]:
    names = [name for name, value in (("vae_decoder", train.vae_decoder), ("adherence", train.adherence)) if value]
    return [f"  not counted: {', '.join(f'train.{name}' for name in names)}"] if names else []


def _disk_lines(plan: Plan, train: TrainConfig) -> list[str]:
    cache = plan.cache
    parts = [
        f"{size_text(size)} {what}"
        for size, what in ((cache.view_bytes, "an image"), (cache.prompt_bytes, "a prompt"))
        if size
    ]
    lines = [f"cache on disk: {' and '.join(parts) or 'none'}"]
    if parts and cache.total is None:
        lines[0] += "; how many there are is known when the dataset is prepared"
    elif parts:
        more = "; changed copies may add prompts" if train.augment else ""
        lines[0] += (
            f"; {cache.views:,} images and {cache.prompts:,} prompts, the empty one included: {size_text(cache.total or 0)}{more}"
        )
    if plan.best_on_cpu:
        lines.append(f"memory of the machine: {size_text(plan.best_on_cpu)} for the weights of the best validation")
    return lines


def _prompt_lines(train: TrainConfig, dataset: MaskPromptDataset) -> list[str]:
    """Return whether the prompts are read whole, as they are written; those of changed copies are not known yet."""
    try:
        encoder = load_prompt_encoder(train)
    except MaskLoomError as error:
        return [f"prompts: not looked at ({error})"]
    cuts = encoder.cuts([*training_prompts(dataset, train.max_train_samples), *train.validation_prompt])
    whole = f"all {cuts.prompts} are read whole, at most {cuts.longest} of {cuts.room} tokens"
    return [f"prompts: {line}" for line in cuts.lines() or [whole]]


def _fit_line(size: int, plan: Plan, fit: Fit) -> str:
    if fit is None:
        return f"{size} GB: does not fit, whatever is switched on; use smaller images or a larger GPU"
    switches, fitting = fit
    if not switches:
        return f"{size} GB: fits, {size_text(size * GIB - plan.needed)} to spare"
    return f"{size} GB: fits with {overrides(switches)} (needed: {size_text(fitting.needed)})"


def overrides(switches: Switches) -> str:
    """Return switches as they are written on the command line."""
    return " ".join(f"train.{key}={_value_text(value)}" for key, value in switches.items())


def _value_text(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(name: str, size: int, note: str = "") -> str:
    return f"  {name:18}{size_text(size):>12}  {note}".rstrip()


def size_text(size: int) -> str:
    """Return bytes as GiB, MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1024:.1f} KiB"
