"""`evaluate`: asks the configured questions of every synthetic dataset; one JSON file a question.

Each answer is kept with a key of all that it depends on, so that an interrupted evaluation goes on with the question it stopped at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from evaluate.inputs import EvaluationInputs, open_inputs
from evaluate.results import MetricResult
from pipeline import __version__
from pipeline.backbone_source import BackboneSource
from pipeline.config import ExperimentConfig, Section
from pipeline.config_loading import validated
from pipeline.contract import Contract, read_contract
from pipeline.errors import MaskLoomError
from pipeline.files import atomic_path, model_digest, read_json, value_digest, write_json
from pipeline.images import png_bytes
from pipeline.plugins import load_plugin
from pipeline.progress import progress, say
from pipeline.runs import Run, Stage, open_run
from pipeline.verification import verify_quickly

PACKAGE = "evaluate.metrics"


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


def evaluate(config: ExperimentConfig, force: bool) -> None:
    """Answer every question of `evaluate.metrics` in `RUN/evaluation`.

    Raises:
        MaskLoomError: a dataset is missing or damaged, a metric or an option is unknown, or a metric cannot be computed.
    """
    questions = [open_question(name, options) for name, options in config.evaluate.metrics.items()]
    run = open_run(config)
    digests = {name: contract.digest for name, contract in _contracts(run, config).items()}
    backbone = "none" if config.train is None else BackboneSource.of(config.train).digest()
    tuned = run.generator / "vae"
    if tuned.is_dir():  # a fine-tuned decoder, which `vae_ceiling` looks at
        digests["vae"] = model_digest(str(tuned))
    settings = {"seed": config.seed, "questions": [question.identity for question in questions]}
    stage = Stage(
        run, "evaluate", {**digests, "backbone": backbone}, settings, [_answer_file(run, q.name) for q in questions]
    )
    if stage.skips(force):
        return
    with stage.recorded() as results, progress("evaluating", len(questions), "questions") as advance:
        inputs = verified_inputs(run, config)
        _remove_other_answers(run, questions)
        for question in questions:
            advance(0, note=question.name)
            key = value_digest([__version__, question.identity, digests, backbone, config.seed])
            answer = _kept_answer(run, question, "" if force else key) or _new_answer(
                run, question, inputs, key, digests
            )
            results[question.name] = answer["verdict"]
            advance()


def open_question(name: str, options: dict[str, Any] | None) -> Question:
    """Return a metric with its options checked.

    Raises:
        MaskLoomError: unknown metric or option (names the nearest known one), or a value that does not fit.
    """
    module = load_plugin(PACKAGE, name, "metric")
    return Question(name, module, validated(options or {}, module.Options, f"evaluate.metrics.{name}"))


def verified_inputs(run: Run, config: ExperimentConfig) -> EvaluationInputs:
    """Return the inputs of all metrics, after verifying every dataset.

    Raises:
        MaskLoomError: a dataset is missing, damaged, leaks groups, was made from another real dataset, or the real one is not real.
    """
    real = verify_quickly(run.dataset)
    if real.description.origin != "real":
        raise MaskLoomError(
            f"{run.dataset}: a {real.description.origin} dataset; synthetic images are compared with a real one"
        )
    if not real.splits.get("train"):
        raise MaskLoomError(f"{run.dataset}: the train split is empty; nothing can be compared with it")
    synthetic = {}
    for name in config.generate.generators:
        folder = run.synthetic / name
        contract = verify_quickly(folder)
        if contract.parent is not None and contract.parent.digest != real.digest:
            raise MaskLoomError(f"{folder}: made from another version of {run.dataset}; run generate again")
        synthetic[name] = (folder, contract)
    backbone = None if config.train is None else BackboneSource.of(config.train)
    return open_inputs(run.dataset, real, synthetic, backbone, config.seed)


def _contracts(run: Run, config: ExperimentConfig) -> dict[str, Contract]:
    """Return the contracts of the real dataset and of every generator's, not verified yet."""
    synthetic = {name: read_contract(run.synthetic / name) for name in config.generate.generators}
    return {"real": read_contract(run.dataset), **synthetic}


def _answer_file(run: Run, name: str) -> Path:
    return run.evaluation / f"{name}.json"


def _remove_other_answers(run: Run, questions: list[Question]) -> None:
    """Delete answers to questions that are no longer asked: the report shows whatever lies there."""
    for path in run.evaluation.glob("*.json"):
        if path.stem not in {question.name for question in questions}:
            _remove_answer(run, path.stem)


def _remove_answer(run: Run, name: str) -> None:
    _answer_file(run, name).unlink(missing_ok=True)
    for picture in run.evaluation.glob(f"{name}-*.png"):
        picture.unlink()


def _kept_answer(run: Run, question: Question, key: str) -> dict[str, Any] | None:
    """Return the answer on disk if it has this key."""
    path = _answer_file(run, question.name)
    if not path.is_file():
        return None
    answer: dict[str, Any] = read_json(path, "delete it")
    return answer if answer.get("key") == key else None


def _new_answer(
    run: Run, question: Question, inputs: EvaluationInputs, key: str, digests: dict[str, str]
) -> dict[str, Any]:
    """Compute and write an answer: pictures first, the JSON last."""
    result: MetricResult = question.module.evaluate(inputs, question.options)
    _remove_answer(run, question.name)
    for number, picture in enumerate(result.pictures):
        picture.path = f"{question.name}-{number}.png"
        with atomic_path(run.evaluation / picture.path) as temporary:
            temporary.write_bytes(png_bytes(picture.pixels))
    answer = {
        "metric": question.name,
        "version": question.module.VERSION,
        "key": key,
        "inputs": digests,
        "options": question.options.model_dump(mode="json"),
        **result.as_json(),
    }
    write_json(_answer_file(run, question.name), answer)
    say(f"{question.name}: {result.verdict}")
    return answer
