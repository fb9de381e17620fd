"""One device or many: the same weights, the files of engines and clusters, mixed precision through
the whole stage.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor

from maskloom.train_controlnet.train import train_stage
from tests.processes import run_on_ranks
from tests.train_controlnet.conftest import tiny_config, tiny_values, write_config

ROOT = Path(__file__).parents[2]
ACCELERATE, SLURM = ROOT / "configs" / "accelerate", ROOT / "configs" / "slurm"
LEARNING_RATE = 1e-3
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_folder(folder: Path, dataset: Path) -> Path:
    folder.mkdir()
    (folder / "dataset").symlink_to(dataset)
    return folder


def exported(run: Path) -> dict[str, Tensor]:
    """Return all exported weights by file and key."""
    files = sorted((run / "generator").glob("*/*.safetensors"))
    return {
        f"{file.parent.name}/{key}": value
        for file in files
        if not file.parent.name.startswith("checkpoint")
        for key, value in load_file(file).items()
    }


def assert_equal_up_to_rounding(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Float32 gradients are added in another order: on average a thousandth of a step of Adam (the
    learning rate) at most.

    Adam divides a gradient by its size, so where all of it is rounding a step goes anywhere; such
    weights are few.
    """
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[key] - expected[key]).abs().flatten() for key in expected])
    assert float(difference.mean()) < 1e-3 * LEARNING_RATE
    assert float(difference.max()) < LEARNING_RATE


