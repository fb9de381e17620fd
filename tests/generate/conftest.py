"""Tiny models, built once, and an experiment around them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.generate.workbench import Bench
from tests.tiny_backbone import build_tiny_backbone, build_tiny_controlnet

MakeBench = Callable[..., Bench]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_tiny_controlnet(build_tiny_backbone(folder / "backbone"), folder / "controlnet")
    return folder


@pytest.fixture
def make_bench(tmp_path: Path, models: Path) -> MakeBench:
    def make(**dataset: Any) -> Bench:
        return Bench(tmp_path, models, **dataset)

    return make


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    return make_bench()
