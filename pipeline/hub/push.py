"""Pushes a run's dataset, weights and synthetic datasets to the Hub, one repository each.

A push is one commit, made when all large files have arrived: a repository shows the old state or
the new one. After an interruption, the same command sends only what the Hub does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.hub.client import Hub, PushOptions, Remote, compare
from maskloom.pipeline.hub.uploads import Target, Upload, check_leaks, check_licence, find_targets, pack
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run


def push(config: ExperimentConfig, words: Sequence[str], options: PushOptions) -> None:
    """Push parts of a run, and print each repository's address.

    Everything is checked on this machine before the first byte is sent.

    Args:
        config: the experiment.
        words: `dataset`, `generator`, `generator:KIND`, `baseline:ARCHITECTURE`,
            `synthetic:NAME`; by default `generator`.
        options: repository, visibility, branch and dry run.

    Raises:
        MaskLoomError: nothing to push, a check fails, or the Hub cannot be reached or refuses.
    """
    run = Run(config.run_folder)
    targets = find_targets(run, words or ["generator"])
    hub = Hub(options.dry_run)
    uploads = [pack(run, target, repo_id) for target, repo_id in _addresses(targets, config, options, hub)]
    for upload in uploads:
        check_licence(upload, options.public, options.may_publish)
        check_leaks(upload, config, run)
    for upload in uploads:
        for note in upload.notes:
            say(f"{upload.target}: {note}")
        _push_one(hub, upload, options)


def _addresses(
    targets: Sequence[Target], config: ExperimentConfig, options: PushOptions, hub: Hub
) -> list[tuple[Target, str]]:
    """Return the repository of each target; a name without a namespace goes to the token's user.

    Raises:
        MaskLoomError: one name for several repositories, or a name that the Hub does not accept.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if options.repo_id and len(targets) > 1:
        raise MaskLoomError(
            f"--repo-id {options.repo_id}: one name for {len(targets)} repositories "
            f"({', '.join(map(str, targets))}); push them one by one"
        )
    found = []
    for target in targets:
        name = options.repo_id or target.repo_name(config.experiment)
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise MaskLoomError(f"--repo-id: {one_line(error)}; give NAMESPACE/NAME") from None
        found.append((target, name if "/" in name else f"{hub.namespace()}/{name}"))
    return found


def _push_one(hub: Hub, upload: Upload, options: PushOptions) -> None:
    """Bring one repository to the upload's state, or list what that takes."""
    remote = hub.read(upload, options)
    changes = list(compare(upload, remote))
    news = [(path, state) for path, _, state in changes if state != "unchanged"]
    if remote.private is False and not options.public:
        raise MaskLoomError(
            f"{upload.repo_id}: the repository is public; push with --public, make it private on its settings page, "
            "or choose another --repo-id"
        )
    if remote.private and options.public:
        say(f"{upload.repo_id}: is private and stays so: make it public on its settings page")
    if options.dry_run:
        _list(upload, remote, changes, "public" if options.public else "private")
        return
    if news:
        hub.commit(upload, remote, news, options)
        after = compare(upload, hub.read(upload, options))
        if missing := next((path for path, _, state in after if state != "unchanged"), None):
            raise MaskLoomError(
                f"{upload.repo_id}: {missing} did not arrive as it is here (does the repository's .gitignore name it?)"
            )
    say(f"{upload.target}: {len(news)} of {len(changes)} files changed" if news else f"{upload.target}: up to date")
    print(hub.address(upload, options))


def _list(upload: Upload, remote: Remote, changes: Sequence[tuple[str, int, str]], visibility: str) -> None:
    """Print what a push would do."""
    does = "would change" if any(state != "unchanged" for *_, state in changes) else "is up to date"
    if remote.private is None:
        does = f"not compared: {remote.unread}" if remote.unread else "would create"
    print(f"{upload.target} -> {upload.repo_id} ({upload.target.repo_type}, {visibility}): {does}")
    for path, size, change in changes:
        print(f"  {'would send' if remote.unread else change:<10} {_size(size):>9}  {path}")


def _size(count: int) -> str:
    """Return a number of bytes as `812 B`, `1.2 kB` or `8.8 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
