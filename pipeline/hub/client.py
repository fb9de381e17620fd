"""The Hub as a push sees it: what a repository holds, and one commit that brings it up to date."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from maskloom.pipeline import __version__
from maskloom.pipeline.errors import MaskLoomError, one_line, without_secrets
from maskloom.pipeline.files.atomic import file_digest
from maskloom.pipeline.hub.uploads import REPLACED, Upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

Answer = TypeVar("Answer")
MAIN = "main"
SECONDS = 10.0  # for the first answer
SHOWN_LETTERS = 300  # of a server's message
REMEDIES = {
    400: "it does not take a file as it is: README.md's metadata must follow the Hub's specification of cards",
    401: "it does not take the token: run `hf auth login` again, or set HF_TOKEN to a valid one",
    403: "the token may not write there: use one with write access to this namespace",
    404: "there is no such repository or branch, or the token may not see it",
    409: "the repository was changed at the same time: run the same command again",
    429: "too many requests: wait some minutes, then run the same command again",
}
LATER = "run the same command again later: files that have arrived stay there"


@dataclass(frozen=True)
class PushOptions:
    """The command line's switches.

    Attributes:
        repo_id: NAME or NAMESPACE/NAME; None names the repository after the experiment.
        public: make a new repository public instead of private.
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
        private: whether it is private; None where there is no such repository.
        files: of the branch, by path; None where there is no such branch.
        unread: why nothing of this is known; empty where it is.
    """

    private: bool | None = None
    files: Mapping[str, RepoFile] | None = None
    unread: str = ""


def compare(upload: Upload, remote: Remote) -> Iterator[tuple[str, int, str]]:
    """Yield path, size and state (new, changed, unchanged, removed) of each file of a push."""
    there = remote.files or {}
    for path, source in sorted(upload.files.items()):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        same = path in there and _is_same(source, size, there[path])
        yield path, size, "new" if path not in there else "unchanged" if same else "changed"
    for path in sorted(there.keys() - upload.files.keys()):
        if REPLACED[upload.target.repo_type].fullmatch(path):
            yield path, there[path].size, "removed"


def _is_same(source: Path | bytes, size: int, there: RepoFile) -> bool:
    """Whether the Hub has these bytes: by SHA-256 for large files, by git's hash for others."""
    from huggingface_hub.utils.sha import git_hash

    if there.size != size:
        return False
    if there.lfs is not None and isinstance(source, Path):
        return bool(there.lfs.sha256 == file_digest(source))
    return bool(there.blob_id == git_hash(source if isinstance(source, bytes) else source.read_bytes()))


