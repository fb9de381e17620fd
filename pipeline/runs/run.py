"""Run folders and their parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import COPIES, MANIFEST, OwnedFolder
from maskloom.pipeline.files.reading import inside
from maskloom.pipeline.runs.training_log import METRICS_FILE

RECORD_FILE, CONFIG_FILE = "stage.json", "config.yaml"
# Logs only grow.
PARTS = (CONFIG_FILE, "dataset", "generator", "baselines", "synthetic", "filter", "evaluation", "cache", "report.html")
STAGES = ("prepare", "train", "baselines", "generate", "filter", "evaluate", "report")
SHOWN_LOGS = (METRICS_FILE, "images/*.png")  # of a training, below its logs


@dataclass(frozen=True)
class Run:
    """The folder of an experiment and the paths in it.

    Attributes:
        folder: the run folder.
        config: the configuration that a stage writes to `config.yaml` when it computes, or None.
    """

    folder: Path
    config: ExperimentConfig | None = None

    def check(self) -> None:
        """Check that no file of the user has the name of a part of the run.

        Raises:
            MaskLoomError: such files exist; the error names them.
        """
        owned = OwnedFolder(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise MaskLoomError(f"run_dir={self.folder}: not a folder; choose another run_dir or experiment")
        if owned.is_marked():
            return
        taken = [name for name in PARTS if _is_foreign(self.folder / name)]
        if taken:
            raise MaskLoomError(
                f"run_dir={self.folder}: holds {', '.join(taken)}, which MaskLoom did not write (there is no {MANIFEST}); "
                f"nothing was changed: move it away, or choose another run_dir or experiment; {COPIES}"
            )

    def mark(self) -> None:
        """Mark the run folder as MaskLoom's; see `check` for the errors."""
        self.check()
        OwnedFolder(self.folder).mark()

    def keep_config(self) -> None:
        """Write the resolved configuration to the run folder."""
        import yaml

        if self.config is None:
            return
        resolved = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path = self.folder / CONFIG_FILE
        if not path.is_file() or path.read_bytes() != resolved.encode():
            OwnedFolder(self.folder).write_text(CONFIG_FILE, resolved)

    @property
    def dataset(self) -> Path:
        """The real mask-and-prompt dataset."""
        return self.folder / "dataset"

    @property
    def generator(self) -> Path:
        """Checkpoints, caches and the trained weights."""
        return self.folder / "generator"

    @property
    def baselines(self) -> Path:
        """Checkpoints and weights of the section `baselines`, one folder per architecture."""
        return self.folder / "baselines"

    @property
    def synthetic(self) -> Path:
        """One synthetic dataset per generator."""
        return self.folder / "synthetic"

    @property
    def filter(self) -> Path:
        """What the filter judged: per generator, a ledger of all images and a summary."""
        return self.folder / "filter"

    @property
    def filter_scores(self) -> Path:
        """Scores of the filter's criteria, kept from one run of it to the next; they can be deleted."""
        return self.folder / "cache" / "filter"

    def redrawn(self, number: int) -> Path:
        """Return the folder of the synthetic datasets that were drawn to replace rejected images.

        Args:
            number: of the round, from 1.
        """
        return self.folder / "cache" / f"redrawn-{number}"

    @property
    def evaluation(self) -> Path:
        """One JSON file per question."""
        return self.folder / "evaluation"

    @property
    def features(self) -> Path:
        """Features of images, kept from one evaluation to the next; they can be deleted."""
        return self.folder / "cache" / "features"

    @property
    def downstream_models(self) -> Path:
        """Downstream models of an interrupted evaluation."""
        return self.folder / "cache" / "downstream"

    @property
    def report(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    def logs(self, stage: str) -> Path:
        """Return the folder of a stage's `stage.json`, metrics and tracker files."""
        return self.folder / "logs" / stage


def _is_foreign(path: Path) -> bool:
    """Return whether something exists at a path that MaskLoom did not write.

    MaskLoom's are marked folders, and folders that contain marked folders.
    """
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    folders = [path, *(child for child in path.iterdir() if child.is_dir())]
    return any(path.iterdir()) and not any(OwnedFolder(folder).is_marked() for folder in folders)


Files = dict[Annotated[str, inside("run folder")], str]
"""Digest of each file by its path in the run folder."""
