"""Variants of a sweep as jobs: submitit's processes on this machine stand for those of SLURM."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import submitit
import yaml

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from maskloom.pipeline.runs import runner
from maskloom.pipeline.runs.interruption import handled_signals
from maskloom.pipeline.sweep import variant
from maskloom.pipeline.sweep.jobs import (
    PrepareJob,
    VariantsJob,
    answers_of,
    check_no_job_runs,
    open_cluster,
    read_jobs_file,
    training_groups,
)
from maskloom.pipeline.sweep.sweep import sweep
from tests.pipeline.test_sweep import PIX2PIX, run_here, variants_of, write_sweep

FORKS = multiprocessing.get_context("fork")
BROKEN = {"baselines": {"pix2pix": {"l1_weight": -1}}}
LONGER = {"baselines": {"pix2pix": {"max_train_steps": 3}}}
MORE = {"generate": {"num_images": 6}}


def submit_file(folder: Path, **values: object) -> Path:
    file = folder / "submit.yaml"
    file.write_text(yaml.safe_dump({"cluster": "local", "timeout_min": 10, **values}), encoding="utf-8")
    return file


def test_jobs_give_the_table_of_a_sweep_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job prepares, two run a variant each, one of which fails."""
    for name in ("jobs", "here"):
        (tmp_path / name).mkdir()
    paths = [write_sweep(tmp_path / name, {"trained": {}, "broken": BROKEN}) for name in ("jobs", "here")]
    with pytest.raises(MaskLoomError, match=r"^1 of 2 runs failed \(broken at baselines\)"):
        sweep(paths[0], [], False, None, submit_file(tmp_path))
    printed = capfd.readouterr().err
    assert [printed.count(f": {title}; log: ") for title in ("prepare trained", "trained", "broken")] == [1] * 3
    monkeypatch.setattr(variant, "run_stages", run_here)
    with pytest.raises(MaskLoomError, match=r"^1 of 2 runs failed \(broken at baselines\)"):
        sweep(paths[1], [], False, None)
    tables = [read_json(tmp_path / name / "run" / "table.json", "") for name in ("jobs", "here")]
    assert without_costs(tables[0]) == without_costs(tables[1])


def test_variants_of_one_job_share_their_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant, "run_stages", run_here)
    first, more = variants_of(write_sweep(tmp_path, {"first": {}, "more": MORE}))
    first.path.parent.mkdir(parents=True)
    for one in (first, more):
        one.path.write_text(yaml.safe_dump(one.config.model_dump(mode="json")), encoding="utf-8")
    assert PrepareJob(first)() == 0
    assert VariantsJob([first, more], {first.data_key: first}, None)() == {}
    weights = "pix2pix/weights/generator/diffusion_pytorch_model.safetensors"
    assert (first.run.baselines / weights).samefile(more.run.baselines / weights)
    assert more.run.report.is_file()


def without_costs(table: dict[str, Any]) -> dict[str, Any]:
    for row in table["rows"]:
        row["figures"].pop("cost", None)
    return table


def test_a_failed_preparation_fails_every_variant_of_its_data(tmp_path: Path) -> None:
    broken = {"data": {"dataset": "busi", "raw_dir": str(tmp_path / "nowhere"), "options": {}}}
    path = write_sweep(tmp_path, {"a": broken, "b": broken | LONGER})
    with pytest.raises(MaskLoomError, match=r"2 of 2 runs failed \(a at prepare, b at prepare\)"):
        sweep(path, [], False, None, submit_file(tmp_path))


def test_a_variant_does_not_prepare_what_its_job_has_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def note(stages: Sequence[str], _: Sequence[str], __: Path | None) -> int:
        commands.extend(stages)
        return 0

    monkeypatch.setattr(variant, "run_stages", note)
    [only] = variants_of(write_sweep(tmp_path, {"a": {}}))
    assert PrepareJob(only)() == 0
    assert VariantsJob([only], {only.data_key: only}, None)() == {}
    assert commands.count("prepare") == 1 and commands[-1] == "report"


def test_force_is_refused_with_jobs(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"a": {}})
    with pytest.raises(MaskLoomError, match="--force: not together with --submit"):
        sweep(path, [], True, None, submit_file(tmp_path))
    assert not (tmp_path / "run").exists()


def test_variants_that_share_a_training_run_in_one_job(tmp_path: Path) -> None:
    shared = {"a": {}, "b": LONGER, "c": MORE, "d": LONGER | MORE, "e": {"seed": 1}}
    groups = training_groups(variants_of(write_sweep(tmp_path, shared)))
    assert [[one.name for one in group] for group in groups] == [["a", "c"], ["b", "d"], ["e"]]
    gan = {"class_gan": {"max_train_steps": 1}}
    linked = {
        "a": LONGER,
        "b": {"baselines": {**gan, "pix2pix": PIX2PIX}},
        "c": {"baselines": LONGER["baselines"] | gan},
    }
    groups = training_groups(variants_of(write_sweep(tmp_path, linked)))
    assert [[one.name for one in group] for group in groups] == [["a", "b", "c"]]


