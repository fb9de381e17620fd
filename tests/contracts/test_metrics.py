"""Every metric found in the folder keeps the protocol; a new one is tested by being there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.questions import PACKAGE, open_question
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.plugins import load_plugin, plugin_names
from maskloom.pipeline.results import REAL, Evaluation, MetricResult
from tests.evaluate.runs import answer, faithful, leave_training, noise, small_options, tiny_inputs
from tests.tiny_backbone import build_tiny_backbone
from tests.tiny_datasets import tiny_description, write_tiny_run

METRICS = plugin_names(PACKAGE)
GENERATORS = {"controlnet": faithful, "text_only": noise}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbone: str) -> Path:
    folder: Path = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, GENERATORS)
    leave_training(folder, Path(backbone))
    return folder


def drop_label(sample: Any) -> None:
    sample.label = None


def drop_mask(sample: Any) -> None:
    sample.mask = None


def drop_some(sample: Any) -> None:
    if sample.sample_id.endswith(("0", "1")):
        sample.mask, sample.label = None, None


CASES: dict[str, dict[str, Any]] = {
    "no test split": {"counts": {"train": 12, "validation": 4}},
    "train only": {"counts": {"train": 12}},
    "one image": {"counts": {"train": 1, "validation": 1, "test": 1}},
    "no labels": {"change": drop_label, "description": tiny_description(labels=())},
    "no masks": {"change": drop_mask},
    "some without mask and label": {"change": drop_some},
}


@pytest.mark.parametrize("name", METRICS)
def test_module_keeps_the_protocol(name: str) -> None:
    module = load_plugin(PACKAGE, name, "metric")
    assert isinstance(module.VERSION, int)
    assert issubclass(module.Options, Section)
    assert module.__doc__
    assert module.Options()


def test_metrics_import_without_torch() -> None:
    """An evaluation that is up to date must be skipped fast."""
    imports = "; ".join(f"import {PACKAGE}.{name}" for name in METRICS)
    code = f"import sys, maskloom.evaluate.evaluate; {imports}; print({{'torch', 'monai', 'scipy', 'sklearn', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", METRICS)
def test_answer_can_be_shown_and_repeats(name: str, run: Path, backbone: str) -> None:
    results = [answer(inputs_of(run, backbone), name) for _ in range(2)]
    assert results[0].skipped is None
    check_answer(results[0])
    left, right = (json.dumps(result.as_json(), sort_keys=True) for result in results)
    assert left == right
    pictures = [[png_bytes(picture.pixels) for picture in result.pictures] for result in results]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", METRICS)
def test_its_figures_stand_side_by_side(name: str, run: Path, backbone: str) -> None:
    """The table of generators takes its columns from here: the same ones for every generator."""
    options = (
        {"every_generator": True}
        if "every_generator" in load_plugin(PACKAGE, name, "metric").Options.model_fields
        else {}
    )
    figures = answer(inputs_of(run, backbone), name, **options).figures
    columns = {of: [one.name for one in figures if one.of == of] for of in {one.of for one in figures}}
    for of, names in columns.items():
        assert of in {*GENERATORS, REAL}
        assert len(set(names)) == len(names)
    assert [columns.get(generator) for generator in GENERATORS] == [columns.get("controlnet")] * len(GENERATORS)
    assert {one.name: one.better for one in figures} == dict({(one.name, one.better) for one in figures})
    assert all(one.value is not None for one in figures)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METRICS)
def test_poor_data_gives_an_answer_or_a_reason(name: str, case: str, tmp_path: Path, backbone: str) -> None:
    write_tiny_run(tmp_path, GENERATORS, **CASES[case])
    leave_training(tmp_path, Path(backbone))
    check_answer(
        answer(
            inputs_of(tmp_path, backbone), name, **{key: 1 for key in ("seeds", "steps") if key in small_options(name)}
        )
    )


def test_no_synthetic_set_at_all(run: Path, backbone: str) -> None:
    inputs = tiny_inputs(run, (), pretrained_model_name_or_path=backbone)
    for name in METRICS:
        check_answer(answer(inputs, name))


@pytest.mark.parametrize("name", METRICS)
def test_unknown_option_is_named(name: str) -> None:
    with pytest.raises(Exception, match=f"evaluate.metrics.{name}: unknown key 'no_such_option'"):
        open_question(name, {"no_such_option": 1})


def inputs_of(run: Path, backbone: str) -> EvaluationInputs:
    return tiny_inputs(run, tuple(GENERATORS), pretrained_model_name_or_path=backbone)


def check_answer(result: MetricResult) -> None:
    """The report must be able to show it, and a reader to judge it."""
    values = result.as_json()
    json.dumps(values, allow_nan=False)
    for number, picture in enumerate(values["pictures"]):
        picture["path"] = f"{number}.png"
    Evaluation.model_validate_json(json.dumps({"metric": "m", "version": 1, **values}))
    assert result.question.endswith("?")
    assert result.verdict.endswith(".")
    assert "nan" not in result.verdict
    assert "None" not in result.verdict
    for table in result.tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
    for picture in result.pictures:
        assert picture.pixels.dtype == np.uint8
        assert picture.pixels.ndim == 3
    if result.skipped is None:
        assert result.tables or result.warnings
        assert result.n
        assert result.limits