class Hub:
    """The Hub with the user's token. Every failure is one line that contains no token."""

    def __init__(self, dry_run: bool) -> None:
        """Read the token from `HF_TOKEN` or `hf auth login`; the address is that of `HF_ENDPOINT`.

        Args:
            dry_run: a missing token, or a Hub that does not answer, is no error.

        Raises:
            MaskLoomError: there is no token, or it is malformed.
        """
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils.logging import set_verbosity_error

        set_verbosity_error()  # its warnings name upload addresses, which are credentials for a while
        if not sys.stderr.isatty():
            disable_progress_bars()
        # With Xet, `upload_folder` splits large uploads into several commits; by LFS it makes one.
        constants.HF_HUB_DISABLE_XET = True
        self.token: str | None = None
        with self.one_line_errors("the token"):
            self.token = get_token()
        if self.token is None and not dry_run:
            raise MaskLoomError("no Hugging Face token; run `hf auth login`, or set HF_TOKEN, then push again")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise MaskLoomError("the Hugging Face token holds characters that no token has; run `hf auth login` again")
        self.api: HfApi = HfApi(token=self.token or False, library_name="maskloom", library_version=__version__)
        self.dry_run = dry_run

    def namespace(self) -> str:
        """Return the token's user; in a dry run `NAMESPACE` where the user is unknown."""
        return self._asked("your account", lambda: str(self.api.whoami(cache=True)["name"]), lambda _: "NAMESPACE")

    def read(self, upload: Upload, options: PushOptions) -> Remote:
        """Return what the Hub has; in a dry run a Hub that does not answer is no error.

        Raises:
            MaskLoomError: it does not answer, or a repository of the other type has this name.
        """
        return self._asked(
            upload.repo_id, lambda: self._existing(upload, options.revision), lambda reason: Remote(unread=reason)
        )

    def _asked(self, what: str, question: Callable[[], Answer], unanswered: Callable[[str], Answer]) -> Answer:
        """Return the Hub's answer; in a dry run without one, `unanswered` of the reason."""
        if self.token is None:
            return unanswered("no token (`hf auth login`)")
        try:
            with self.one_line_errors(what):
                return question()
        except MaskLoomError as error:
            if self.dry_run:
                return unanswered(str(error))
            raise

    def _existing(self, upload: Upload, revision: str) -> Remote:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        repo_id, repo_type = upload.repo_id, upload.target.repo_type
        try:
            info = self.api.repo_info(repo_id, repo_type=repo_type, timeout=SECONDS)
        except RepositoryNotFoundError:
            other = "dataset" if repo_type == "model" else "model"
            if not self.api.repo_exists(repo_id, repo_type=other):
                return Remote()
            raise MaskLoomError(
                f"{repo_id}: exists as a {other}, and this is a {repo_type}; choose another --repo-id"
            ) from None
        try:
            tree = list(self.api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type))
        except RevisionNotFoundError:
            return Remote(bool(info.private))
        return Remote(bool(info.private), {entry.path: entry for entry in tree if isinstance(entry, RepoFile)})

    def commit(self, upload: Upload, remote: Remote, news: Sequence[tuple[str, str]], options: PushOptions) -> None:
        """Create the repository and the branch where they are missing, and commit what is new.

        Raises:
            MaskLoomError: the Hub refuses, or the connection breaks; uploaded files stay there.
        """
        where: dict[str, Any] = {"repo_id": upload.repo_id, "repo_type": upload.target.repo_type}
        with self.one_line_errors(upload.repo_id), warnings.catch_warnings(), TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")  # the client prints what the server says about the card
            if remote.private is None:
                self.api.create_repo(**where, private=not options.public)
                if not options.public and not self.api.repo_info(**where).private:
                    raise MaskLoomError(
                        f"{upload.repo_id}: {self.api.endpoint} made it public although private was asked for; "
                        "nothing was sent"
                    )
            if remote.files is None and options.revision != MAIN:
                self.api.create_branch(**where, branch=options.revision, exist_ok=True)
            upload.stage(Path(folder))
            self.api.upload_folder(
                **where,
                folder_path=folder,
                revision=options.revision,
                commit_message=f"Push {upload.target} (MaskLoom {__version__})",
                allow_patterns=[path for path, state in news if state != "removed"],
                delete_patterns=[path for path, state in news if state == "removed"],
            )

    def address(self, upload: Upload, options: PushOptions) -> str:
        """Return the address of the repository's page."""
        prefix = "datasets/" if upload.target.repo_type == "dataset" else ""
        branch = "" if options.revision == MAIN else f"/tree/{options.revision}"
        return without_secrets(f"{self.api.endpoint}/{prefix}{upload.repo_id}{branch}")

    @contextmanager
    def one_line_errors(self, what: str) -> Iterator[None]:
        """Turn a failure of the block, which only talks to the Hub, into a line without secrets."""
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
            return (
                f"no answer from {ENDPOINT}, or not to the end ({text}); check the network, "
                "then run the same command again: files that have arrived stay there"
            )
        said = self._scrubbed(one_line(error.server_message or ""))[:SHOWN_LETTERS]
        status = error.response.status_code
        return f"{ENDPOINT} answers {status}{f' ({said})' if said else ''}; {REMEDIES.get(status, LATER)}"

    def _scrubbed(self, text: str) -> str:
        """Return text without tokens and without the signatures of upload addresses."""
        return without_secrets(text.replace(self.token, "<token>") if self.token else text)