def test_a_preempted_job_is_submitted_again_as_it_was(tmp_path: Path) -> None:
    [only] = variants_of(write_sweep(tmp_path, {"a": {}}))
    for job in (PrepareJob(only), VariantsJob([only], {}, None)):
        assert job.checkpoint().function == job


def ended() -> None:
    os._exit(3)


def test_a_job_that_ends_without_an_answer_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cluster = open_cluster(read_jobs_file(submit_file(tmp_path)), tmp_path / "jobs")
    assert answers_of(cluster, {"lost": ended, "fine": os.getpid})["lost"] is None
    assert "ended without an answer" in capfd.readouterr().err


STAGE = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(1)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
(folder / "started").touch()
time.sleep(300)
"""


@dataclass
class StageJob:
    """A job whose stage takes a second to save its checkpoint."""

    folder: Path

    def __call__(self) -> None:
        """Run it as `VariantsJob` does."""
        with handled_signals():
            runner._run([sys.executable, "-c", STAGE, str(self.folder)], False, None)


def stopped_sweep(folder: Path, file: Path) -> None:
    with handled_signals():
        answers_of(open_cluster(read_jobs_file(file), folder / "jobs"), {"stage": StageJob(folder)})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_waits_until_its_jobs_have_saved(tmp_path: Path, number: int) -> None:
    process = FORKS.Process(target=stopped_sweep, args=(tmp_path, submit_file(tmp_path)))
    process.start()
    wait_for(tmp_path / "started")
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode not in (0, None)
    assert (tmp_path / "saved").exists()


def wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} did not appear within a minute")


def killed_sweep(folder: Path, file: Path) -> None:
    answers_of(open_cluster(read_jobs_file(file), folder / "run" / "sweep" / "jobs"), {"stage": StageJob(folder)})


def test_jobs_of_a_killed_sweep_are_named_and_nothing_changes(tmp_path: Path) -> None:
    path, file = write_sweep(tmp_path, {"a": {}}), submit_file(tmp_path)
    process = FORKS.Process(target=killed_sweep, args=(tmp_path, file))
    process.start()
    wait_for(tmp_path / "started")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    with pytest.raises(
        MaskLoomError, match=r"processes (\d+) of an earlier call are still at work; .*`kill \1`"
    ) as error:
        sweep(path, [], False, None, file)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["sweep"]
    controller = psutil.Process(int(str(error.value).split("processes ")[1].split()[0]))
    processes = [controller, *controller.children(recursive=True)]
    for one in processes:
        one.kill()
    psutil.wait_procs(processes, timeout=60)
    check_no_job_runs({"cluster": "local"}, tmp_path / "run" / "sweep" / "jobs")


@pytest.mark.parametrize(
    ("state", "at_work"), [("RUNNING", True), ("PENDING", True), ("FAILED", False), ("UNKNOWN", False)]
)
def test_jobs_that_slurm_has_forgotten_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, at_work: bool
) -> None:
    monkeypatch.setattr(submitit.SlurmJob, "state", state)
    for name in ("7_submitted.pkl", "8_submitted.pkl", "8_0_result.pkl"):
        (tmp_path / name).touch()
    with pytest.raises(MaskLoomError, match=r"jobs 7 of .* `scancel 7`") if at_work else nullcontext():
        check_no_job_runs({"cluster": "slurm"}, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cluster: slurm\n", "submitit cannot use it .*its keys are `cluster`"),
        ("cluster: local\ngpus: 3\n", "submitit cannot use it .*gpus"),
        ("cluster: cloud\n", "cluster='cloud': Input should be 'slurm' or 'local'"),
        ("timeout_min: 0\n", "timeout_min=0: Input should be greater than or equal to 1"),
        ("[1]\n", "gives no KEY: VALUE lines"),
        ("", "gives no KEY: VALUE lines"),
        ("cluster: local\ntasks_per_node: 2\n", "tasks_per_node=2: Input should be 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_before_anything_starts(
    tmp_path: Path, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no srun
    path, file = write_sweep(tmp_path, {"a": {}}), tmp_path / "submit.yaml"
    file.write_text(content)
    with pytest.raises(MaskLoomError, match=message):
        sweep(path, [], False, None, file)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match=r"no such file; configs/slurm/sweep\.yaml is an example"):
        sweep(write_sweep(tmp_path, {"a": {}}), [], False, None, tmp_path / "nothing.yaml")


def test_the_shipped_file_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda _: 2))
    resources = read_jobs_file(Path("configs/slurm/sweep.yaml"))
    assert resources["cluster"] == "slurm" and resources["gpus_per_node"] == 1
