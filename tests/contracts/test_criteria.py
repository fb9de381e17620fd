"""Every criterion of the filter found in the folder keeps the protocol; a new one is tested by being there."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.filtering.criterion import Criterion
from maskloom.evaluate.filtering.filter import without_test
from maskloom.evaluate.filtering.judge import PACKAGE, open_criterion
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet, open_inputs
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.plugins import load_plugin, plugin_names
from tests.evaluate.runs import SMALL, faithful
from tests.tiny_datasets import write_tiny_run

CRITERIA = plugin_names(PACKAGE)


def drop_all(sample: Any) -> None:
    sample.mask, sample.label = None, None


def drop_some(sample: Any) -> None:
    if sample.sample_id.endswith(("0", "1")):
        sample.mask, sample.label = None, None


def opened(run: Path, **changes: Any) -> EvaluationInputs:
    counts = {"train": 12, "validation": 6, "test": 2}
    write_tiny_run(run, {"controlnet": faithful}, counts, **changes)
    sets = {"controlnet": MaskPromptDataset.open(run / "synthetic" / "controlnet")}
    return without_test(open_inputs(MaskPromptDataset.open(run / "dataset"), sets, None, 0))


def scores(name: str, inputs: EvaluationInputs, image_set: ImageSet) -> Any:
    known = load_plugin(PACKAGE, name, "criterion").Options.model_fields
    plugin = open_criterion(name, {key: value for key, value in SMALL.items() if key in known})
    found = plugin.module.Criterion(inputs, plugin.options).scores(image_set)
    assert found.shape == (len(image_set),)
    return found


@pytest.mark.parametrize("name", CRITERIA)
def test_module_keeps_the_protocol(name: str) -> None:
    module = load_plugin(PACKAGE, name, "criterion")
    assert isinstance(module.VERSION, int)
    assert issubclass(module.Options, Section)
    assert issubclass(module.Criterion, Criterion)
    assert module.__doc__
    assert module.Options()


def test_criteria_import_without_torch() -> None:
    """A filter that is up to date must be skipped fast."""
    imports = "; ".join(f"import {PACKAGE}.{name}" for name in CRITERIA)
    code = f"import sys, maskloom.evaluate.filtering.filter; {imports}; print({{'torch', 'monai', 'scipy', 'sklearn', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_finite_and_repeat(name: str, tmp_path: Path) -> None:
    inputs = opened(tmp_path)
    first = scores(name, inputs, inputs.synthetic["controlnet"])
    assert np.isfinite(first).all()
    assert np.isfinite(scores(name, inputs, inputs.validation)).all()
    assert np.array_equal(first, scores(name, inputs, inputs.synthetic["controlnet"]))


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("case", ["some", "all"])
def test_images_that_lack_something_have_no_score_at_most(name: str, case: str, tmp_path: Path) -> None:
    changes = {"some": {"change": drop_some}, "all": {"change": drop_all}}
    inputs = opened(tmp_path, **changes[case])
    for image_set in (inputs.validation, inputs.synthetic["controlnet"]):
        found = scores(name, inputs, image_set)
        assert not np.isinf(found).any()
