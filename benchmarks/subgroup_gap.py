"""How often the gap of a subgroup is found where one is, and where none is.

    python -m benchmarks.subgroup_gap tables [--repeats 1000]
    python -m benchmarks.subgroup_gap trainings [--datasets 20 --darker 45]

`tables` simulates what one arm's models score (Dice is skewed, some lesions are missed, cases of a
patient are alike, every training has a level of its own, and one for each scanner), on two scanners
with other patients, and lets the gap be judged.

`trainings` renders phantom datasets of two scanners, trains the default network on their real
train images, and judges the gap in Dice between the scanners on the test images. Both scanners are
the same machine, or the second's gain is so many dB lower (a planted gap). Where they are the same, any
other assignment of the test patients to scanners has no gap either, so that many are judged.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.verdict_simulation import Layout
from maskloom.data_prep.processing import phantom
from maskloom.evaluate.downstream.cases import ArmCases, ScoredTestSet, trained_cases
from maskloom.evaluate.downstream.columns import Subgroups, split_subgroups
from maskloom.evaluate.downstream.compare import BASELINE, CANNOT_TELL
from maskloom.evaluate.downstream.gaps import BETTER, WORSE, Gap, subgroup_gaps
from maskloom.evaluate.downstream.masked import masked_images
from maskloom.evaluate.inputs import open_inputs
from maskloom.evaluate.metrics import downstream_segmentation as segmentation
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards

app = typer.Typer(add_completion=False)
SEED_SDS = (0.0, 0.01, 0.02, 0.04)
PLANTED = 0.15
SIDES = (
    (Layout(6, 12, False), Layout(6, 12, False)),
    (Layout(6, 30, True), Layout(6, 30, True)),
    (Layout(6, 12, False), Layout(30, 60, False)),
    (Layout(12, 36, False), Layout(12, 36, False)),
    (Layout(12, 50, True), Layout(30, 100, True)),
    (Layout(30, 60, False), Layout(30, 60, False)),
    (Layout(30, 100, True), Layout(30, 100, True)),
)
SIDE, VIEWS, DARK_SCANNER = 64, 1, "scanner B"
DESCRIPTION = Description(
    dataset="phantom_bus",
    origin="real",
    modality="breast ultrasound",
    channels=1,
    image_size=(SIDE, SIDE),
    mask_classes=("background", "lesion"),
    palette=((0, 0, 0), (255, 80, 80)),
    labels=phantom.LABELS[:2],
    prompt_templates=("{modality}",),
    conditioning="mask",
    preprocessing={},
    licence="CC0-1.0",
    citation="MaskLoom breast ultrasound phantom",
    homepage="",
)
SMALL = {
    "image_size": 32,
    "channels": (8, 16, 32),
    "residual_units": 0,
    "steps": 150,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "arms": (BASELINE, "real_augmented"),
    "null_arm": False,
}


def simulated_cases(
    random: np.random.Generator, sides: Sequence[Layout], seeds: int, seed_sd: float, gap: float
) -> ScoredTestSet:
    """Return what one arm's models score on the cases of two scanners, on the second less by `gap`.

    The level of a training varies by `seed_sd`, and by half of it more on each scanner.
    """
    parts, groups = [], []
    for number, layout in enumerate(sides):
        group = layout.group_numbers()
        difficulty = np.sqrt(0.5) * (random.normal(size=layout.groups)[group] + random.normal(size=layout.cases))
        noise = 0.2 * random.normal(size=(seeds, layout.cases))
        dice = 1 / (1 + np.exp(-(1.2 + 0.9 * difficulty + noise)))
        dice[random.random(dice.shape) < 0.04 * np.exp(-0.8 * difficulty)] = 0  # lesions that are missed
        parts.append(dice + seed_sd / 2 * random.normal(size=(seeds, 1)) - gap * number)
        groups += [f"{number}-{one}" for one in group]
    values = np.concatenate(parts, axis=1) + seed_sd * random.normal(size=(seeds, 1))
    samples = tuple(f"{i:04}" for i in range(values.shape[1]))
    arms = {BASELINE: ArmCases(tuple(range(seeds)), {"Dice": values})}
    return ScoredTestSet("downstream_segmentation", "real test", samples, tuple(groups), arms)


def simulated_gap(sides: Sequence[Layout], seeds: int, seed_sd: float, gap: float, number: int) -> Gap:
    """Return the judged gap of the second scanner in one simulated table."""
    shape = [part for layout in sides for part in (layout.groups, layout.cases)]
    random = np.random.default_rng([number, seeds, round(1000 * seed_sd), round(1000 * gap), *shape])
    cases = simulated_cases(random, sides, seeds, seed_sd, gap)
    first = sides[0].cases
    columns = {"scanner": {"A": cases.samples[:first], "B": cases.samples[first:]}}
    return subgroup_gaps(cases, "Dice", "higher", columns)[1]


@app.command()
def tables(
    repeats: Annotated[int, typer.Option(min=20, help="simulated tables per cell")] = 1000,
    seeds: Annotated[list[int] | None, typer.Option(help="trainings; may be repeated")] = None,
) -> None:
    """Print how often a gap is found in simulated tables without one, and with one of .15."""
    columns = [f"wrong [%], seed SD {sd:g}" for sd in SEED_SDS] + [f"found -{PLANTED} [%], seed SD .02"]
    print(f"{repeats} tables per cell\n| patients (cases) per scanner | seeds | " + " | ".join(columns) + " |")
    print("|" + "---|" * (2 + len(columns)))
    for sides in SIDES:
        name = " and ".join(f"{one.groups} ({one.cases}{', unequal' if one.unequal else ''})" for one in sides)
        for count in seeds or (3, 5):
            shares = [share_found(sides, count, sd, 0.0, repeats) for sd in SEED_SDS]
            shares.append(share_found(sides, count, 0.02, PLANTED, max(20, repeats // 5)))
            print(f"| {name} | {count} | " + " | ".join(f"{share:.1f}" for share in shares) + " |", flush=True)


def share_found(sides: Sequence[Layout], seeds: int, seed_sd: float, gap: float, repeats: int) -> float:
    """Return the share, in %, of tables in which a gap is found; of planted ones, in the right direction."""
    wanted = (WORSE,) if gap else (WORSE, BETTER)
    found = [simulated_gap(sides, seeds, seed_sd, gap, number).finding for number in range(repeats)]
    return 100 * float(np.mean([one in wanted for one in found]))


@app.command()
def trainings(
    datasets: Annotated[int, typer.Option(min=1, help="phantom datasets, each with patients of its own")] = 20,
    first: Annotated[int, typer.Option(min=0, help="number of the first one, to add to those of an earlier call")] = 0,
    darker: Annotated[float, typer.Option(help="dB by which the gain of scanner B is lower; 0: no gap")] = 45.0,
    patients: Annotated[int, typer.Option(min=20, help="patients per dataset")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="trainings per dataset")] = 3,
    assignments: Annotated[int, typer.Option(min=0, help="with --darker 0: further assignments per dataset")] = 40,
) -> None:
    """Print the gap of scanner B in Dice, dataset by dataset, and how often it is found."""
    found: list[str] = []
    again: list[str] = []
    print("| dataset | Dice on scanner B | on scanner A | gap | finding | patients B / A |\n|---|---|---|---|---|---|")
    for seed in range(first, first + datasets):
        cases, columns = trained_scores(seed, darker, patients, seeds)
        one = dark_gap(cases, columns)
        found.append(one.finding)
        if not darker:
            again += [dark_gap(cases, reassigned(cases, seed, number)).finding for number in range(assignments)]
        interval = f"{one.gap:+.3f} [{one.low:.3f}, {one.high:.3f}]" if one.low is not None else "not defined"
        figures = f"{one.inside:.3f} | {one.outside:.3f} | {interval} | {one.finding} {one.reason}".rstrip()
        print(f"| {seed} | {figures} | {one.groups} / {one.rest_groups} |", flush=True)
        print(f"so far: {counted(found)}; other assignments {counted(again)}", file=sys.stderr, flush=True)
    print(f"\nscanner B is {darker:g} dB darker: {counted(found)}; other assignments {counted(again)}")


def counted(findings: Sequence[str]) -> str:
    """Return how many findings there are of each kind, in words."""
    kinds = ", ".join(f"{findings.count(name)} {name}" for name in (WORSE, BETTER, CANNOT_TELL))
    return f"of {len(findings)}: {kinds}"


def dark_gap(cases: ScoredTestSet, columns: Subgroups) -> Gap:
    """Return the judged gap of scanner B."""
    return next(one for one in subgroup_gaps(cases, "Dice", "higher", columns) if one.subgroup == DARK_SCANNER)


def reassigned(cases: ScoredTestSet, seed: int, number: int) -> Subgroups:
    """Return another assignment of the test patients to the two scanners."""
    names = np.unique(cases.groups)
    dark = set(names[np.random.default_rng([seed, number]).random(len(names)) < 0.5].tolist())
    parts: dict[str, list[str]] = {"scanner A": [], DARK_SCANNER: []}
    for sample, group in zip(cases.samples, cases.groups, strict=True):
        parts[DARK_SCANNER if group in dark else "scanner A"].append(sample)
    return {"scanner": parts}


def trained_scores(seed: int, darker: float, patients: int, seeds: int) -> tuple[ScoredTestSet, Subgroups]:
    """Return what models that are trained on a phantom dataset score, and the scanners of the test images."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = phantom_dataset(Path(folder) / "dataset", seed, darker, patients)
        inputs = open_inputs(dataset, {}, None, seed)
        options = segmentation.Options.model_validate({**SMALL, "seeds": seeds})
        options = options.model_copy(update={"arms": (BASELINE,)})
        real, test = (masked_images(inputs, one, options.image_size) for one in (inputs.train, inputs.test))
        trained = segmentation.train_models(inputs, options, real.pair, {"none": real.pair}, {inputs.test.name: test})
        cases = trained_cases(segmentation.NAME, trained, {inputs.test.name: test})[0]
        return cases, split_subgroups(dataset, "test", ["scanner"])


