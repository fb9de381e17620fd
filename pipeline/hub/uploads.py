"""What of a run goes to the Hub: which files, under which licence, and what must stay private.

The files that go are listed here by name; nothing else of a run is ever sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Contract, read_contract
from maskloom.pipeline.dataset.copies import require_no_copies
from maskloom.pipeline.dataset.held_out_images import require_none_of_its_parent
from maskloom.pipeline.dataset.licence import OPEN_LICENCE
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.files.private_paths import ABSOLUTE_PATH
from maskloom.pipeline.files.reading import read_object
from maskloom.pipeline.hub.cards import LOADING, Weights, completed_card
from maskloom.pipeline.hub.files import check_pushed_file, file_text
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.record import StageRecord, damaged_file, read_record
from maskloom.pipeline.runs.run import RECORD_FILE, Run

Part = Literal["dataset", "generator", "baseline", "synthetic"]
RepoType = Literal["model", "dataset"]
CARD, GRID = "README.md", "samples.png"
NETWORK = r"(?:\w+/)?"  # an architecture of `baselines` has one folder per network
WEIGHTS_FILE = (
    NETWORK
    + r"(?:diffusion_pytorch_model|pytorch_lora_weights|kohya_lora_weights)[\w.-]*\.safetensors(?:\.index\.json)?"
)
SHARD_FILE = r"data/\w+-\d{5}-of-\d{5}\.parquet"
SENT: dict[RepoType, re.Pattern[str]] = {
    "model": re.compile(rf"README\.md|samples\.png|{NETWORK}(?:scheduler_)?config\.json|{WEIGHTS_FILE}"),
    "dataset": re.compile(rf"README\.md|{re.escape(CONTRACT_FILE)}|{SHARD_FILE}"),
}
"""All that may go, by its path in the repository."""
REPLACED: dict[RepoType, re.Pattern[str]] = {"model": re.compile(WEIGHTS_FILE), "dataset": re.compile(SHARD_FILE)}
"""What is removed where it is not part of the upload: old shards would be read with the new ones."""
LOCAL_KEYS = ("_name_or_path", "base_model_name_or_path")  # of JSON files: where weights were loaded from


@dataclass(frozen=True)
class Target:
    """One part of a run that becomes one repository.

    It is written `dataset`, `generator:KIND`, `baseline:ARCHITECTURE` or `synthetic:NAME`.
    """

    part: Part
    name: str = ""

    def __str__(self) -> str:
        return f"{self.part}:{self.name}" if self.name else self.part

    @property
    def repo_type(self) -> RepoType:
        """The type of repository on the Hub."""
        return "model" if self.part in ("generator", "baseline") else "dataset"

    def repo_name(self, experiment: str) -> str:
        """Return the repository's name without its namespace."""
        return "-".join(filter(None, [experiment, "" if self.repo_type == "model" else self.part, self.name]))

    def folder(self, run: Run) -> Path:
        """Return the folder that holds its files."""
        return {
            "dataset": run.dataset,
            "generator": run.generator / self.name,
            "baseline": run.baselines / self.name / "weights",
            "synthetic": run.synthetic / self.name,
        }[self.part]


@dataclass(frozen=True)
class Upload:
    """The files that go into one repository.

    Attributes:
        target: the part of the run.
        repo_id: where it goes.
        files: a file, or the bytes themselves, by path in the repository.
        licences: of the data behind it.
        notes: sentences for the user.
    """

    target: Target
    repo_id: str
    files: Mapping[str, Path | bytes]
    licences: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def stage(self, folder: Path) -> None:
        """Lay the files out in an empty folder as in the repository, by links where they exist."""
        for name, source in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                path.write_bytes(source)
            else:
                path.symlink_to(source.absolute())


def find_targets(run: Run, words: Sequence[str]) -> list[Target]:
    """Return the parts that the words name, each once; `generator` names all trained weights.

    Raises:
        MaskLoomError: a word names nothing, or what it names does not exist yet.
    """
    kinds = [Target("generator", kind) for kind in LOADING if (run.generator / kind).is_dir()]
    trained = [Target("baseline", path.parent.name) for path in sorted(run.baselines.glob("*/weights"))]
    sets = [Target("synthetic", path.parent.name) for path in sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))]
    missing = {
        "generator": "" if kinds else f"{run.generator}: nothing has been trained yet; run train first",
        "baseline": "" if trained else f"{run.baselines}: no other generator has been trained yet; run baselines first",
        "synthetic": "" if sets else f"{run.synthetic}: nothing has been generated yet; run generate first",
    }
    known = {"dataset": [Target("dataset")], "generator": kinds}
    known |= {str(target): [target] for target in (*kinds, *trained, *sets)}
    for word in words:
        if problem := missing.get(word.partition(":")[0]):
            raise MaskLoomError(problem)
        if word not in known:
            raise MaskLoomError(f"{word}: no such part of {run.folder}; {nearest_name(word, list(known))}")
    return list(dict.fromkeys(target for word in words for target in known[word]))


def pack(run: Run, target: Target, repo_id: str) -> Upload:
    """Return the checked files of a part.

    Raises:
        MaskLoomError: it is unfinished or damaged, or holds copies of training or held-out images.
    """
    return (_packed_weights if target.repo_type == "model" else _packed_dataset)(run, target, repo_id)


