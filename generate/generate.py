"""The stage `generate`: one synthetic mask-and-prompt dataset for each configured generator.

Verify the real dataset -> plan rows (counts, masks, seeds) -> for each generator: distribute shards
over the processes, generate batches within each shard, one image per row -> write card, ledger and
contract. A shard on disk is complete and is not generated again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskloom.generate.card import dataset_card
from maskloom.generate.conditions import ConditionReader, ResolvedRow
from maskloom.generate.diffusion import BackboneGenerator
from maskloom.generate.generator import ImageGenerator, JointGenerator
from maskloom.generate.joint import GeneratedRow, JointRows, MaskFigures, check_joint
from maskloom.generate.pixels import checked_pixels
from maskloom.generate.planning import PlannedRow, check_parents_are_train, label_counts, plan_rows, read_parents
from maskloom.models.stable_diffusion.sampling import unet_is_frozen
from maskloom.models.stable_diffusion.trained_parts import read_places
from maskloom.pipeline import __version__
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.dataset.contract import Description, Parent
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, Shard, check_dataset_place, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import check_places
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.progress import Advance, progress, say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage, open_run
from maskloom.pipeline.runs.trainings import TrainingStatement, require_trained_on, training_statement

if TYPE_CHECKING:
    from accelerate import PartialState

KEY = "generate.generators"
PACKAGE = "maskloom.generate.generators"
LEDGERS = ".rejected"  # one per shard; hidden, so that `load_dataset` and uploads skip it
LONGEST_WAIT = timedelta(days=30)  # at a barrier: it must not time out while other processes still compute


def generate(config: ExperimentConfig, force: bool) -> None:
    """Run the stage.

    Args:
        config: the experiment.
        force: generate everything again.

    Raises:
        MaskLoomError: the dataset or a generator's weights are missing or damaged, the weights were
            trained on another dataset, or a generated image is constant or not finite.
    """
    run = open_run(config)
    dataset = real_dataset(run.dataset)
    generators = open_generators(config, run)
    if config.train is not None:
        check_places(read_places(config.train), [run.synthetic, run.logs("generate")])
    stage = generation_stage(config, run, dataset, generators)
    if stage.skips(force):
        return
    require_same_dataset(run, dataset, generators)
    processes = join_processes()
    with stage.recorded(writes=processes.is_main_process) as results:
        if processes.is_main_process:
            for name in generators:
                check_dataset_place(run.synthetic / name)
            verify_quickly(run.dataset)
        for generator in generators.values():
            generator.check()
        job = GenerationJob.planned(config, run, dataset, stage.config_hash, processes)
        any_truncated = processes.is_main_process and _report_truncated_prompts(
            config, generators, job.reader.prompts(job.rows)
        )
        for name, generator in generators.items():
            results[name] = job.write_set(name, generator, force)
        # The prompt of a warped mask may be longer than its parent's.
        if processes.is_main_process and not any_truncated:
            _report_truncated_prompts(config, generators, _written_prompts(run, generators))


def open_generators(config: ExperimentConfig, run: Run) -> dict[str, ImageGenerator]:
    """Return the configured generators by name, without reading their weights.

    Raises:
        MaskLoomError: a generator or option is unknown, or no generator is configured.
    """
    require_generators(config)
    return {name: open_generator(config, run, name) for name in config.generate.generators}


def require_generators(config: ExperimentConfig) -> None:
    """Check that the configuration names a generator.

    Raises:
        MaskLoomError: it names none.
    """
    if not config.generate.generators:
        raise MaskLoomError(
            "generate.generators is empty; name at least one, for example generate.generators.controlnet={}"
        )


def open_generator(config: ExperimentConfig, run: Run, name: str) -> ImageGenerator:
    """Return one of the configured generators, its weights not yet read.

    Raises:
        MaskLoomError: an unknown generator or option, or a generator that samples from a backbone
            where the configuration names none.
    """
    plugin = load_plugin(PACKAGE, name, "generator")
    if config.train is None and issubclass(plugin.Generator, BackboneGenerator):
        raise MaskLoomError(
            f"{KEY}.{name}: the configuration has no section `train`, which names the backbone; "
            f"set train.pretrained_model_name_or_path, or remove this generator with {KEY}.{name}=false"
        )
    options = validated(config.generate.generators[name], plugin.Options, f"{KEY}.{name}")
    generator: ImageGenerator = plugin.Generator(config, run, options)
    return generator


def real_dataset(folder: Path) -> MaskPromptDataset:
    """Return the real dataset whose masks are used.

    Raises:
        MaskLoomError: it is missing or damaged, or not real.
    """
    dataset = MaskPromptDataset.open(folder)
    if dataset.description.origin != "real":
        raise MaskLoomError(
            f"{folder}: a {dataset.description.origin} dataset; masks must come from a real one, run prepare"
        )
    return dataset


def require_same_dataset(run: Run, dataset: MaskPromptDataset, generators: Mapping[str, ImageGenerator]) -> None:
    """Check that no generator was trained on another version of the dataset."""
    for name, generator in generators.items():
        if generator.training_stage is not None:
            trained_on = training_statement(run, generator.training_stage).dataset or dataset.digest
            require_trained_on(dataset, generator.training_stage, trained_on, f"{KEY}.{name}")


def generation_stage(
    config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, generators: Mapping[str, ImageGenerator]
) -> Stage:
    """Return the stage `generate` of a run, with the digests of what it reads."""
    return Stage(
        run,
        "generate",
        inputs={"dataset": dataset.digest, **{f"weights of {name}": one.digest for name, one in generators.items()}},
        config=[config.generate.model_dump(mode="json"), *settings_of_other_sections(config)],
        outputs=[run.synthetic / name for name in generators],
    )


def settings_of_other_sections(config: ExperimentConfig) -> list[Any]:
    """Return the settings outside `generate` and the weights that the images depend on."""
    train = config.train
    if train is None:
        return [config.seed]
    prediction = train.prediction_type and [train.prediction_type, unet_is_frozen(train)]
    chunks = [train.prompt_chunks] if train.prompt_chunks else []  # keeps the key of datasets that do not use it
    return [config.seed, prediction, train.rescale_betas_zero_snr, train.variant, *chunks]


def _report_truncated_prompts(
    config: ExperimentConfig, generators: Mapping[str, ImageGenerator], prompts: Sequence[str]
) -> bool:
    """Report the prompts that the text encoder truncates; return whether there are any."""
    prompted = [one for one in generators.values() if isinstance(one, BackboneGenerator)]
    if not prompted:
        return False
    from maskloom.models.stable_diffusion.prompt_encoding import load_prompt_encoder, report_truncation

    negative = [one.options.negative_prompt for one in prompted]
    return report_truncation("generate", load_prompt_encoder(config.fine_tuning), [*prompts, *negative])


def _written_prompts(run: Run, generators: Mapping[str, ImageGenerator]) -> list[str]:
    """Return the prompts of one written dataset; all generators share them, except joint ones."""
    name = next((name for name, one in generators.items() if isinstance(one, BackboneGenerator)), None)
    return [] if name is None else MaskPromptDataset.open(run.synthetic / name).split("train")["text"]


def join_processes() -> PartialState:
    """Return accelerate's view of the processes: one, or as many as were launched."""
    import torch
    from accelerate import PartialState

    # Without `cpu=True`, several processes on a machine without accelerator would not form a group.
    cpu = not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=LONGEST_WAIT) if "LOCAL_RANK" in os.environ else PartialState(cpu=cpu)


