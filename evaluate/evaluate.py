"""`evaluate`: computes the configured metrics for all synthetic datasets; one JSON file per metric.

Each file has a key of everything that the answer depends on, so that an interrupted evaluation
continues with the metric at which it stopped, and with the downstream model that was being trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any

from maskloom.evaluate import controls as controls_module
from maskloom.evaluate.copies import require_no_training_copies
from maskloom.evaluate.downstream.cases import CASES_FILE, DownstreamResult, EvaluationCases
from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.inputs import EvaluationInputs, open_inputs
from maskloom.evaluate.model_cache import ModelCache
from maskloom.evaluate.scores.features import ExtractorOptions, check_extractor
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import read_places
from maskloom.pipeline import __version__
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import model_digest, value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, check_places
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.progress import progress, say
from maskloom.pipeline.results import CONTROLS, TUNED_VAE, Evaluation, MetricResult, read_evaluation, write_evaluation
from maskloom.pipeline.runs.copies import require_no_held_out_copies
from maskloom.pipeline.runs.leaks import require_no_leaks
from maskloom.pipeline.runs.record import require_intact
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage, open_run
from maskloom.pipeline.runs.trainings import require_same_training

PACKAGE = "maskloom.evaluate.metrics"


@dataclass(frozen=True)
class Question:
    """A metric of the configuration, with its checked options."""

    name: str
    module: ModuleType
    options: Section

    @property
    def identity(self) -> list[Any]:
        """What the answer depends on besides the data: name, version, options."""
        return [self.name, self.module.VERSION, self.options.model_dump(mode="json")]

    def own_inputs(self, run: Run, config: ExperimentConfig) -> dict[str, str]:
        """Return the digests of what this metric alone reads, by name; `own_inputs` of its file.

        Raises:
            MaskLoomError: trained weights are damaged.
        """
        find = getattr(self.module, "own_inputs", None)
        return {} if find is None else find(run, config)


def evaluate(config: ExperimentConfig, force: bool, controls: bool = False) -> None:
    """Answer every question of `evaluate.metrics` in `RUN/evaluation`.

    Args:
        config: the experiment.
        force: answer even if nothing has changed.
        controls: also run the known controls. Without it, an answer about them stays while it is
            still valid.

    Raises:
        MaskLoomError: a dataset is missing or damaged, a metric or an option is unknown, or a metric
            cannot be computed; or a synthetic image is a copy and `evaluate.on_copies` is `stop`.
    """
    questions = [open_question(name, options) for name, options in config.evaluate.metrics.items()]
    run = open_run(config)
    digests = input_digests(run, config)
    backbone = "none" if config.train is None else BackboneSource.of(config.train).digest()
    settings = {"seed": config.seed, "questions": [question.identity for question in questions]}
    handling = {} if config.evaluate.on_copies == "drop" else {"on_copies": config.evaluate.on_copies}
    settings |= handling
    own = {question.name: question.own_inputs(run, config) for question in questions}
    read = {name: digest for inputs_of_one in own.values() for name, digest in inputs_of_one.items()}
    stage = Stage(run, "evaluate", {**digests, "backbone": backbone, **read}, settings, [run.evaluation])
    answers = OwnedFolder(run.evaluation)
    control = controls_question(questions)
    about = {"real": digests["real"]}
    control_key = value_digest([__version__, control.identity, about, config.seed])
    tested = None if controls and force else _kept_answer(answers, control, control_key, EvaluationCases(answers, {}))
    if stage.skips(force or (controls and not tested)):
        return
    if config.train is not None:
        written = [run.evaluation, run.features, run.downstream_models, run.logs("evaluate")]
        check_places(read_places(config.train), written)
    answers.check()
    cache, models = FeatureCache(run.features), ModelCache(run.downstream_models)
    cache.check()
    models.check()
    for name in (*(question.name for question in questions), *([CONTROLS] if controls else [])):
        answers.check_name(f"{name}.json")
    inputs = verified_inputs(run, config)  # refuses before anything is changed
    with stage.recorded() as results, progress("evaluating", len(questions), "questions") as advance:
        answers.claim()
        cache.keep_only(digests.values())
        if force:
            models.clear()
        inputs.feature_cache, inputs.model_cache = cache, models
        inputs.on_copies = config.evaluate.on_copies
        require_no_training_copies(inputs)
        asked = {question.name for question in questions}  # the report shows whatever else lies there
        asked |= {CONTROLS} if tested else set()
        answers.remove([name for name in answers.files() if name != CASES_FILE and _question_of(name) not in asked])
        cases = EvaluationCases.of(answers, asked)
        for question in questions:
            advance(0, note=question.name)
            read_alone = [own[question.name]] if own[question.name] else []  # leaves the other keys as they are
            about_all = [digests, backbone, config.seed, *handling.values()]
            key = value_digest([__version__, question.identity, *about_all, *read_alone])
            kept = None if force else _kept_answer(answers, question, key, cases)
            answer = kept or _new_answer(answers, question, inputs, key, digests, cases)
            models.finish(question.name)
            results[question.name] = answer.verdict
            advance()
        models.clear()
        if controls:
            tested = tested or _new_answer(answers, control, inputs, control_key, about, cases)
        if tested:
            results[CONTROLS] = tested.verdict
            for warning in tested.warnings:
                print(f"controls: {warning}")  # a finding about the answers themselves


def controls_question(questions: Sequence[Question]) -> Question:
    """Return the known controls as a question, with the options of the metrics that they test."""
    options = next((one.options for one in questions if one.name == "faithfulness"), None)
    return Question(CONTROLS, controls_module, controls_module.Options(faithfulness=options))


def input_digests(run: Run, config: ExperimentConfig) -> dict[str, str]:
    """Return the digest of each dataset by name, and of the fine-tuned VAE where there is one.

    Raises:
        MaskLoomError: a dataset is missing or damaged, or the VAE has changed since its training.
    """
    sets = {"real": run.dataset, **{name: run.synthetic / name for name in config.generate.generators}}
    digests = {name: MaskPromptDataset.open(folder).digest for name, folder in sets.items()}
    tuned = run.generator / "vae"
    if tuned.is_dir():
        require_intact(run, "train", tuned)
        digests[TUNED_VAE] = model_digest(str(tuned))
    return digests


def open_question(name: str, options: dict[str, Any] | None) -> Question:
    """Return a metric with its options checked.

    Raises:
        MaskLoomError: the metric or an option is unknown (the error suggests the nearest one), or a
            value is invalid.
    """
    module = load_plugin(PACKAGE, name, "metric")
    return Question(name, module, validated(options or {}, module.Options, f"evaluate.metrics.{name}"))


def check_question(name: str, options: dict[str, Any] | None) -> None:
    """Check a metric's options, and that its feature extractor can be used here.

    Raises:
        MaskLoomError: see `open_question`; or the package of the feature extractor is missing.
    """
    question = open_question(name, options)
    if isinstance(question.options, ExtractorOptions):
        check_extractor(question.options)


def verified_inputs(run: Run, config: ExperimentConfig) -> EvaluationInputs:
    """Return the inputs of all metrics, after verifying every dataset.

    Raises:
        MaskLoomError: a dataset is missing or damaged, or leaks groups; the real dataset is not real;
            a synthetic one was made from another real dataset, or by a generator trained on another;
            or an image, or an altered copy of it, is in two splits.
    """
    real = verify_quickly(run.dataset)
    if real.description.origin != "real":
        raise MaskLoomError(
            f"{run.dataset}: a {real.description.origin} dataset; synthetic images are compared with a real one"
        )
    if "train" not in real.contract.splits:
        raise MaskLoomError(f"{run.dataset}: the train split is empty; nothing can be compared with it")
    synthetic = {}
    for name in config.generate.generators:
        synthetic[name] = verify_quickly(run.synthetic / name)
        require_same_training(run, name, real, synthetic[name])
    require_no_leaks(run, [real])
    if synthetic:
        require_no_leaks(run, [real, *synthetic.values()])
    require_no_held_out_copies(run, real, list(synthetic.values()))
    backbone = None if config.train is None else BackboneSource.of(config.train)
    inputs = open_inputs(real, synthetic, backbone, config.seed)
    inputs.config = config
    return inputs


def _question_of(name: str) -> str:
    """Return the metric of a file: that of `NAME.json`, and of its images such as `NAME-0.png`."""
    path = PurePosixPath(name)
    return path.stem if path.suffix == ".json" else path.stem.rpartition("-")[0]


def _kept_answer(answers: OwnedFolder, question: Question, key: str, cases: EvaluationCases) -> Evaluation | None:
    """Return the answer on disk if it has this key and is undamaged, with its images and cases; report damage."""
    name = f"{question.name}.json"
    if not (answers.path / name).is_file() or name not in answers.files():
        return None
    own = [file for file in answers.files() if _question_of(file) == question.name]
    problem = next((problem for file in own if (problem := answers.problem(file))), None)
    if problem:
        say(f"{problem}; its answer is dropped")
        return None
    answer = read_evaluation(answers.path / name)
    return answer if answer.key == key and answer.case_rows == cases.rows_of(question.name) else None


def _new_answer(
    answers: OwnedFolder,
    question: Question,
    inputs: EvaluationInputs,
    key: str,
    digests: dict[str, str],
    cases: EvaluationCases,
) -> Evaluation:
    """Compute and write an answer: pictures and cases first, the JSON last; an older one stays until then."""
    result: MetricResult = question.module.evaluate(inputs, question.options)
    answers.remove([name for name in answers.files() if _question_of(name) == question.name])
    for number, picture in enumerate(result.pictures):
        picture.path = f"{question.name}-{number}.png"
        with answers.writing(picture.path) as temporary:
            temporary.write_bytes(png_bytes(picture.pixels))
    cases.replace(question.name, result.cases if isinstance(result, DownstreamResult) else [])
    answer = Evaluation(
        metric=question.name,
        version=question.module.VERSION,
        key=key,
        case_rows=cases.rows_of(question.name),
        on_copies=inputs.on_copies,
        inputs=digests,
        options=question.options.model_dump(mode="json"),
        **result.as_json(),
    )
    write_evaluation(answers, answer)
    say(f"{question.name}: {result.verdict}")
    return answer
