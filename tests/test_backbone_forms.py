"""Whole runs, from raw files to the report, on backbones in other forms.

What leaves the machine of such a run names no place on it.
"""

import platform
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from maskloom.data_prep.prepare import prepare
from maskloom.evaluate.evaluate import evaluate
from maskloom.generate.generate import generate
from maskloom.models.stable_diffusion.original_layout import write_original
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.files.atomic import read_json
from maskloom.pipeline.hub.files import file_text
from maskloom.pipeline.hub.uploads import check_leaks, find_targets, pack
from maskloom.pipeline.report import write_report
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.train import train_stage
from tests.models.stable_diffusion.test_backbone_checks import half_precision
from tests.tiny_backbone import build_tiny_backbone

OWNER = "janeroe-of-ward-7"  # a folder of this name holds everything, so it must be in nothing that goes


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_raw(folder: Path) -> None:
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(16):
        rows, columns = np.indices((32, 32))
        inside = (rows - random.uniform(12, 20)) ** 2 + (columns - random.uniform(12, 20)) ** 2 < 40
        image = (random.normal(70, 20, (32, 32)) + 120 * inside).clip(0, 255)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"images/c{number}.png")
        Image.fromarray(255 * inside.astype(np.uint8)).save(folder / f"masks/c{number}.png")


def experiment(folder: Path, **train: object) -> ExperimentConfig:
    write_raw(folder / "raw")
    values = {
        "experiment": "forms",
        "run_dir": str(folder / "run"),
        "data": {
            "dataset": "folder",
            "raw_dir": str(folder / "raw"),
            "image_size": 32,
            "num_workers": 1,
            "duplicates": "none",
            "options": {"modality": "ultrasound", "images": "images/*.*", "masks": "masks/{stem}.*"},
        },
        "train": {
            "train_batch_size": 2,
            "max_train_steps": 2,
            "validation_steps": 2,
            "checkpointing_steps": 2,
            "validation_samples": 1,
            "validation_timestep_bins": 1,
            "num_validation_images": 1,
            "report_to": None,
            **train,
        },
        "generate": {"generators": {"controlnet": {}, "text_only": {}}, "num_images": 2, "num_inference_steps": 2},
        "evaluate": {"metrics": {"vae_ceiling": {"extractor_size": 64}}},
        "report": {"title": f"Report of {folder / 'run'}"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return load_experiment(folder / "config.yaml", [])


def variant_of_half_precision(folder: Path) -> dict[str, str]:
    backbone = build_tiny_backbone(folder / "backbone")
    half_precision(backbone)
    return {"pretrained_model_name_or_path": str(backbone), "variant": "fp16"}


def one_original_file(folder: Path) -> dict[str, str]:
    backbone = build_tiny_backbone(folder / "backbone")
    file = write_original(backbone, folder / "model.safetensors")
    for weights in backbone.rglob("*.safetensors"):
        weights.unlink()
    return {"pretrained_model_name_or_path": str(file), "single_file_config": str(backbone)}


@pytest.mark.parametrize("form", [variant_of_half_precision, one_original_file])
def test_a_whole_run(tmp_path: Path, form) -> None:
    folder = tmp_path / OWNER
    folder.mkdir()
    config = experiment(folder, **form(folder))
    run = Run(config.run_folder)
    prepare(config, force=False)
    train_stage(config, force=False)
    generate(config, force=False)
    evaluate(config, force=False)
    write_report(config, force=False)
    for name in ("controlnet", "text_only"):
        verify_fully(run.synthetic / name)
        assert read_contract(run.synthetic / name).splits["train"].rows == 2
    assert read_json(run.evaluation / "vae_ceiling.json", "")["n"] == {
        "real test": read_contract(run.dataset).splits["test"].rows
    }
    assert_nothing_names_this_machine(config, run)


def assert_nothing_names_this_machine(config: ExperimentConfig, run: Run) -> None:
    """Look through every text that a push would send, the report, and the results that go into
    cards.
    """
    texts = {"report.html": run.report.read_text(encoding="utf-8")}
    for target in find_targets(run, ["dataset", "generator", "synthetic:controlnet", "synthetic:text_only"]):
        upload = pack(run, target, "someone/forms")
        check_leaks(upload, config, run)
        for name, source in upload.files.items():
            texts[f"{target} {name}"] = file_text(source) if isinstance(source, Path) else source.decode()
    texts |= {path.name: path.read_text(encoding="utf-8") for path in run.evaluation.glob("*.json")}
    assert len(texts) > 10
    secrets = [
        re.escape(OWNER),
        f"{re.escape(str(Path.home()))}/",
        re.escape(str(Path.cwd())),
        rf"\b{re.escape(platform.node())}\b",
    ]
    plain = {name: re.sub(r"data:[\w/+.-]+;base64,[\w+/=]+", "", text) for name, text in texts.items()}
    found = {(name, secret) for name, text in plain.items() for secret in secrets if re.search(secret, text)}
    assert not found
    assert "…/raw" in texts["report.html"]