@dataclass(frozen=True)
class GenerationJob:
    """Generates the synthetic datasets of a run, which share plan, masks and processes.

    Attributes:
        folder: holds one dataset per generator.
        rows: the planned rows.
        drawn_again: whether they replace rows of the plan; see `generate.redraw`.
    """

    config: ExperimentConfig
    run: Run
    dataset: MaskPromptDataset
    config_hash: str
    processes: PartialState
    folder: Path
    rows: Sequence[PlannedRow]
    reader: ConditionReader
    drawn_again: bool = False

    @classmethod
    def planned(
        cls, config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, config_hash: str, processes: PartialState
    ) -> GenerationJob:
        """Plan the rows, after the main process has verified the dataset."""
        processes.wait_for_everyone()
        parents = read_parents(dataset)
        rows = plan_rows(parents, dataset.description.labels, config.generate, config.seed)
        check_parents_are_train(rows, dataset)
        reader = ConditionReader(dataset, config, parents)
        return cls(config, run, dataset, config_hash, processes, run.synthetic, rows, reader)

    def write_set(self, name: str, generator: ImageGenerator, force: bool) -> dict[str, Any]:
        """Write the dataset of one generator and return its entry in `stage.json`."""
        if isinstance(generator, JointGenerator):
            check_joint(name, self.dataset.description, self.rows, self.reader)
        settings = _settings(name, generator, self.config)
        writer = self._writer(name, generator, settings)
        if self.processes.is_main_process:
            writer.prepare_folder(from_scratch=force)
        self.processes.wait_for_everyone()
        missing = writer.missing_shards()
        self.processes.wait_for_everyone()  # no process writes before all have listed the missing shards
        seconds = self._write_shards(writer, missing, name, generator)
        self.processes.wait_for_everyone()
        rejected, figures = _read_ledgers(writer) if self.processes.is_main_process else ([], MaskFigures())
        if self.processes.is_main_process:
            self._finish(writer, settings, rejected, figures)
        self.processes.wait_for_everyone()
        made = sum(shard.stop - shard.start for shard in missing)
        return {
            "images": len(self.rows),
            "made_now": made,
            "images_per_second": round(made / max(seconds, 1e-9), 3),
            "masks_rejected": len(rejected),
            "processes": self.processes.num_processes,
            **(figures.per_mask() if figures.rows else {}),
        }

    def _writer(self, name: str, generator: ImageGenerator, settings: Mapping[str, Any]) -> DatasetWriter:
        about = self.dataset.description
        # Beside the settings, not among them: these are listed on the dataset card.
        generation = {**settings, "training": _training(self.run, generator).model_dump()}
        preprocessing = {**about.preprocessing, "generation": generation}
        description = about.model_copy(update={"origin": "synthetic", "preprocessing": preprocessing})
        shared = self.config.generate.model_dump(mode="json", exclude={"generators"})
        options = generator.options.model_dump(mode="json")
        key = value_digest(
            [
                __version__,
                self.dataset.digest,
                name,
                generator.digest,
                options,
                shared,
                *settings_of_other_sections(self.config),
                *([[row.index for row in self.rows]] if self.drawn_again else []),
            ]
        )
        shards = plan_shards({"train": len(self.rows)}, self.config.generate.rows_per_shard)
        return DatasetWriter(self.folder / name, description, shards, key, self.processes.process_index, LEDGERS)

    def _write_shards(
        self, writer: DatasetWriter, missing: Sequence[Shard], name: str, generator: ImageGenerator
    ) -> float:
        """Write this process's share of the missing shards and return the time in seconds."""
        mine = missing[self.processes.process_index :: self.processes.num_processes]
        if mine:
            generator.load(self.processes.device, writer.description)
        start = time.monotonic()
        total = sum(shard.stop - shard.start for shard in mine)
        part = f" on 1 of {self.processes.num_processes} processes" if self.processes.num_processes > 1 else ""
        with progress(f"generating {name}{part}", total, "images", show=self.processes.is_main_process) as advance:
            for shard in mine:
                writer.write_shard(shard, self._shard_samples(writer, shard, name, generator, advance))
        return time.monotonic() - start

    def _shard_samples(
        self, writer: DatasetWriter, shard: Shard, name: str, generator: ImageGenerator, advance: Advance
    ) -> Iterator[Sample]:
        """Yield the samples of a shard.

        Batches start at the first row of the shard, so a resumed run forms the same batches.
        """
        rejected: list[Mapping[str, str]] = []
        joint = None
        if isinstance(generator, JointGenerator):
            joint = JointRows(name, generator, self.reader, self.config.seed)
        for start in range(shard.start, shard.stop, self.config.generate.batch_size):
            planned = self.rows[start : min(start + self.config.generate.batch_size, shard.stop)]
            for row, image in joint.generate(planned) if joint else self._paired(planned, generator):
                rejected += row.rejected
                yield _sample(row, image, name, generator, self.dataset.description)
            advance(len(planned))
        # Before the shard gets its final name: every existing shard has its part of the ledger.
        _write_ledger(writer, shard, rejected, joint.figures if joint else MaskFigures())

    def _paired(self, planned: Sequence[PlannedRow], generator: ImageGenerator) -> Iterator[GeneratedRow]:
        """Return each row, with its mask from the train split, and the image generated for it."""
        resolved = [self.reader.resolve(row) for row in planned]
        return zip(resolved, _images(generator, resolved), strict=True)

    def _finish(
        self,
        writer: DatasetWriter,
        settings: Mapping[str, Any],
        rejected: Sequence[Mapping[str, str]],
        figures: MaskFigures,
    ) -> None:
        parent = Parent(path=os.path.relpath(self.run.dataset, writer.folder), digest=self.dataset.digest)
        counts = label_counts(self.rows, writer.description.labels)
        card = dataset_card(writer.description, counts, settings, len(rejected), figures)
        writer.finish(card, rejected, self.config_hash, parent)
        if figures.rows:
            say(f"{writer.folder}: {figures.sentence()}{', see rejected.jsonl' if rejected else ''}")
        elif rejected:
            say(f"{writer.folder}: {len(rejected)} masks could not be warped and were replaced, see rejected.jsonl")