def _packed_dataset(run: Run, target: Target, repo_id: str) -> Upload:
    folder = target.folder(run)
    if target.part != "dataset":  # the real one may be shared between runs by a link
        _check_place(folder, run)
    dataset = verify_quickly(folder)
    require_none_of_its_parent(dataset)
    require_no_copies(dataset)
    names = [name for name in (*dataset.contract.files, CONTRACT_FILE) if SENT["dataset"].fullmatch(name)]
    for name in names:
        check_pushed_file(folder / name, folder)
    first = next(dataset.rows(columns=["sample_id", "group_id"]), None)
    if first is None:
        raise MaskLoomError(f"{folder}: there are no rows to push; write the dataset again with --force")
    note = (
        f"rows are named like sample_id {first['sample_id']!r}, group_id {first['group_id']!r}: "
        "make sure that such names do not identify patients"
    )
    return Upload(target, repo_id, {name: folder / name for name in names}, _licences(dataset.contract), (note,))


def _packed_weights(run: Run, target: Target, repo_id: str) -> Upload:
    folder, contract = target.folder(run), read_contract(run.dataset)
    stage = "train" if target.part == "generator" else f"baselines/{target.name}"
    again = f"run {stage.partition('/')[0]} again"
    record = read_record(run, stage)
    if record is None:
        raise MaskLoomError(f"{run.logs(stage) / RECORD_FILE}: no such file; the training has not ended; {again}")
    if record.inputs.get("dataset") != contract.digest:
        raise MaskLoomError(f"{folder}: trained on another dataset than {run.dataset} is now; {again}")
    _check_place(folder, run)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    names = [name for name in found if SENT["model"].fullmatch(name)]
    for name in names:
        check_pushed_file(folder / name, folder)
    weights = Weights(target.name, folder, record, tuple(name for name in names if name.endswith(".safetensors")))
    if not weights.files:
        raise MaskLoomError(f"{folder}: no weights to push (*.safetensors); {again}")
    _check_as_written(run, record, folder, names, again)
    files: dict[str, Path | bytes] = {name: _without_local_keys(folder / name) for name in names}
    newest = max((run.logs(stage) / "images").glob("step-*.png"), default=None)
    if GRID not in files and newest:
        check_pushed_file(newest, run.logs(stage))
        files[GRID] = newest
    text = (folder / CARD).read_text(encoding="utf-8") if CARD in files else f"# {repo_id.split('/')[-1]}\n"
    if GRID in files and GRID not in text:
        text = f"{text.rstrip()}\n\n![conditioning | real | samples]({GRID})\n"
    card, notes = completed_card(text, weights, repo_id, run)
    return Upload(target, repo_id, {**files, CARD: card.encode()}, _licences(contract), tuple(notes))


def _check_as_written(run: Run, record: StageRecord, folder: Path, names: Sequence[str], again: str) -> None:
    """Check that the files to push are those of the training; the card may be edited by hand."""
    prefix = f"{folder.relative_to(run.folder).as_posix()}/"
    written = {name.removeprefix(prefix): digest for name, digest in record.files.items() if name.startswith(prefix)}
    if strange := next((name for name in names if name not in {*written, CARD, GRID}), None):
        raise MaskLoomError(f"{folder / strange}: not a file that the training wrote; move it away, then push again")
    unchecked = {CARD} if GRID in names else {CARD, GRID}
    sent = {name: digest for name, digest in written.items() if SENT["model"].fullmatch(name) and name not in unchecked}
    if problem := damaged_file(run, {prefix + name: digest for name, digest in sent.items()}):
        raise MaskLoomError(f"{problem}: damaged since its training; {again}, which makes it anew")


def _check_place(folder: Path, run: Run) -> None:
    """Check that a folder lies in its run, not behind a link."""
    if not folder.resolve().is_relative_to(run.folder.resolve()):
        raise MaskLoomError(f"{folder}: lies outside the run, behind a link; push from the run that it belongs to")


def _without_local_keys(path: Path) -> Path | bytes:
    """Return a JSON file without the keys that name local paths; other files as they are."""
    if path.suffix != ".json":
        return path
    values = read_object(path, "run its training again")
    kept = {key: value for key, value in values.items() if key not in LOCAL_KEYS}
    return path if kept == values else (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()


def _licences(contract: Contract) -> tuple[str, ...]:
    """Return the licence of the data and those of the external test sets in it."""
    external = contract.description.preprocessing.get("external") or {}
    return tuple(dict.fromkeys([contract.description.licence, *(str(about["licence"]) for about in external.values())]))


def check_licence(upload: Upload, public: bool, may_publish: bool) -> None:
    """Print the data's licences; refuse to publish where they do not clearly allow it.

    This holds for weights too: their samples show real images, and they may reproduce some.

    Raises:
        MaskLoomError: it would be public, and the user has not said that it may be.
    """
    closed = [licence for licence in upload.licences if not OPEN_LICENCE.fullmatch(licence.strip())]
    if closed and public and not may_publish:
        raise MaskLoomError(
            f"{upload.target}: the licence of its data does not plainly let everyone pass it on: {closed[0]!r}; "
            "push without --public, or add --i-have-the-right if you may publish it"
        )
    say(f"{upload.target}: licence of the data: {'; '.join(upload.licences)}")
    if closed and not public:
        say(f"{upload.target}: who may see the private repository must be allowed to have the data")


def check_leaks(upload: Upload, config: ExperimentConfig, run: Run) -> None:
    """Refuse any text that contains a path of this machine.

    Raises:
        MaskLoomError: names the file and the path.
    """
    places = [Path.home(), Path.cwd(), run.folder.absolute(), run.folder.resolve(), config.data.raw_dir]
    known = [str(place) for place in places if place is not None and place.is_absolute() and len(place.parts) > 2]
    for name, source in upload.files.items():
        text = file_text(source) if isinstance(source, Path) else source.decode("utf-8", "replace")
        pattern = ABSOLUTE_PATH.search(text)
        if shown := next((place for place in known if place in text), pattern and pattern[0]):
            raise MaskLoomError(
                f"{upload.target.folder(run) / name}: names a path of this machine, {shown!r}, which must not be "
                "published; give it relative, or take it out of the configuration, and write the folder again"
            )
