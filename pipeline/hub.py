"""A run's dataset, weights and synthetic datasets to the Hugging Face Hub, one repository each.

What goes is listed here by name; nothing else of a run ever does. A push is one commit, made when every large file has arrived: a
repository shows the old state or the new one. Running it again after a break sends only what the Hub does not have.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import __version__
from pipeline.config import ExperimentConfig
from pipeline.contract import CONTRACT_FILE, Contract, read_contract, read_ids
from pipeline.errors import MaskLoomError, nearest_name, one_line
from pipeline.files import file_digest, read_json
from pipeline.hub_cards import LOADING, completed_card
from pipeline.progress import say
from pipeline.runs import Run
from pipeline.verification import verify_quickly

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

CARD, PICTURES = "README.md", "samples.png"
MAIN = "main"
RepoType = Literal["model", "dataset"]
WEIGHTS_FILE = r"(?:diffusion_pytorch_model|pytorch_lora_weights)[\w.-]*\.safetensors(?:\.index\.json)?"
SHARD_FILE = r"data/\w+-\d{5}-of-\d{5}\.parquet"
SENT: dict[RepoType, re.Pattern[str]] = {
    "model": re.compile(rf"{re.escape(CARD)}|{re.escape(PICTURES)}|config\.json|{WEIGHTS_FILE}"),
    "dataset": re.compile(rf"{re.escape(CARD)}|{re.escape(CONTRACT_FILE)}|{SHARD_FILE}"),
}
"""All that may go, by its path in the repository."""
REPLACED: dict[RepoType, re.Pattern[str]] = {"model": re.compile(WEIGHTS_FILE), "dataset": re.compile(SHARD_FILE)}
"""What is removed from the repository where it is no part of the new state: an old shard would be read with the new ones."""
LOCAL_KEYS = ("_name_or_path", "base_model_name_or_path")  # of config.json and adapters: where weights were loaded from
OPEN_LICENCE = re.compile(
    r"(cc0(-1\.0)?|cc-by(-sa)?-\d\.\d|mit|apache-2\.0|pddl(-1\.0)?|odc-by(-1\.0)?|cdla-permissive-\d\.\d)( \([^()]*\))?",
    re.IGNORECASE,
)
"""Licences, with or without a remark in brackets, that let anyone pass the data on for any purpose. Any other is asked about."""
ABSOLUTE_PATH = re.compile(r"(?<![\w:/.<~)\]}*?+-])/[\w.@+-]+(?:/[\w.@+-]+)+|\b[A-Za-z]:\\+\w+|file://")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
SIGNED_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]*")  # upload addresses are credentials for a while
SECONDS = 10.0  # for the first answer
SHOWN_LETTERS = 300  # of a server's message
REMEDIES = {
    400: "it does not take a file as it is: README.md's metadata must be as the Hub's cards ask",
    401: "it does not take the token: run `hf auth login` again, or set HF_TOKEN to a valid one",
    403: "the token may not write there: use one with write access to this namespace",
    404: "there is no such repository or branch, or the token may not see it",
    409: "the repository was changed at the same time: run the same command again",
    429: "too many requests: wait some minutes, then run the same command again",
}


@dataclass(frozen=True)
class Target:
    """One part of a run that becomes one repository: `dataset`, `generator:KIND` or `synthetic:NAME`."""

    part: Literal["dataset", "generator", "synthetic"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.part}:{self.name}" if self.name else self.part

    @property
    def repo_type(self) -> RepoType:
        """The kind of repository on the Hub."""
        return "model" if self.part == "generator" else "dataset"

    def repo_name(self, experiment: str) -> str:
        """Return the repository's name without its namespace."""
        return "-".join([experiment, *([] if self.part == "generator" else [self.part]), *filter(None, [self.name])])

    def folder(self, run: Run) -> Path:
        """Return where it lies."""
        return {"dataset": run.folder, "generator": run.generator, "synthetic": run.synthetic}[self.part] / (
            self.name or "dataset"
        )


@dataclass(frozen=True)
class PushOptions:
    """The command line's switches.

    Attributes:
        repo_id: NAME or NAMESPACE/NAME; None names the repository after the experiment.
        public: else the repository is private.
        may_publish: the user says that publishing is allowed, whatever the licence.
        dry_run: only list.
        revision: branch.
    """

    repo_id: str | None = None
    public: bool = False
    may_publish: bool = False
    dry_run: bool = False
    revision: str = MAIN