def phantom_dataset(folder: Path, seed: int, darker: float, patients: int) -> MaskPromptDataset:
    """Return a dataset of phantoms of two scanners: one machine, the second so many dB darker.

    The first 40 % of the patients are train patients, the others test patients.
    """
    numbers, train = range(patients), round(0.4 * patients)
    splits = {
        name: [phantom_sample(seed, number, view, darker) for number in part for view in range(VIEWS)]
        for name, part in (("train", numbers[:train]), ("test", numbers[train:]))
    }
    shards = plan_shards({split: len(samples) for split, samples in splits.items()}, 1000)
    writer = DatasetWriter(folder, DESCRIPTION, shards, "subgroup_gap")
    writer.prepare_folder(from_scratch=True)
    for shard in writer.missing_shards():
        writer.write_shard(shard, splits[shard.split])
    writer.finish("# phantoms of two scanners\n", [], "none", None)
    return MaskPromptDataset.open(folder)


def phantom_sample(seed: int, number: int, view: int, darker: float) -> Sample:
    """Return one view of a patient with a lesion; whose scanner it is follows from the patient."""
    label = number % 2
    subject = phantom.patient(seed, number, phantom.LABELS[label])
    name = subject.scanner.name
    machine = replace(phantom.SCANNERS[0], name=name, gain_db=-darker if name == DARK_SCANNER else 0.0)
    image, mask = phantom.render(replace(subject, scanner=machine), seed, number, view, SIDE)
    return Sample(
        image=image,
        mask=mask,
        conditioning_image=np.asarray(DESCRIPTION.palette, dtype=np.uint8)[mask],
        text="breast ultrasound",
        label=label,
        sample_id=f"phantom-{number:05d}-{view}",
        group_id=f"patient-{number:05d}",
        source="phantom_bus",
        origin="real",
        attributes={"scanner": name},
    )


if __name__ == "__main__":
    app()
