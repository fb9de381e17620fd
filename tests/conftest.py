"""Settings of every test: no network, few threads, caches of their own.

And which files `--fast` leaves out.
"""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="maskloom-tests-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).parent
# Whole trainings and stages, several processes, every plug-in on every flaw: they take most of the
# time of all tests.
SLOW = [
    "contracts",
    "data_prep/audit/test_audit.py",
    "data_prep/test_cut_prompts.py",
    "data_prep/test_inspection.py",
    "data_prep/test_left_out.py",
    "data_prep/test_prepare.py",
    "data_prep/test_prepare_ownership.py",
    "evaluate/test_evaluate_stage.py",
    "evaluate/test_external_test_sets.py",
    "evaluate/test_membership.py",
    "evaluate/test_planted_effects.py",
    "evaluate/test_vae_ceiling.py",
    "generate/test_after_training.py",
    "generate/test_baseline_masks.py",
    "generate/test_generate.py",
    "generate/test_trained_parts.py",
    "pipeline/dataset/test_near_duplicates.py",
    "pipeline/hub",
    "pipeline/runs/test_interruption.py",
    "pipeline/runs/test_leaks.py",
    "pipeline/runs/test_runner.py",
    "pipeline/runs/test_state_damage.py",
    "pipeline/test_cli.py",
    "pipeline/test_extras.py",
    "pipeline/test_report.py",
    "pipeline/test_sweep.py",
    "pipeline/test_sweep_sharing.py",
    "pipeline/training/test_loop_precision.py",
    "pipeline/training/test_ranks.py",
    "test_backbone_forms.py",
    "test_command.py",
    "test_gpu_benchmark.py",
    "test_package.py",
    "train_backbone",
    "train_baselines",
    "train_controlnet/test_decoder.py",
    "train_controlnet/test_export.py",
    "train_controlnet/test_insight.py",
    "train_controlnet/test_latent_cache.py",
    "train_controlnet/test_longer.py",
    "train_controlnet/test_lora_files.py",
    "train_controlnet/test_lr_finder.py",
    "train_controlnet/test_networks.py",
    "train_controlnet/test_parity.py",
    "train_controlnet/test_plan.py",
    "train_controlnet/test_prompts.py",
    "train_controlnet/test_resume.py",
    "train_controlnet/test_scale_out.py",
    "train_controlnet/test_sizes.py",
    "train_controlnet/test_train.py",
    "train_controlnet/test_train_ownership.py",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what takes minutes: see tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in SLOW if not (TESTS / name).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py: SLOW names {missing}, and there is no such file; correct the name")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the slow files where `--fast` asks for it."""
    if not config.getoption("--fast"):
        return None
    return True if collection_path.relative_to(TESTS).as_posix() in SLOW else None