@dataclass(frozen=True)
class Parcel:
    """What goes into one repository.

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


@dataclass(frozen=True)
class Remote:
    """What the Hub has of a repository.

    Attributes:
        exists: whether there is such a repository.
        has_branch: whether the branch is there.
        private: of an existing repository.
        files: by path.
        unread: why nothing of this is known; empty where it is.
    """

    exists: bool = False
    has_branch: bool = False
    private: bool | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    unread: str = ""


def push(config: ExperimentConfig, words: Sequence[str], options: PushOptions) -> None:
    """Push parts of a run; prints each repository's address.

    Everything is checked on this machine before the first byte goes.

    Args:
        config: the experiment.
        words: `dataset`, `generator`, `generator:KIND`, `synthetic:NAME`; none: `generator`.
        options: see there.

    Raises:
        MaskLoomError: there is nothing to push, it must not go, or the Hub cannot be reached or refuses.
    """
    run = Run(config.run_folder)
    targets = find_targets(run, words or ["generator"])
    hub = Hub(options.dry_run)
    parcels = [pack(config, run, target, repo_id) for target, repo_id in _addresses(targets, config, options, hub)]
    for parcel in parcels:
        _check_licence(parcel, options)
        _check_leaks(parcel, config, run)
    for parcel in parcels:
        for note in parcel.notes:
            say(f"{parcel.target}: {note}")
        _push_one(hub, parcel, options)


def find_targets(run: Run, words: Sequence[str]) -> list[Target]:
    """Return what the words name, each once; `generator` names every folder of trained weights.

    Raises:
        MaskLoomError: a word names nothing, or what it names is not there.
    """
    kinds = [kind for kind in LOADING if (run.generator / kind).is_dir()]
    sets = [path.parent.name for path in sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))]
    known = {"dataset": [Target("dataset")], "generator": [Target("generator", kind) for kind in kinds]}
    known |= {str(target): [target] for target in known["generator"]}
    known |= {f"synthetic:{name}": [Target("synthetic", name)] for name in sets}
    found: dict[Target, None] = {}
    for word in words:
        if word.partition(":")[0] == "generator" and not kinds:
            raise MaskLoomError(f"{run.generator}: nothing has been trained yet; run train first")
        if word.partition(":")[0] == "synthetic" and not sets:
            raise MaskLoomError(f"{run.synthetic}: nothing has been generated yet; run generate first")
        if word not in known:
            raise MaskLoomError(f"{word}: no such part of {run.folder}; {nearest_name(word, list(known))}")
        found |= dict.fromkeys(known[word])
    return list(found)


def pack(config: ExperimentConfig, run: Run, target: Target, repo_id: str) -> Parcel:
    """Return what of a target goes, checked.

    Raises:
        MaskLoomError: it is unfinished or damaged.
    """
    return _packed_weights(run, target, repo_id) if target.part == "generator" else _packed_set(run, target, repo_id)


def _packed_set(run: Run, target: Target, repo_id: str) -> Parcel:
    folder = target.folder(run)
    contract = verify_quickly(folder)
    files: dict[str, Path | bytes] = {
        name: folder / name for name in (*contract.files, CONTRACT_FILE) if SENT["dataset"].fullmatch(name)
    }
    shards = [name for name in files if name.startswith("data/")]
    if not shards:
        raise MaskLoomError(f"{folder}: there are no rows to push; write the dataset again with --force")
    sample, group = next(iter(read_ids(folder, shards[:1]).values()))[0]
    note = f"rows are named like sample_id {sample!r}, group_id {group!r}: make sure that such names tell no patient"
    return Parcel(target, repo_id, files, _licences(contract), (note,))


def _packed_weights(run: Run, target: Target, repo_id: str) -> Parcel:
    folder = target.folder(run)
    contract = read_contract(run.dataset)
    record = read_json(run.logs("train") / "stage.json", "the training has not ended; run train again")
    if record["inputs"].get("dataset") != contract.digest:
        raise MaskLoomError(f"{folder}: trained on another dataset than {run.dataset} is now; run train again")
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and SENT["model"].fullmatch(path.name))
    if not any(name.endswith(".safetensors") for name in names):
        raise MaskLoomError(f"{folder}: no weights to push (*.safetensors); run train again")
    files: dict[str, Path | bytes] = {name: _without_local_keys(folder / name) for name in names}
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {repo_id.split('/')[-1]}\n"
    if PICTURES not in files and (pictures := max((run.logs("train") / "images").glob("step-*.png"), default=None)):
        files[PICTURES] = pictures
    if PICTURES in files and PICTURES not in text:
        text = f"{text.rstrip()}\n\n![conditioning | real | samples]({PICTURES})\n"
    notes: list[str] = []
    files[CARD] = completed_card(text, target.name, repo_id, run, record, notes).encode()
    return Parcel(target, repo_id, files, _licences(contract), tuple(notes))


def _without_local_keys(path: Path) -> Path | bytes:
    """Return a JSON file without the keys that say where weights were loaded from; any other file as it is."""
    if path.suffix != ".json":
        return path
    values = read_json(path, "run train again")
    kept = {key: value for key, value in values.items() if key not in LOCAL_KEYS}
    return path if kept == values else (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()


def _licences(contract: Contract) -> tuple[str, ...]:
    """Return the licence of the data and those of the external test sets in it."""
    external = contract.description.preprocessing.get("external") or {}
    return tuple(dict.fromkeys([contract.description.licence, *(str(about["licence"]) for about in external.values())]))


def _check_licence(parcel: Parcel, options: PushOptions) -> None:
    """Say the data's licences; refuse to publish where they do not plainly allow it.

    Weights count as well: their sample pictures show real images, and they may have learnt some by heart.
    """
    closed = [licence for licence in parcel.licences if not OPEN_LICENCE.fullmatch(licence.strip())]
    if closed and options.public and not options.may_publish:
        raise MaskLoomError(
            f"{parcel.target}: the licence of its data does not plainly let everyone pass it on: {closed[0]!r}; "
            "push without --public, or add --i-have-the-right if you may publish it"
        )
    say(f"{parcel.target}: licence of the data: {'; '.join(parcel.licences)}")
    if closed and not options.public:
        say(f"{parcel.target}: who may see the private repository must be allowed to have the data")


def _check_leaks(parcel: Parcel, config: ExperimentConfig, run: Run) -> None:
    """Refuse any text that names a place on this machine.

    Raises:
        MaskLoomError: names the file and the path.
    """
    places = [Path.home(), Path.cwd(), run.folder.absolute(), run.folder.resolve(), config.data.raw_dir]
    known = [str(place) for place in places if place is not None and place.is_absolute() and len(place.parts) > 2]
    for name, source in parcel.files.items():
        text = _text_of(name, source)
        found = next((place for place in known if place in text), None) or ABSOLUTE_PATH.search(text)
        if found:
            shown = found if isinstance(found, str) else found[0]
            raise MaskLoomError(
                f"{parcel.target.folder(run) / name}: names a path of this machine, {shown!r}, which must not be published; "
                "give it relative, or take it out of the configuration, and write the folder again"
            )


def _text_of(name: str, source: Path | bytes) -> str:
    """Return what a file says in words: a text file whole, of weights the metadata.

    Raises:
        MaskLoomError: weights are cut short or are none.
    """
    from safetensors import SafetensorError, safe_open

    if isinstance(source, Path) and source.suffix == ".safetensors":
        try:
            with safe_open(source, framework="numpy") as tensors:
                return json.dumps(tensors.metadata() or {}, ensure_ascii=False)
        except SafetensorError as error:
            raise MaskLoomError(f"{source}: damaged weights ({one_line(error)}); run train again") from None
    if not name.endswith((".md", ".json")):
        return ""
    return (source if isinstance(source, bytes) else source.read_bytes()).decode("utf-8", "replace")


def _addresses(
    targets: Sequence[Target], config: ExperimentConfig, options: PushOptions, hub: Hub
) -> list[tuple[Target, str]]:
    """Return the repository of each target; a name without a namespace goes to the token's own.

    Raises:
        MaskLoomError: one name for several repositories, or a name that the Hub does not take.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if options.repo_id and len(targets) > 1:
        raise MaskLoomError(
            f"--repo-id {options.repo_id}: one name for {len(targets)} repositories ({', '.join(map(str, targets))}); push them one by one"
        )
    names = [options.repo_id or target.repo_name(config.experiment) for target in targets]
    for name in names:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise MaskLoomError(f"--repo-id: {one_line(error)}; give NAMESPACE/NAME") from None
    return [
        (target, name if "/" in name else f"{hub.namespace()}/{name}")
        for target, name in zip(targets, names, strict=True)
    ]


