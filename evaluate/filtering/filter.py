"""The stage `filter`: synthetic datasets -> the images that pass for real ones, and why the others do not.

Verify the datasets -> choose the thresholds on real validation images -> for each generator: judge its
images, draw the rejected ones again and judge those, write what is left as `synthetic/NAME-filtered`,
and a ledger of every image as `filter/NAME.jsonl`.
"""

from __future__ import annotations

import heapq
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import typer
import yaml

from maskloom.evaluate.evaluate import verified_inputs
from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.filtering import calibration
from maskloom.evaluate.filtering.card import dataset_card
from maskloom.evaluate.filtering.judge import Judge, open_criteria, require_criteria
from maskloom.evaluate.filtering.ledger import Draw, ledger_rows, loss_warnings, subset_counts, unfilled_warnings
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.filter import FILTERED
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, check_dataset_place, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import json_text, value_digest, write_json
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.reading import row_attributes
from maskloom.pipeline.filter_summary import FILTER_KEY, FilterSummary
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage, open_run, skip_empty_stage

REDRAW = "maskloom.generate.redraw"
NO_SPLIT = "none"


def filter_synthetic(config: ExperimentConfig, force: bool) -> None:
    """Run the stage.

    Args:
        config: the experiment; without a section `filter`, nothing is done.
        force: judge and write everything again.

    Raises:
        MaskLoomError: a dataset is missing or damaged, a criterion or an option is unknown, there are
            no validation images, or no image of a generator is accepted.
        typer.Exit: `generate` failed to draw images again, and has printed why.
    """
    if config.filter is None:
        skip_empty_stage("filter", "the configuration has no section `filter`")
        return
    plugins = open_criteria(config)
    run = open_run(config)
    names = list(config.generate.generators)
    sets = {"real": run.dataset, **{name: run.synthetic / name for name in names}}
    digests = {name: MaskPromptDataset.open(folder).digest for name, folder in sets.items()}
    identities = [one.identity for one in plugins]
    settings = [config.seed, config.filter.acceptance, config.filter.rounds, identities, calibration.VERSION]
    outputs = [run.filter, *(run.synthetic / f"{name}{FILTERED}" for name in names)]
    stage = Stage(run, "filter", digests, settings, outputs)
    if stage.skips(force):
        return
    for folder in outputs[1:]:
        check_dataset_place(folder)
    ledgers, cache = OwnedFolder(run.filter), FeatureCache(run.filter_scores)
    ledgers.check()
    cache.check()
    inputs = without_test(verified_inputs(run, config, names))
    judge = Judge(inputs, plugins, config.filter.acceptance, cache)
    with stage.recorded() as results:
        ledgers.claim()
        ledgers.remove([name for name in ledgers.files() if Path(name).stem not in names])
        for name in names:
            results[name] = FilteredSet(config, run, judge, name, stage.config_hash).write(ledgers)


def without_test(inputs: EvaluationInputs) -> EvaluationInputs:
    """Return inputs that hold no test image, so that no criterion can read one."""
    return replace(inputs, test=ImageSet(inputs.test.name, inputs.real, NO_SPLIT), externals={}, _memo={})


