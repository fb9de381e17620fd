"""What of a run goes to the Hub: which files, under which licence, and what must stay at home.

What goes is listed here by name; nothing else of a run ever does.
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
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.files.private_paths import ABSOLUTE_PATH
from maskloom.pipeline.files.reading import read_object
from maskloom.pipeline.hub.cards import LOADING, Weights, completed_card
from maskloom.pipeline.hub.files import check_pushed_file, file_text
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.record import StageRecord, damaged_file, read_record
from maskloom.pipeline.runs.run import RECORD_FILE, Run

CARD, PICTURES = "README.md", "samples.png"
RepoType = Literal["model", "dataset"]
WEIGHTS_FILE = (
    r"(?:diffusion_pytorch_model|pytorch_lora_weights|kohya_lora_weights)[\w.-]*\.safetensors(?:\.index\.json)?"
)
SCHEDULER_FILE = r"scheduler_config\.json"
NETWORK = r"(?:\w+/)?"
"""An architecture has a folder for each of its networks."""
SHARD_FILE = r"data/\w+-\d{5}-of-\d{5}\.parquet"
SENT: dict[RepoType, re.Pattern[str]] = {
    "model": re.compile(
        rf"{re.escape(CARD)}|{re.escape(PICTURES)}|{NETWORK}(?:config\.json|{SCHEDULER_FILE}|{WEIGHTS_FILE})"
    ),
    "dataset": re.compile(rf"{re.escape(CARD)}|{re.escape(CONTRACT_FILE)}|{SHARD_FILE}"),
}
"""All that may go, by its path in the repository."""
REPLACED: dict[RepoType, re.Pattern[str]] = {
    "model": re.compile(NETWORK + WEIGHTS_FILE),
    "dataset": re.compile(SHARD_FILE),
}
"""What is removed from the repository where it is no part of the new state: an old shard would be read with the new ones."""
LOCAL_KEYS = ("_name_or_path", "base_model_name_or_path")  # of config.json and adapters: where weights were loaded from
OPEN_LICENCE = re.compile(
    r"(cc0(-1\.0)?|cc-by(-sa)?-\d\.\d|mit|apache-2\.0|pddl(-1\.0)?|odc-by(-1\.0)?|cdla-permissive-\d\.\d)( \([^()]*\))?",
    re.IGNORECASE,
)
"""Licences, with or without a remark in brackets, that let anyone pass the data on for any purpose. Any other is asked about."""


@dataclass(frozen=True)
class Target:
    """One part of a run that becomes one repository: `dataset`, `generator:KIND`, `baseline:NAME` or `synthetic:NAME`."""

    part: Literal["dataset", "generator", "baseline", "synthetic"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.part}:{self.name}" if self.name else self.part

    @property
    def is_weights(self) -> bool:
        """Whether it was trained."""
        return self.part in ("generator", "baseline")

    @property
    def repo_type(self) -> RepoType:
        """The kind of repository on the Hub."""
        return "model" if self.is_weights else "dataset"

    def repo_name(self, experiment: str) -> str:
        """Return the repository's name without its namespace."""
        return "-".join([experiment, *([] if self.is_weights else [self.part]), *filter(None, [self.name])])

    def folder(self, run: Run) -> Path:
        """Return where it lies."""
        if self.part == "baseline":
            return run.baselines / self.name / "weights"
        return {"dataset": run.folder, "generator": run.generator, "synthetic": run.synthetic}[self.part] / (
            self.name or "dataset"
        )


@dataclass(frozen=True)
class Upload:
    """The files that go into one repository.

    Attributes:
        files: a file, or the bytes themselves, by path in the repository.
        licences: of the data behind it.
        notes: sentences for the user.
    """

    target: Target
    repo_id: str
    files: Mapping[str, Path | bytes]
    licences: tuple[str, ...]
    notes: tuple[str, ...] = ()


def find_targets(run: Run, words: Sequence[str]) -> list[Target]:
    """Return what the words name, each once; `generator` names every folder of trained weights.

    Raises:
        MaskLoomError: a word names nothing, or what it names is not there.
    """
    kinds = [kind for kind in LOADING if (run.generator / kind).is_dir()]
    architectures = [path.parent.name for path in sorted(run.baselines.glob("*/weights"))]
    sets = [path.parent.name for path in sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))]
    known = {"dataset": [Target("dataset")], "generator": [Target("generator", kind) for kind in kinds]}
    known |= {str(target): [target] for target in known["generator"]}
    known |= {f"baseline:{name}": [Target("baseline", name)] for name in architectures}
    known |= {f"synthetic:{name}": [Target("synthetic", name)] for name in sets}
    found: dict[Target, None] = {}
    for word in words:
        if word.partition(":")[0] == "generator" and not kinds:
            raise MaskLoomError(f"{run.generator}: nothing has been trained yet; run train first")
        if word.partition(":")[0] == "baseline" and not architectures:
            raise MaskLoomError(f"{run.baselines}: no other generator has been trained yet; run baselines first")
        if word.partition(":")[0] == "synthetic" and not sets:
            raise MaskLoomError(f"{run.synthetic}: nothing has been generated yet; run generate first")
        if word not in known:
            raise MaskLoomError(f"{word}: no such part of {run.folder}; {nearest_name(word, list(known))}")
        found |= dict.fromkeys(known[word])
    return list(found)


