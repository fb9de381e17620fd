"""The folder `RUN/evaluation`: one JSON file per question, its pictures, and the table of cases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from maskloom.evaluate.downstream.cases import CASES_FILE, DownstreamResult, EvaluationCases
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.questions import Question
from maskloom.pipeline.dataset.copies import COPIES_FILE
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.private_paths import without_places
from maskloom.pipeline.progress import say
from maskloom.pipeline.results import Evaluation, MetricResult, read_evaluation, write_evaluation
from maskloom.pipeline.runs.run import Run


class Answers:
    """The answers in the folder of a run."""

    def __init__(self, run: Run) -> None:
        """Open the folder; nothing is written yet, and the cases are read by `keep_only`."""
        self.folder = OwnedFolder(run.evaluation)
        self.cases = EvaluationCases(self.folder, {})

    def check(self, questions: Collection[str]) -> None:
        """Check that the folder, and the files of these questions, may be written.

        Raises:
            MaskLoomError: they are not MaskLoom's.
        """
        self.folder.check()
        for name in questions:
            self.folder.check_name(f"{name}.json")

    def keep_only(self, questions: Collection[str]) -> None:
        """Remove the answers to all other questions, which the report would show, and read the cases of these."""
        shared = {CASES_FILE, COPIES_FILE}
        others = [name for name in self.folder.files() if name not in shared and question_of(name) not in questions]
        self.folder.remove(others)
        self.cases = EvaluationCases.of(self.folder, questions)

    def kept(self, question: Question, key: str) -> Evaluation | None:
        """Return the answer on disk if it has this key and is undamaged, with its images and cases; report damage."""
        name = f"{question.name}.json"
        if not (self.folder.path / name).is_file() or name not in self.folder.files():
            return None
        own = [file for file in self.folder.files() if question_of(file) == question.name]
        problem = next((problem for file in own if (problem := self.folder.problem(file))), None)
        if problem:
            say(f"{problem}; its answer is dropped")
            return None
        answer = read_evaluation(self.folder.path / name)
        return answer if answer.key == key and answer.case_rows == self.cases.rows_of(question.name) else None

    def write(
        self,
        question: Question,
        inputs: EvaluationInputs,
        key: str,
        digests: Mapping[str, str],
        weights: Mapping[str, str],
    ) -> Evaluation:
        """Compute and write an answer: pictures and cases first, the JSON last; an older one stays until then.

        Args:
            question: the question.
            inputs: what it is asked about.
            key: digest of everything that the answer depends on.
            digests: digests of the datasets by name.
            weights: digests of trained weights that the metric itself reads, by the stage that trained them.
        """
        result: MetricResult = question.module.evaluate(inputs, question.options)
        self.folder.remove([name for name in self.folder.files() if question_of(name) == question.name])
        for number, picture in enumerate(result.pictures):
            picture.path = f"{question.name}-{number}.png"
            with self.folder.writing(picture.path) as temporary:
                temporary.write_bytes(png_bytes(picture.pixels))
        self.cases.replace(question.name, result.cases if isinstance(result, DownstreamResult) else [])
        answer = Evaluation(
            metric=question.name,
            version=question.module.VERSION,
            key=key,
            case_rows=self.cases.rows_of(question.name),
            on_copies=inputs.on_copies,
            inputs=dict(digests),
            weights=dict(weights),
            options=without_places(question.options.model_dump(mode="json")),
            **result.as_json(),
        )
        write_evaluation(self.folder, answer)
        say(f"{question.name}: {result.verdict}")
        return answer


def question_of(name: str) -> str:
    """Return the metric of a file: that of `NAME.json`, and of its images such as `NAME-0.png`."""
    path = PurePosixPath(name)
    return path.stem if path.suffix == ".json" else path.stem.rpartition("-")[0]
