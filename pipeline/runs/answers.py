"""Which answers of an evaluation are about what the run has now."""

from __future__ import annotations

from collections.abc import Mapping

from maskloom.pipeline.files.atomic import model_digest
from maskloom.pipeline.results import CONTROLS, TUNED_VAE, Evaluation, read_evaluations
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.trainings import weights_now

AGAIN = "; run maskloom evaluate."


def is_current(run: Run, answer: Evaluation, digests: Mapping[str, str]) -> bool:
    """Return whether an answer is about the run's present datasets, and the present weights where it reads those.

    Args:
        run: the run.
        answer: the answer.
        digests: digests of the real dataset (`real`) and of each synthetic one by name.
    """
    return answer.is_about(digests) and not _retrained(run, answer)


def current_answers(run: Run, digests: Mapping[str, str]) -> tuple[list[Evaluation], list[str]]:
    """Return the answers that are about what the run has now, and a sentence for each that is not, or not fully.

    Args:
        run: the run.
        digests: digests of the real dataset (`real`) and of each synthetic one by name.

    Raises:
        MaskLoomError: an answer or a record is damaged.
    """
    shown, remarks = [], []
    for one in read_evaluations(run.evaluation):
        if one.inputs and not one.is_about(digests):
            remarks.append(f"{one.metric}: the answer is of other images than the run has now, and is not shown{AGAIN}")
        elif stages := _retrained(run, one):
            remarks.append(
                f"{one.metric}: the answer is about other weights than {stages[0]} has trained since, and is not shown{AGAIN}"
            )
        else:
            shown.append(one)
            missing = sorted(digests.keys() - one.inputs.keys()) if one.inputs and one.metric != CONTROLS else []
            remarks += [f"{one.metric}: the answer does not cover {', '.join(missing)}{AGAIN}"] if missing else []
    return shown, [*remarks, *_other_vae(run, shown)]


def _retrained(run: Run, answer: Evaluation) -> list[str]:
    """Return the stages that have trained other weights than those that an answer is about."""
    return [stage for stage, weights in answer.weights.items() if weights_now(run, stage) != weights]


def _other_vae(run: Run, answers: list[Evaluation]) -> list[str]:
    """Return a sentence that names the answers about another fine-tuned VAE than the run has now."""
    if not any(one.inputs for one in answers):
        return []
    tuned = run.generator / TUNED_VAE
    now = model_digest(str(tuned)) if tuned.is_dir() else None
    others = [
        one.metric for one in answers if one.inputs and one.metric != CONTROLS and one.inputs.get(TUNED_VAE) != now
    ]
    return [f"{', '.join(others)}: answered with another fine-tuned VAE than the run has now{AGAIN}"] if others else []