def pack(config: ExperimentConfig, run: Run, target: Target, repo_id: str) -> Upload:
    """Return what of a target goes, checked.

    Raises:
        MaskLoomError: it is unfinished or damaged.
    """
    return _packed_weights(run, target, repo_id) if target.is_weights else _packed_set(run, target, repo_id)


def _packed_set(run: Run, target: Target, repo_id: str) -> Upload:
    folder = target.folder(run)
    if target.part != "dataset":  # the real one may be shared between runs by a link
        _check_place(folder, run)
    dataset = verify_quickly(folder)
    files = {
        name: folder / name for name in (*dataset.contract.files, CONTRACT_FILE) if SENT["dataset"].fullmatch(name)
    }
    for path in files.values():
        check_pushed_file(path, folder)
    first = next(dataset.rows(columns=["sample_id", "group_id"]), None)
    if first is None:
        raise MaskLoomError(f"{folder}: there are no rows to push; write the dataset again with --force")
    note = (
        f"rows are named like sample_id {first['sample_id']!r}, group_id {first['group_id']!r}: "
        "make sure that such names tell no patient"
    )
    return Upload(target, repo_id, dict(files), _licences(dataset.contract), (note,))


def _packed_weights(run: Run, target: Target, repo_id: str) -> Upload:
    folder = target.folder(run)
    contract = read_contract(run.dataset)
    stage, again = ("train", "train") if target.part == "generator" else (f"baselines/{target.name}", "baselines")
    record = read_record(run, stage)
    if record is None:
        raise MaskLoomError(
            f"{run.logs(stage) / RECORD_FILE}: no such file; the training has not ended; run {again} again"
        )
    if record.inputs.get("dataset") != contract.digest:
        raise MaskLoomError(f"{folder}: trained on another dataset than {run.dataset} is now; run {again} again")
    _check_place(folder, run)
    names = sorted(
        name for path in folder.rglob("*") if SENT["model"].fullmatch(name := path.relative_to(folder).as_posix())
    )
    for name in names:
        check_pushed_file(folder / name, folder)
    if not any(name.endswith(".safetensors") for name in names):
        raise MaskLoomError(f"{folder}: no weights to push (*.safetensors); run {again} again")
    _check_as_written(run, record, folder, names, again)
    files: dict[str, Path | bytes] = {name: _without_local_keys(folder / name) for name in names}
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {repo_id.split('/')[-1]}\n"
    if PICTURES not in files and (pictures := max((run.logs(stage) / "images").glob("step-*.png"), default=None)):
        check_pushed_file(pictures, run.logs(stage))
        files[PICTURES] = pictures
    if PICTURES in files and PICTURES not in text:
        text = f"{text.rstrip()}\n\n![conditioning | real | samples]({PICTURES})\n"
    notes: list[str] = []
    weights = Weights(target.name, folder, stage, record.model_dump(mode="json"))
    files[CARD] = completed_card(text, weights, repo_id, run, notes).encode()
    return Upload(target, repo_id, files, _licences(contract), tuple(notes))


def _check_as_written(run: Run, record: StageRecord, folder: Path, names: Sequence[str], again: str) -> None:
    """Check that the files to push are those of the training; the card may be edited by hand.

    Raises:
        MaskLoomError: one is missing or changed, or is not of this training.
    """
    place = folder.relative_to(run.folder).as_posix()
    written = {
        name.removeprefix(f"{place}/"): known for name, known in record.files.items() if name.startswith(f"{place}/")
    }
    strange = next((name for name in names if name not in written and name not in (CARD, PICTURES)), None)
    if strange:
        raise MaskLoomError(f"{folder / strange}: not a file that the training wrote; move it away, then push again")
    sent = {
        f"{place}/{name}": known
        for name, known in written.items()
        if SENT["model"].fullmatch(name) and name != CARD and (name in names or name != PICTURES)
    }
    if problem := damaged_file(run, sent):
        raise MaskLoomError(f"{problem}: damaged since its training; run {again} again, which makes it anew")


def _check_place(folder: Path, run: Run) -> None:
    """Check that a folder lies in its run, not behind a link.

    Raises:
        MaskLoomError: it lies elsewhere.
    """
    if not folder.resolve().is_relative_to(run.folder.resolve()):
        raise MaskLoomError(f"{folder}: lies outside the run, behind a link; push from the run that it belongs to")


def _without_local_keys(path: Path) -> Path | bytes:
    """Return a JSON file without the keys that say where weights were loaded from; any other file as it is."""
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
    """Say the data's licences; refuse to publish where they do not plainly allow it.

    Weights count as well: their sample pictures show real images, and they may have learnt some by heart.

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
    """Refuse any text that names a place on this machine.

    Raises:
        MaskLoomError: names the file and the path.
    """
    places = [Path.home(), Path.cwd(), run.folder.absolute(), run.folder.resolve(), config.data.raw_dir]
    known = [str(place) for place in places if place is not None and place.is_absolute() and len(place.parts) > 2]
    for name, source in upload.files.items():
        text = file_text(source) if isinstance(source, Path) else source.decode("utf-8", "replace")
        found = next((place for place in known if place in text), None) or ABSOLUTE_PATH.search(text)
        if found:
            shown = found if isinstance(found, str) else found[0]
            raise MaskLoomError(
                f"{upload.target.folder(run) / name}: names a path of this machine, {shown!r}, which must not be published; "
                "give it relative, or take it out of the configuration, and write the folder again"
            )
