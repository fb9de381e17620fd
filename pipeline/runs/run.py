"""Run folders, and the record that each stage writes last."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import COPIES, MANIFEST, OwnedFolder
from maskloom.pipeline.files.reading import inside

RECORD_FILE, CONFIG_FILE = "stage.json", "config.yaml"
PARTS = (CONFIG_FILE, "dataset", "generator", "baselines", "synthetic", "evaluation", "report.html")  # logs only grow
STAGES = ("prepare", "train", "baselines", "generate", "evaluate", "report")
SHOWN_LOGS = ("metrics.jsonl", "images/*.png")  # of a training, below its logs


@dataclass(frozen=True)
class Run:
    """Where an experiment keeps its parts.

    Attributes:
        folder: the run folder.
        config: the configuration that is kept in it as `config.yaml` when a stage computes; None keeps none.
    """

    folder: Path
    config: ExperimentConfig | None = None

    def check(self) -> None:
        """Check that nothing of the user's has the name of a part of the run.

        Raises:
            MaskLoomError: names what is in the way.
        """
        owned = OwnedFolder(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise MaskLoomError(f"run_dir={self.folder}: not a folder; choose another run_dir or experiment")
        if owned.is_marked():
            return
        taken = [name for name in PARTS if _is_strange(self.folder / name)]
        if taken:
            raise MaskLoomError(
                f"run_dir={self.folder}: holds {', '.join(taken)}, which MaskLoom did not write (there is no {MANIFEST}); "
                f"nothing was changed: move it away, or choose another run_dir or experiment; {COPIES}"
            )

    def mark(self) -> None:
        """Mark the run folder as the program's; see `check`."""
        self.check()
        OwnedFolder(self.folder).mark()

    def keep_config(self) -> None:
        """Keep the resolved configuration in the run folder."""
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
        """Checkpoints and weights of the other generator architectures, one folder per architecture."""
        return self.folder / "baselines"

    @property
    def synthetic(self) -> Path:
        """One synthetic dataset per generator."""
        return self.folder / "synthetic"

    @property
    def evaluation(self) -> Path:
        """One JSON file per question."""
        return self.folder / "evaluation"

    @property
    def report(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    def logs(self, stage: str) -> Path:
        """A stage's `stage.json`, metrics and tracker files."""
        return self.folder / "logs" / stage


def _is_strange(path: Path) -> bool:
    """Whether something is there that the program did not write: no folder of its own, nor one that holds such folders."""
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    folders = [path, *(child for child in path.iterdir() if child.is_dir())]
    return any(path.iterdir()) and not any(OwnedFolder(folder).is_marked() for folder in folders)


Files = dict[Annotated[str, inside("run folder")], str]
"""Digest of each file by its path below the run folder."""
