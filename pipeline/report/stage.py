"""The stage `report`: write the page from the content of a run."""

from collections.abc import Sequence
from pathlib import Path

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.private_paths import without_known_places
from maskloom.pipeline.progress import say
from maskloom.pipeline.report.page import page_renderer
from maskloom.pipeline.report.sources import Sources, find_sources
from maskloom.pipeline.runs.differences import differences_list, differing_settings
from maskloom.pipeline.runs.kept_config import configuration_after, kept_configuration
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage, open_run

IMAGE_SIDES = (256, 160, 96)  # longest side of an embedded image in pixels; the first that fits `PAGE_BYTES` is used
PAGE_BYTES = 5_000_000
NOTHING = (
    "run_dir={folder}: nothing to report, no stage of this run has finished; run them first (maskloom run), or give the "
    "overrides that the run was made with, such as experiment=NAME or run_dir=FOLDER"
)


def write_report(config: ExperimentConfig, force: bool) -> None:
    """Write `report.html` from whatever exists in the run; the page names missing parts.

    The page describes the run as it was made: all settings but those of the section `report` are
    taken from its `config.yaml`, if there is one.

    Raises:
        MaskLoomError: the run holds nothing; a dataset, an evaluation or a record is damaged.
    """
    run = open_run(config)
    sources = find_sources(run)
    if sources.is_empty():
        raise MaskLoomError(NOTHING.format(folder=run.folder))
    notices = other_settings(run)
    config = configuration_after(run, "report") or config
    described = [config.model_dump(mode="json"), *notices] if notices else config.model_dump(mode="json")
    stage = Stage(run, "report", sources.digests(), described, [run.report])
    if stage.skips(force):
        return
    with stage.recorded() as results:
        for dataset in [*([sources.real] if sources.real else []), *sources.synthetic.values()]:
            verify_quickly(dataset.folder)
        page = without_known_places(smallest_enough(config, sources, notices), _places(config, run))
        OwnedFolder(run.folder).write_text(run.report.name, page)
        results["bytes"] = len(page.encode())
    say(f"report: {run.report} ({results['bytes'] / 1e6:.1f} MB)")


def _places(config: ExperimentConfig, run: Run) -> list[Path | None]:
    """Return the local folders whose paths may occur in texts on the page."""
    external = [one.raw_dir for one in config.data.external.values()]
    return [run.folder, config.data.raw_dir, *external, Path.cwd(), Path.home()]


def other_settings(run: Run) -> list[str]:
    """Return a sentence if the answers were computed with other settings of `evaluate` than those given now."""
    if kept_configuration(run) is None or read_record(run, "evaluate") is None:
        return []
    differing = {key: values for key, values in differing_settings(run).items() if key.startswith("evaluate.")}
    if not differing:
        return []
    return [
        f"The answers were computed with other settings than the configuration has now: {differences_list(differing)}; run maskloom evaluate."
    ]


def smallest_enough(config: ExperimentConfig, sources: Sources, notices: Sequence[str] = ()) -> str:
    """Return the page with images as large as `PAGE_BYTES` allows, or the smallest if none fits."""
    render = page_renderer(config, sources, notices)
    for side in IMAGE_SIDES:
        page = render(side)
        if len(page.encode()) <= PAGE_BYTES:
            break
    return page