@dataclass(frozen=True)
class FilteredSet:
    """The filtered form of one generator's dataset."""

    config: ExperimentConfig
    run: Run
    judge: Judge
    name: str
    config_hash: str

    def write(self, ledgers: OwnedFolder) -> dict[str, Any]:
        """Judge, draw again, write dataset and ledger; return the entry in `stage.json`.

        Raises:
            MaskLoomError: no image is accepted; names the criterion that rejects most.
        """
        draws = list(self._draws())
        kept = np.isin(draws[0].rows, np.concatenate([draw.rows[draw.judgement.accepted] for draw in draws]))
        thresholds = self.judge.calibration.thresholds
        lines = [line for draw in draws for line in ledger_rows(draw, thresholds)]
        ledgers.write_text(
            f"{self.name}.jsonl", "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)
        )
        summary = self._summary(draws, kept)
        ledgers.write_text(f"{self.name}.json", json_text(summary.model_dump(mode="json")))
        if not kept.any():
            worst = max(draws[0].judgement.rejected.items(), key=lambda item: int(item[1].sum()))[0]
            raise MaskLoomError(
                f"{draws[0].image_set.dataset.folder}: no image is accepted, and {worst} rejects most "
                f"({ledgers.path / f'{self.name}.jsonl'} has the scores); lower filter.acceptance, set filter.criteria.{worst}=false, "
                f"or leave the generator out with generate.generators.{self.name}=false"
            )
        self._write_dataset(draws, int(kept.sum()), summary, lines)
        for warning in summary.warnings:
            say(f"filter: {self.name}: warning: {warning}")
        say(f"filter: {self.name}: {summary.sentence()}")
        return {"images": summary.images, "kept": summary.kept, "refilled": summary.refilled, "draws": summary.draws}

    def _draws(self) -> Iterator[Draw]:
        """Yield the generated dataset, judged, then the draws that replace what was rejected."""
        image_set = self.judge.inputs.synthetic[self.name]
        draw = Draw(0, image_set, np.arange(len(image_set)), self.judge.judge(image_set))
        yield draw
        for number in range(1, require_criteria(self.config).rounds + 1):
            rows = draw.rows[~draw.judgement.accepted]
            if not len(rows):
                return
            drawn = self._drawn_again(number, rows.tolist())
            again = ImageSet(f"{self.name}, draw {number}", drawn, "train", image_set.group_of)
            draw = Draw(number, again, rows, self.judge.judge(again))
            yield draw

    def _drawn_again(self, number: int, rows: list[int]) -> MaskPromptDataset:
        """Return the rows as `generate` draws them in a round.

        Raises:
            MaskLoomError: the settings of `generate` have changed since the dataset was generated.
            typer.Exit: it failed, and has printed why.
        """
        with TemporaryDirectory(prefix="maskloom-filter-") as folder:
            file, request = Path(folder) / "config.yaml", Path(folder) / "rows.json"
            file.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), allow_unicode=True), encoding="utf-8")
            write_json(request, {"generator": self.name, "number": number, "rows": rows})
            say(f"filter: {self.name}: drawing {len(rows)} images again, round {number}")
            command = [sys.executable, "-m", REDRAW, "--config", str(file), "--rows", str(request)]
            code = subprocess.run(command, check=False).returncode
        if code:
            raise typer.Exit(code)
        drawn = verify_quickly(self.run.redrawn(number) / self.name)
        first = self.judge.inputs.synthetic[self.name].dataset
        if drawn.description != first.description:
            raise MaskLoomError(
                f"{first.folder}: generated with other settings than those given now; run generate again"
            )
        return drawn

    def _summary(self, draws: Sequence[Draw], kept: Any) -> FilterSummary:
        chosen, first = self.judge.calibration, draws[0]
        counts = subset_counts(first, kept)
        at_once = int(first.judgement.accepted.sum())
        return FilterSummary(
            generator=self.name,
            digest=first.image_set.dataset.digest,
            acceptance=self.judge.acceptance,
            accepted=chosen.accepted,
            accepted_unseen=chosen.accepted_unseen,
            validation_images=chosen.images,
            thresholds=chosen.thresholds,
            not_applied=[one.name for one in self.judge.plugins if one.name not in chosen.thresholds],
            images=len(first.rows),
            kept=at_once,
            refilled=int(kept.sum()) - at_once,
            draws=sum(len(draw.rows) for draw in draws[1:]),
            subsets=counts,
            warnings=[*chosen.warnings, *loss_warnings(first), *unfilled_warnings(counts)],
        )

    def _write_dataset(
        self, draws: Sequence[Draw], rows: int, summary: FilterSummary, lines: Sequence[dict[str, Any]]
    ) -> Contract:
        """Write the accepted rows, unchanged, in the order of the plan."""
        first = draws[0].image_set.dataset
        stated = summary.model_dump(mode="json")
        preprocessing = {**first.description.preprocessing, FILTER_KEY: stated}
        description = first.description.model_copy(update={"preprocessing": preprocessing})
        shards = plan_shards({"train": rows}, self.config.generate.rows_per_shard)
        key = value_digest([stated, [draw.image_set.dataset.digest for draw in draws]])
        writer = DatasetWriter(self.run.synthetic / f"{self.name}{FILTERED}", description, shards, key)
        writer.prepare_folder(from_scratch=True)
        samples = (_sample(row) for _, row in heapq.merge(*map(_accepted_rows, draws), key=lambda pair: pair[0]))
        for shard in shards:
            writer.write_shard(shard, islice(samples, shard.stop - shard.start))
        rejected = [
            {
                "path": line["sample_id"],
                "reason": f"rejected by {' and '.join(line['rejected_by'])}",
                "class": line["class"],
            }
            for line in lines
            if not line["accepted"]
        ]
        return writer.finish(dataset_card(description, summary), rejected, self.config_hash, first.contract.parent)


def _accepted_rows(draw: Draw) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the index in the plan and the stored row of each accepted image of a round."""
    rows = draw.image_set.dataset.rows(draw.image_set.split)
    for index, accepted, row in zip(draw.rows.tolist(), draw.judgement.accepted, rows, strict=True):
        if accepted:
            yield index, row


def _sample(row: dict[str, Any]) -> Sample:
    """Return a stored row as it was written; images stay PNG bytes."""
    pixels = {name: row[name] and row[name]["bytes"] for name in ("image", "mask", "conditioning_image")}
    attributes = row_attributes(row["attributes"], f"sample {row['sample_id']}")
    return Sample(**{**row, **pixels, "attributes": attributes})
