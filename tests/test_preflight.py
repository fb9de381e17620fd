"""What `run` checks before its first stage: everything at once, nothing written, and only for
stages that are not done.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs import runner
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.runner import StageState, check_settings
from maskloom.preflight import CHECKS, check_launch, find_problems
from tests.pipeline import fake_run

ROOT = Path(__file__).parents[1]
BACKBONE = "assets/nano-sd"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def problems_of(tmp_path: Path, *stages: str, **sections: Any) -> list[str]:
    sections = {"train": {"pretrained_model_name_or_path": BACKBONE}, **sections}
    config = load_experiment(fake_run.write_config(tmp_path, **sections), [])
    return [message for _, message in find_problems(config, stages or tuple(CHECKS))]


@pytest.mark.parametrize("name", ["demo.yaml", "tiny/pix2pix.yaml", "tiny/class_gan.yaml"])
def test_nothing_stops_what_runs_anywhere(name: str) -> None:
    assert find_problems(load_experiment(ROOT / "configs" / name, []), tuple(CHECKS)) == []


@NO_GPU
def test_all_problems_are_reported_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    values = {
        "experiment": "x",
        "run_dir": str(tmp_path / "run"),
        "data": {"dataset": "busi", "raw_dir": str(tmp_path / "none"), "image_size": 64},
        "train": {
            "pretrained_model_name_or_path": BACKBONE,
            "variant": "fp16",
            "mixed_precision": "fp16",
            "controlnet": "none",
            "lora": ["unet"],
            "adherence": {},
        },
        "baselines": {"pix2pix": {"mixed_precision": "fp16", "image_size": 128}},
        "evaluate": {"metrics": {"quality": {"extractor": "inception", "extractor_size": 64}, "qualty": {}}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "pipeline", "run", "--config", str(tmp_path / "c.yaml")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    wanted = (
        "data.raw_dir=",
        "set train.variant=null",
        "train.mixed_precision=fp16 needs a GPU",
        "set train.adherence=null",
        "baselines.pix2pix.mixed_precision=fp16 needs a GPU",
        "generate.generators.controlnet=false generate.generators.lora={}",
        "extractor inception takes 299 only",
        "did you mean 'quality'?",
    )
    assert [any(word in line for line in lines) for word in wanted] == [True] * len(wanted), ended.stderr
    assert len(lines) == len(wanted)
    assert all(line.startswith("error: ") for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"baselines": {"pix2pix": {"steps": 3}}}, "unknown key 'steps'"),
        ({"baselines": {"pix2pix": {}}, "data": {"dataset": "phantom_bus", "buckets": [[64, 64]]}}, "set data.buckets=[]"),
        ({"baselines": {"pix2pix": {"image_size": 65}}}, "baselines.pix2pix.image_size=[65, 65]: "),
        ({"generate": {"generators": {"pix2pix": {}}}}, "add baselines.pix2pix={}"),
        ({"generate": {"generators": {}}}, "generate.generators is empty"),
        ({"generate": {"num_inference_steps": 5000}}, "generate.num_inference_steps=5000: "),
        ({"train": {"pretrained_model_name_or_path": BACKBONE, "lora_model_name_or_path": "/none", "lora": ["unet"]}}, "=/none: no such file"),
        ({"train": None}, "the configuration has no section `train`"),
        ({"evaluate": {"metrics": {"quality": {"extractor": "vgg"}}}}, "unknown extractor 'vgg'"),
    ],
)  # fmt: skip
def test_each_mistake_is_found(tmp_path: Path, sections: dict[str, Any], told: str) -> None:
    sections.setdefault("data", {"dataset": "phantom_bus", "image_size": 64})
    found = problems_of(tmp_path, **sections)
    assert found
    assert all(told in message for message in found)


@NO_GPU
def test_xformers_is_asked_for_without_a_gpu(tmp_path: Path) -> None:
    found = problems_of(tmp_path, generate={"enable_xformers_memory_efficient_attention": True})
    assert len(found) == 1
    assert found[0].startswith("generate.enable_xformers_memory_efficient_attention needs ")


def test_only_the_stages_that_will_run_are_checked(tmp_path: Path) -> None:
    broken = {"evaluate": {"metrics": {"qualty": {}}}}
    assert problems_of(tmp_path, "prepare", "train", "report", **broken) == []
    assert len(problems_of(tmp_path, "evaluate", **broken)) == 1


def test_stages_that_are_done_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = fake_run.write_config(tmp_path, evaluate={"metrics": {"qualty": {}}}, train=None)
    run = Run(tmp_path / "run")
    arguments = ["--config", str(config)]
    with pytest.raises(SystemExit):
        check_settings(run, ["evaluate"], arguments, None, False)
    fake_run.write_records(run, ["evaluate"])
    monkeypatch.setattr(runner, "stage_states", lambda *words: [StageState("evaluate", "done")])
    check_settings(run, ["evaluate"], arguments, None, False)
    with pytest.raises(SystemExit) as end:
        check_settings(run, ["evaluate"], arguments, None, True)
    assert end.value.code == 2


def test_overrides_that_were_not_given_again_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = fake_run.write_config(tmp_path, data={"dataset": "busi", "image_size": 64}, train=None)
    run = Run(tmp_path / "run", load_experiment(config, ["data.raw_dir=/data/raw"]))
    run.mark()
    run.keep_config()
    with pytest.raises(SystemExit):
        check_settings(
            Run(run.folder, load_experiment(config, [])), ["prepare"], ["--config", str(config)], None, False
        )
    note, error = capfd.readouterr().err.splitlines()
    assert "data.raw_dir (there /data/raw, now null). Give the same overrides to every command." in note
    assert error.startswith("error: data.raw_dir is not set")


def test_a_check_that_cannot_run_ends_with_its_own_code(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        check_settings(Run(tmp_path), ["evaluate"], ["--config", str(tmp_path / "none.yaml")], None, False)
    assert end.value.code == 2


def test_what_the_launcher_is_given_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in sorted((ROOT / "configs/accelerate").glob("*.yaml")):
        if file.stem != "deepspeed_zero2":
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
            check_launch(file)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MaskLoomError, match=r"2 processes and only 1 GPU\(s\) here; lower num_processes"):
        check_launch(Path("configs/accelerate/ddp.yaml"))
    monkeypatch.setattr("maskloom.preflight.find_spec", lambda name: None)
    with pytest.raises(MaskLoomError, match="needs deepspeed: pip install deepspeed, or another file"):
        check_launch(Path("configs/accelerate/deepspeed_zero2.yaml"))
    (tmp_path / "odd.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_procesess: 2\n")
    with pytest.raises(MaskLoomError, match=r"odd\.yaml: .*num_procesess"):
        check_launch(tmp_path / "odd.yaml")
    config = load_experiment(fake_run.write_config(tmp_path, train=None), [])
    odd = tmp_path / "odd.yaml"
    assert [stage for stage, _ in find_problems(config, ["prepare", "baselines", "report"], odd)] == ["baselines"]


def test_the_answer_is_json(tmp_path: Path) -> None:
    config = fake_run.write_config(tmp_path, train=None, evaluate={"metrics": {"qualty": {}}})
    command = [sys.executable, "-m", runner.PREFLIGHT, "--config", str(config), "--stage", "evaluate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ((stage, message),) = json.loads(done.stdout)
    assert stage == "evaluate"
    assert message.startswith("unknown metric 'qualty'")