def _push_one(hub: Hub, parcel: Parcel, options: PushOptions) -> None:
    """Bring one repository to the parcel's state, or list what that takes."""
    visibility = "public" if options.public else "private"
    remote = hub.look(parcel, options)
    changes = list(compare(parcel, remote))
    if remote.exists and remote.private is False and not options.public:
        raise MaskLoomError(
            f"{parcel.repo_id}: the repository is public; push with --public, make it private on its settings page, or choose another --repo-id"
        )
    if remote.exists and remote.private and options.public:
        say(f"{parcel.repo_id}: is private and stays so: make it public on its settings page")
    if options.dry_run:
        _list(parcel, remote, changes, visibility)
        return
    news = [(path, state) for path, _, state in changes if state != "unchanged"]
    if news:
        hub.send(parcel, remote, news, options)
        after = hub.look(parcel, options)
        missing = next((path for path, _, state in compare(parcel, after) if state != "unchanged"), None)
        if missing:
            raise MaskLoomError(
                f"{parcel.repo_id}: {missing} did not arrive as it is here (does the repository's .gitignore name it?)"
            )
    say(f"{parcel.target}: {len(news)} of {len(changes)} files changed" if news else f"{parcel.target}: up to date")
    print(hub.address(parcel, options))


def _list(parcel: Parcel, remote: Remote, changes: Sequence[tuple[str, int, str]], visibility: str) -> None:
    """Print what a push would do."""
    does = "would change" if any(state != "unchanged" for *_, state in changes) else "is up to date"
    state = f"not compared: {remote.unread}" if remote.unread else does if remote.exists else "would create"
    print(f"{parcel.target} -> {parcel.repo_id} ({parcel.target.repo_type}, {visibility}): {state}")
    for path, size, change in changes:
        print(f"  {'would send' if remote.unread else change:<10} {_size(size):>9}  {path}")


