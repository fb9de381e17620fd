"""`evaluate`: computes the configured metrics for all synthetic datasets; one JSON file per metric.

Each file has a key of everything that the answer depends on, so that an interrupted evaluation
continues with the metric at which it stopped, and with the downstream model that was being trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maskloom.evaluate.answers import Answers
from maskloom.evaluate.copies import require_no_training_copies, searched_sets
from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.inputs import EvaluationInputs, open_inputs
from maskloom.evaluate.leaks import require_no_altered_held_out_images
from maskloom.evaluate.model_cache import ModelCache
from maskloom.evaluate.questions import Question, controls_question, open_question
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import read_places
from maskloom.pipeline import __version__
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.copies import COPIES_FILE, record_copies
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import model_digest, value_digest
from maskloom.pipeline.files.ownership import check_places
from maskloom.pipeline.progress import progress
from maskloom.pipeline.results import CONTROLS, TUNED_VAE, Evaluation
from maskloom.pipeline.runs.copies import require_no_held_out_copies
from maskloom.pipeline.runs.leaks import require_no_leaks
from maskloom.pipeline.runs.record import require_intact
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage, open_run
from maskloom.pipeline.runs.trainings import require_same_training, weights_now


@dataclass(frozen=True)
class Subject:
    """What the answers of a run are about.

    Attributes:
        run, config: the run and its experiment.
        digests: of each dataset by name, and of the fine-tuned VAE.
        backbone: digest of the backbone; `none` without a section `train`.
        own: what a question alone reads, by the question's name: digests by name.
    """

    run: Run
    config: ExperimentConfig
    digests: Mapping[str, str]
    backbone: str
    own: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, run: Run, config: ExperimentConfig, questions: Sequence[Question]) -> Subject:
        """Return what the questions are about.

        Raises:
            MaskLoomError: a dataset is missing or damaged, or trained weights are damaged.
        """
        digests = input_digests(run, config)
        backbone = "none" if config.train is None else BackboneSource.of(config.train).digest()
        return cls(run, config, digests, backbone, {one.name: one.own_inputs(run, config) for one in questions})

    @property
    def handling(self) -> dict[str, str]:
        """What is done with copies, where it is not the default."""
        on_copies = self.config.evaluate.on_copies
        return {} if on_copies == "drop" else {"on_copies": on_copies}

    def stage(self, questions: Sequence[Question]) -> Stage:
        """Return the stage that answers the questions."""
        settings = {"seed": self.config.seed, "questions": [one.identity for one in questions], **self.handling}
        read_alone = {name: digest for digests in self.own.values() for name, digest in digests.items()}
        inputs = {**self.digests, "backbone": self.backbone, **read_alone}
        return Stage(self.run, "evaluate", inputs, settings, [self.run.evaluation])

    def key(self, question: Question) -> str:
        """Return the digest of everything that an answer depends on."""
        if question.name == CONTROLS:
            return value_digest([__version__, question.identity, {"real": self.digests["real"]}, self.config.seed])
        read_alone = [self.own[question.name]] if self.own[question.name] else []  # leaves the other keys as they are
        about_all = [self.digests, self.backbone, self.config.seed, *self.handling.values()]
        return value_digest([__version__, question.identity, *about_all, *read_alone])

    def answered(self, answers: Answers, question: Question, inputs: EvaluationInputs) -> Evaluation:
        """Compute and write the answer to a question."""
        digests = {"real": self.digests["real"]} if question.name == CONTROLS else self.digests
        weights = {"train": weights_now(self.run, "train")} if question.reads_weights else {}
        return answers.write(question, inputs, self.key(question), digests, weights)


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
    subject, answers, control = Subject.of(run, config, questions), Answers(run), controls_question(questions)
    stage = subject.stage(questions)
    tested = None if controls and force else answers.kept(control, subject.key(control))
    if stage.skips(force or (controls and not tested)):
        return
    names = [question.name for question in questions]
    answers.check([*names, *([CONTROLS] if controls else [])])
    answers.folder.check_name(COPIES_FILE)
    features, models = checked_caches(run, config)
    inputs = verified_inputs(run, config)  # refuses before anything is changed
    with stage.recorded() as results:
        inputs.feature_cache, inputs.model_cache = features, models
        inputs.on_copies = config.evaluate.on_copies
        answers.folder.claim()
        record_copies(answers.folder, searched_sets(inputs), subject.digests.values(), inputs.on_copies)
        require_no_training_copies(inputs, answers.folder.path / COPIES_FILE)
        features.keep_only(subject.digests.values())
        if force:
            models.clear()
        answers.keep_only({*names, *([CONTROLS] if tested else [])})
        results |= answer_all(subject, answers, questions, inputs, force)
        record_copies(answers.folder, searched_sets(inputs), subject.digests.values(), inputs.on_copies)
        models.clear()
        if controls:
            tested = tested or subject.answered(answers, control, inputs)
        if tested:
            results[CONTROLS] = tested.verdict
            for warning in tested.warnings:
                print(f"controls: {warning}")  # a finding about the answers themselves


def answer_all(
    subject: Subject, answers: Answers, questions: Sequence[Question], inputs: EvaluationInputs, force: bool
) -> dict[str, str]:
    """Answer the questions, or keep the answers that are still valid; return the verdicts by question.

    Args:
        subject: what the answers are about.
        answers: the folder.
        questions: in the order of the configuration.
        inputs: the opened datasets.
        force: answer even if nothing has changed.
    """
    verdicts = {}
    with progress("evaluating", len(questions), "questions") as advance:
        for question in questions:
            advance(0, note=question.name)
            inputs.release()
            kept = None if force else answers.kept(question, subject.key(question))
            verdicts[question.name] = (kept or subject.answered(answers, question, inputs)).verdict
            if inputs.model_cache is not None:
                inputs.model_cache.finish(question.name)
            advance()
    return verdicts


def checked_caches(run: Run, config: ExperimentConfig) -> tuple[FeatureCache, ModelCache]:
    """Return the caches of features and of downstream models, after checks that they may be written.

    Raises:
        MaskLoomError: they are not MaskLoom's, or what the configuration reads lies in them.
    """
    if config.train is not None:
        written = [run.evaluation, run.features, run.downstream_models, run.logs("evaluate")]
        check_places(read_places(config.train), written)
    features, models = FeatureCache(run.features), ModelCache(run.downstream_models)
    features.check()
    models.check()
    return features, models


def input_digests(run: Run, config: ExperimentConfig) -> dict[str, str]:
    """Return the digest of each dataset by name, and of the fine-tuned VAE where there is one.

    Raises:
        MaskLoomError: a dataset is missing or damaged, or the VAE has changed since its training.
    """
    sets = {"real": run.dataset, **{name: run.synthetic / name for name in config.synthetic_sets}}
    digests = {name: MaskPromptDataset.open(folder).digest for name, folder in sets.items()}
    tuned = run.generator / "vae"
    if tuned.is_dir():
        require_intact(run, "train", tuned)
        digests[TUNED_VAE] = model_digest(str(tuned))
    return digests


def verified_inputs(run: Run, config: ExperimentConfig, names: Sequence[str] | None = None) -> EvaluationInputs:
    """Return the inputs of all metrics, after verifying every dataset.

    Args:
        run: the run.
        config: the experiment.
        names: names of the synthetic datasets; None: all of the configuration.

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
    for name in config.synthetic_sets if names is None else names:
        synthetic[name] = verify_quickly(run.synthetic / name)
        require_same_training(run, name, real, synthetic[name])
    require_no_leaks(run, [real])
    if synthetic:
        require_no_leaks(run, [real, *synthetic.values()])
    require_no_held_out_copies(run, real, list(synthetic.values()))
    backbone = None if config.train is None else BackboneSource.of(config.train)
    inputs = open_inputs(real, synthetic, backbone, config.seed)
    require_no_altered_held_out_images(run, inputs)
    inputs.config = config
    return inputs
