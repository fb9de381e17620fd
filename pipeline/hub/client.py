"""The Hub as a push sees it: what it has, and one commit that brings it to the new state."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskloom.pipeline import __version__
from maskloom.pipeline.errors import MaskLoomError, one_line, without_secrets
from maskloom.pipeline.files.atomic import file_digest
from maskloom.pipeline.hub.uploads import REPLACED, RepoType, Upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

MAIN = "main"
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


def compare(upload: Upload, remote: Remote) -> Iterator[tuple[str, int, str]]:
    """Yield path, size and `new`, `changed`, `unchanged` or `removed` for every file of either side that a push concerns."""
    for path, source in sorted(upload.files.items()):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        there = remote.files.get(path)
        state = "new" if there is None else "unchanged" if _is_same(source, size, there) else "changed"
        yield path, size, state
    replaced = REPLACED[upload.target.repo_type]
    for path in sorted(remote.files.keys() - upload.files.keys()):
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

    def look(self, upload: Upload, options: PushOptions) -> Remote:
        """Return what the Hub has; in a dry run a Hub that does not answer is no error.

        Raises:
            MaskLoomError: it does not answer, or the name is taken by a repository of the other kind.
        """
        if self.token is None:
            return Remote(unread="no token (`hf auth login`)")
        try:
            with self._told(upload.repo_id):
                return self._read(upload, options.revision)
        except MaskLoomError as error:
            if self.dry_run:
                return Remote(unread=str(error))
            raise

    def _read(self, upload: Upload, revision: str) -> Remote:
        from huggingface_hub.errors import RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        info = self._info(upload.repo_id, upload.target.repo_type)
        if info is None:
            other: RepoType = "dataset" if upload.target.repo_type == "model" else "model"
            if self._info(upload.repo_id, other) is not None:
                raise MaskLoomError(
                    f"{upload.repo_id}: exists as a {other}, and this is a {upload.target.repo_type}; choose another --repo-id"
                )
            return Remote()
        try:
            tree = list(
                self.api.list_repo_tree(
                    upload.repo_id, recursive=True, revision=revision, repo_type=upload.target.repo_type
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

    def send(self, upload: Upload, remote: Remote, news: Sequence[tuple[str, str]], options: PushOptions) -> None:
        """Make the repository and the branch where they are missing, and commit what is new.

        Raises:
            MaskLoomError: the Hub refuses, or the connection breaks. Files that have arrived stay there.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        where: dict[str, Any] = {"repo_id": upload.repo_id, "repo_type": upload.target.repo_type}
        with self._told(upload.repo_id), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client prints what the server says about the card
            if not remote.exists:
                self.api.create_repo(**where, private=not options.public)
                if not options.public and not self.api.repo_info(**where).private:
                    raise MaskLoomError(
                        f"{upload.repo_id}: {self.api.endpoint} made it public although private was asked for; nothing was sent"
                    )
            if not remote.has_branch and options.revision != MAIN:
                self.api.create_branch(**where, branch=options.revision, exist_ok=True)
            operations = [
                CommitOperationDelete(path) if state == "removed" else CommitOperationAdd(path, upload.files[path])
                for path, state in news
            ]
            self.api.create_commit(
                **where,
                operations=operations,
                revision=options.revision,
                commit_message=f"Push {upload.target} (MaskLoom {__version__})",
            )

    def address(self, upload: Upload, options: PushOptions) -> str:
        """Return the repository's page."""
        prefix = "datasets/" if upload.target.repo_type == "dataset" else ""
        branch = "" if options.revision == MAIN else f"/tree/{options.revision}"
        return without_secrets(f"{self.api.endpoint}/{prefix}{upload.repo_id}{branch}")

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
            raise MaskLoomError(f"{what}: {self._scrubbed(self._reason(error))}") from None

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
        return without_secrets(text)