SETTINGS: dict[str, dict[str, Any]] = {
    "controlnet": {},
    "lora": {"controlnet": "none", "lora": ["unet", "text_encoder"], "num_validation_images": 0},
    "decoder": {"sd_locked": False, "num_validation_images": 0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_learn_what_one_learns(tmp_path: Path, dataset: Path, backbone: Path, name: str) -> None:
    """Same global batch, with averages and accumulation."""
    shared = {
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "learning_rate": LEARNING_RATE,
        "use_ema": True,
        **SETTINGS[name],
    }
    one, two = (run_folder(tmp_path / number, dataset) for number in ("one", "two"))
    train_stage(tiny_config(one, backbone, train_batch_size=2, **shared), force=False)
    config = write_config(tmp_path / "two.yaml", tiny_values(two, backbone, train_batch_size=1, **shared))
    run_on_ranks("train_controlnet", ["--config", str(config)])
    assert_equal_up_to_rounding(exported(two), exported(one))
    checkpoint = two / "generator" / "checkpoint-4"
    assert {f"random_states_{rank}.pkl" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}
    assert json.loads((checkpoint / "loop.json").read_text())["identity"]["processes"] == 2


def test_sharded_weights_become_whole_files(tmp_path: Path, dataset: Path, backbone: Path) -> None:
    """FSDP on two CPU processes, which accelerate itself offers on GPUs only."""
    shared = {"max_train_steps": 4, "learning_rate": LEARNING_RATE, "use_ema": False, "checkpointing_steps": 2}
    one, two = (run_folder(tmp_path / number, dataset) for number in ("one", "two"))
    train_stage(tiny_config(one, backbone, train_batch_size=2, **shared), force=False)
    config = write_config(tmp_path / "two.yaml", tiny_values(two, backbone, train_batch_size=1, **shared))
    run_on_ranks("tests.train_controlnet.ranks", [str(config)])
    assert_equal_up_to_rounding(exported(two), exported(one))
    assert (two / "generator" / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()


def test_bf16_through_the_whole_stage(tmp_path: Path, dataset: Path, backbone: Path) -> None:
    run = run_folder(tmp_path / "run", dataset)
    train_stage(tiny_config(run, backbone, mixed_precision="bf16"), force=False)
    found = exported(run)
    assert found
    assert all(value.dtype == torch.float32 and bool(torch.isfinite(value).all()) for value in found.values())
    rows = [json.loads(line) for line in (run / "logs" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 10 for row in rows if "loss" in row)
    assert all("loss_scale" not in row for row in rows)


ENGINES = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_there_is_a_file_for_each_engine() -> None:
    assert {path.stem for path in ACCELERATE.glob("*.yaml")} == set(ENGINES)


@pytest.mark.parametrize(("name", "kind"), ENGINES.items())
def test_accelerate_reads_an_engines_file(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision is None  # the experiment says it
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    if name == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_accelerate_launches_with_a_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv[1], os.environ['ACCELERATE_MIXED_PRECISION'])")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / "single.yaml")]
    done = subprocess.run([*launch, str(script), "here"], capture_output=True, text=True, timeout=100, env=ONE_THREAD)
    assert done.stdout.split() == ["here", "no"], done.stderr


PROGRAMS = {
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then printf "node-a\\nnode-b\\n"; else echo "$@" > requeued; fi',
    "python": 'for word in "$@"; do echo "$word" >> words; done; sleep "${NAP:-0}"',
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a cluster job whose programs only note how they were called."""
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
        "SLURM_JOB_ID": "41234",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }


def launched(script: str, folder: Path, environment: dict[str, str]) -> Any:
    """Run a job script and return what accelerate's own parser makes of its launch."""
    command = ["bash", str(SLURM / script), "configs/busi.yaml", "train.rank=8", "experiment=a b"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=30)
    words = (folder / "words").read_text().splitlines()
    assert words[:2] == ["-m", "accelerate.commands.launch"]
    found = launch_command_parser().parse_args(words[2:])
    assert found.module
    assert found.training_script == "train_controlnet"
    assert found.training_script_args == ["--config", "configs/busi.yaml", "train.rank=8", "experiment=a b"]
    return found


@pytest.mark.parametrize(
    ("gpus", "changes", "engine"), [(4, {}, "ddp"), (1, {}, "single"), (2, {"ENGINE": "fsdp"}, "fsdp")]
)
def test_a_job_on_one_node(
    tmp_path: Path, cluster: dict[str, str], gpus: int, changes: dict[str, str], engine: str
) -> None:
    found = launched("train.sh", tmp_path, {**cluster, "SLURM_GPUS_ON_NODE": str(gpus), **changes})
    assert found.config_file == f"configs/accelerate/{engine}.yaml"
    assert (found.num_processes, found.main_process_port) == (gpus, 21234)


def test_a_job_on_several_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    found = launched("train_multinode.sh", tmp_path, cluster)
    assert found.config_file == "configs/accelerate/ddp.yaml"
    assert (found.num_machines, found.machine_rank, found.num_processes) == (2, 1, 8)
    assert (found.rdzv_backend, found.main_process_ip, found.main_process_port) == ("c10d", "node-a", 21234)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("script", ["train.sh", "train_multinode.sh", "prepare.sh"])
def test_a_job_that_must_stop_ends_its_processes_and_goes_back_to_the_queue(
    tmp_path: Path, cluster: dict[str, str], script: str, number: int
) -> None:
    """accelerate's launcher on one node takes no notice of SIGTERM here: it would end before the
    training has saved.
    """
    training = """python3 -c 'import signal as s; s.pthread_sigmask(s.SIG_BLOCK, [s.SIGTERM]); open("runs", "w"); s.sigwait([s.SIGTERM]); open("saved", "w")'"""
    body = f"trap : TERM\n{training} &\nwait\nwait" if script == "train.sh" else f"exec {training}"
    (tmp_path / "bin" / "python").write_text(f"#!/usr/bin/env bash\n{body}\n")
    job = subprocess.Popen(["bash", str(SLURM / script), "c.yaml"], cwd=tmp_path, env=cluster, stdout=subprocess.PIPE)
    while not (tmp_path / "runs").exists():
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "41234"]


def test_a_task_of_an_array_goes_back_to_the_queue_alone(tmp_path: Path, cluster: dict[str, str]) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "41230", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "NAP": "10"}
    job = subprocess.Popen(["bash", str(SLURM / "prepare.sh"), "c.yaml"], cwd=tmp_path, env={**cluster, **array})
    while not (tmp_path / "words").exists() or "3/8" not in (tmp_path / "words").read_text():
        time.sleep(0.02)
    time.sleep(0.5)  # until the script waits for its command
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "41230_3"]


@pytest.mark.parametrize("script", ["train.sh", "train_multinode.sh"])
def test_a_training_that_fails_fails_its_job(tmp_path: Path, cluster: dict[str, str], script: str) -> None:
    (tmp_path / "bin" / "python").write_text("#!/usr/bin/env bash\nexit 2\n")
    job = subprocess.run(["bash", str(SLURM / script), "c.yaml"], cwd=tmp_path, env=cluster, timeout=30)
    assert job.returncode == 2
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sh")), ids=lambda path: path.name)
def test_job_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    assert os.access(script, os.X_OK)
