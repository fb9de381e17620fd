"""Small experiments on real files, for the tests of `prepare`."""

import json
from pathlib import Path
from typing import Any

from maskloom.pipeline.config.experiment import ExperimentConfig

BUSI = Path(__file__).parents[2] / ".." / "shared" / "data" / "busi"
BUSI_ABSENT = "BUSI is not in ../shared/data/busi"


def experiment(run_dir: Path, dataset: str = "busi", raw_dir: Path | None = None, **data: Any) -> ExperimentConfig:
    """Return an experiment of 64 x 64 images in small shards; `data` overrides its data section."""
    section = {"dataset": dataset, "raw_dir": raw_dir, "image_size": 64, "rows_per_shard": 4, **data}
    return ExperimentConfig.model_validate(
        {"experiment": "test", "run_dir": run_dir, "data": section, "train": {"pretrained_model_name_or_path": "none"}}
    )


def dataset_bytes(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a dataset, hidden ones too, by relative path.

    The commit that wrote it is left out.
    """
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contract = json.loads(content["contract.json"])
    del contract["producer"]["git_sha"]
    return content | {"contract.json": json.dumps(contract).encode()}