def _images(generator: ImageGenerator, rows: Sequence[ResolvedRow]) -> list[NDArray[np.float32]]:
    """Return one image per row; rows of one size are generated together."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.condition.conditioning_image.shape, []).append(place)
    images: dict[int, NDArray[np.float32]] = {}
    for some in places.values():
        images |= dict(zip(some, generator.images([rows[place].condition for place in some]), strict=True))
    return [images[place] for place in range(len(rows))]


def _settings(name: str, generator: ImageGenerator, config: ExperimentConfig) -> dict[str, Any]:
    """Return the generation settings for the contract and the card, without local paths."""
    keys = (
        "mask_source",
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
        "controlnet_conditioning_scale",
        "mixed_precision",
    )
    return {
        "generator": name,
        "uses_mask": generator.uses_mask,
        "weights": generator.digest,
        "options": generator.options.model_dump(mode="json"),
        "seed": config.seed,
        **{key: getattr(config.generate, key) for key in keys},
        **({"mask_source": "drawn"} if isinstance(generator, JointGenerator) else {}),
    }


def _training(run: Run, generator: ImageGenerator) -> TrainingStatement:
    """Return what the contract states about the training of the generator."""
    if generator.training_stage is None:
        return TrainingStatement(stage=None, dataset=None, weights=generator.digest)
    return training_statement(run, generator.training_stage)


def _sample(
    row: ResolvedRow, image: NDArray[np.float32], name: str, generator: ImageGenerator, about: Description
) -> Sample:
    sample_id = f"{name}-{row.planned.index:06d}"
    return Sample(
        image=checked_pixels(image, sample_id, row.condition.seed),
        mask=row.condition.mask,
        conditioning_image=row.condition.conditioning_image,
        text=row.condition.text,
        label=row.condition.label,
        sample_id=sample_id,
        group_id=row.parent.group_id if row.parent else sample_id,
        source=about.dataset,
        origin="synthetic",
        attributes=row.attributes,
        parent_id=row.parent.sample_id if row.parent else None,
        generator=generator.digest,
        seed=row.condition.seed,
    )


def _write_ledger(
    writer: DatasetWriter, shard: Shard, rejected: Sequence[Mapping[str, str]], figures: MaskFigures
) -> None:
    ledger = {"rejected": [dict(row) for row in rejected], "figures": asdict(figures)}
    writer.write_note(shard, json.dumps(ledger, ensure_ascii=False))


def _read_ledgers(writer: DatasetWriter) -> tuple[list[Mapping[str, str]], MaskFigures]:
    """Return the rejected masks of all shards, and the statistics of their generated masks."""
    rejected: list[Mapping[str, str]] = []
    figures = MaskFigures()
    for note in writer.notes():
        ledger = json.loads(note)
        rejected += ledger["rejected"]
        figures.add(MaskFigures(**ledger["figures"]))
    return rejected, figures