def _size(count: int) -> str:
    """Return a number of bytes as `812 B`, `1.2 kB` or `8.8 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def compare(parcel: Parcel, remote: Remote) -> Iterator[tuple[str, int, str]]:
    """Yield path, size and `new`, `changed`, `unchanged` or `removed` for every file of either side that a push concerns."""
    for path, source in sorted(parcel.files.items()):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        there = remote.files.get(path)
        state = "new" if there is None else "unchanged" if _is_same(source, size, there) else "changed"
        yield path, size, state
    replaced = REPLACED[parcel.target.repo_type]
    for path in sorted(remote.files.keys() - parcel.files.keys()):
        if replaced.fullmatch(path):
            yield path, remote.files[path].size, "removed"


def _is_same(source: Path | bytes, size: int, there: RepoFile) -> bool:
    """Whether the Hub has these bytes: by SHA-256 for large files, by git's own hash for the others."""
    from huggingface_hub.utils.sha import git_hash

    if there.size != size:
        return False
    if there.lfs is not None and isinstance(source, Path):
        return bool(there.lfs.sha256 == file_digest(source))
    return bool(there.blob_id == git_hash(source if isinstance(source, bytes) else source.read_bytes()))


class Hub:
    """The Hub as the user's token sees it. Every failure is one line that holds no token."""

    def __init__(self, dry_run: bool) -> None:
        """Take the token of `HF_TOKEN` or `hf auth login`; the address is `HF_ENDPOINT`'s.

        Args:
            dry_run: without a token, only nothing can be compared.

        Raises:
            MaskLoomError: there is no token, or what is there is none.
        """
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils.logging import set_verbosity_error

        set_verbosity_error()  # its warnings name upload addresses, which are credentials for a while
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.token: str | None = None
        with self._told("the token"):
            self.token = get_token()
        if self.token is None and not dry_run:
            raise MaskLoomError("no Hugging Face token; run `hf auth login`, or set HF_TOKEN, then push again")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise MaskLoomError("the Hugging Face token holds characters that no token has; run `hf auth login` again")
        self.api: HfApi = HfApi(token=self.token or False, library_name="maskloom", library_version=__version__)
        self.dry_run = dry_run

    def namespace(self) -> str:
        """Return the token's user; in a dry run `NAMESPACE` where that cannot be known."""
        if self.token is None:
            return "NAMESPACE"
        try:
            with self._told("your account"):
                return str(self.api.whoami(cache=True)["name"])
        except MaskLoomError:
            if self.dry_run:
                return "NAMESPACE"
            raise

    def look(self, parcel: Parcel, options: PushOptions) -> Remote:
        """Return what the Hub has; in a dry run a Hub that does not answer is no error.

        Raises:
            MaskLoomError: it does not answer, or the name is taken by a repository of the other kind.
        """
        if self.token is None:
            return Remote(unread="no token (`hf auth login`)")
        try:
            with self._told(parcel.repo_id):
                return self._read(parcel, options.revision)
        except MaskLoomError as error:
            if self.dry_run:
                return Remote(unread=str(error))
            raise

    def _read(self, parcel: Parcel, revision: str) -> Remote:
        from huggingface_hub.errors import RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        info = self._info(parcel.repo_id, parcel.target.repo_type)
        if info is None:
            other: RepoType = "dataset" if parcel.target.repo_type == "model" else "model"
            if self._info(parcel.repo_id, other) is not None:
                raise MaskLoomError(
                    f"{parcel.repo_id}: exists as a {other}, and this is a {parcel.target.repo_type}; choose another --repo-id"
                )
            return Remote()
        try:
            tree = list(
                self.api.list_repo_tree(
                    parcel.repo_id, recursive=True, revision=revision, repo_type=parcel.target.repo_type
                )
            )
        except RevisionNotFoundError:
            return Remote(exists=True, private=info.private)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        return Remote(exists=True, has_branch=True, private=info.private, files=files)

    def _info(self, repo_id: str, repo_type: RepoType) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self.api.repo_info(repo_id, repo_type=repo_type, timeout=SECONDS)
        except RepositoryNotFoundError:
            return None

    def send(self, parcel: Parcel, remote: Remote, news: Sequence[tuple[str, str]], options: PushOptions) -> None:
        """Make the repository and the branch where they are missing, and commit what is new.

        Raises:
            MaskLoomError: the Hub refuses, or the connection breaks. Files that have arrived stay there.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        where: dict[str, Any] = {"repo_id": parcel.repo_id, "repo_type": parcel.target.repo_type}
        with self._told(parcel.repo_id), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client prints what the server says about the card
            if not remote.exists:
                self.api.create_repo(**where, private=not options.public)
                if not options.public and not self.api.repo_info(**where).private:
                    raise MaskLoomError(
                        f"{parcel.repo_id}: {self.api.endpoint} made it public although private was asked for; nothing was sent"
                    )
            if not remote.has_branch and options.revision != MAIN:
                self.api.create_branch(**where, branch=options.revision, exist_ok=True)
            operations = [
                CommitOperationDelete(path) if state == "removed" else CommitOperationAdd(path, parcel.files[path])
                for path, state in news
            ]
            self.api.create_commit(
                **where,
                operations=operations,
                revision=options.revision,
                commit_message=f"Push {parcel.target} (MaskLoom {__version__})",
            )

    def address(self, parcel: Parcel, options: PushOptions) -> str:
        """Return the repository's page."""
        prefix = "datasets/" if parcel.target.repo_type == "dataset" else ""
        branch = "" if options.revision == MAIN else f"/tree/{options.revision}"
        return f"{self.api.endpoint}/{prefix}{parcel.repo_id}{branch}"

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn any failure of the block, which must do nothing but talk to the Hub, into one line without secrets."""
        try:
            yield
        except MaskLoomError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:  # a file of this machine
                raise
            raise MaskLoomError(f"{what}: {self._reason(error)}") from None

    def _reason(self, error: BaseException) -> str:
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, OfflineModeIsEnabled):
            return "the Hub is not asked while HF_HUB_OFFLINE is set; unset it"
        if not isinstance(error, HfHubHTTPError):
            text = self._scrubbed(f"{type(error).__name__}: {one_line(error)}")
            return f"no answer from {ENDPOINT}, or not to the end ({text}); check the network, then run the same command again: files that have arrived stay there"
        status = error.response.status_code
        said = self._scrubbed(one_line(error.server_message or ""))[:SHOWN_LETTERS]
        remedy = REMEDIES.get(status, "run the same command again later: files that have arrived stay there")
        return f"{ENDPOINT} answers {status}{f' ({said})' if said else ''}; {remedy}"

    def _scrubbed(self, text: str) -> str:
        """Return text without the token, anything that looks like one, and the signatures of upload addresses."""
        if self.token:
            text = text.replace(self.token, "<token>")
        return SIGNED_QUERY.sub(r"\1", TOKEN.sub("<token>", text))
