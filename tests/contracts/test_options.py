"""Every number that can be configured, in any section and any plug-in: NaN, infinity and absurd
sizes are refused.
"""

import importlib
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.sweep.sweep import SweepConfig
from maskloom.train_backbone.config import BackboneConfig

PLACES = {
    "maskloom.data_prep.datasets": "Adapter",
    "maskloom.pipeline.dataset.exporters": "Exporter",
    "maskloom.train_baselines.architectures": None,
    "maskloom.generate.generators": None,
    "maskloom.evaluate.metrics": None,
}
MAY_BE_INFINITE = {"max_grad_norm"}  # of the architectures: `.inf`, the default, does not clip


def _options() -> Iterator[type[BaseModel]]:
    for package, place in PLACES.items():
        for name in plugin_names(package):
            module = importlib.import_module(f"{package}.{name}")
            yield getattr(module, place).Options if place else module.Options


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _models(model: type[BaseModel]) -> set[type[BaseModel]]:
    kinds = [kind for field in model.model_fields.values() for kind in _parts(field.annotation)]
    nested = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)}
    return {model}.union(*(_models(kind) for kind in nested))


MODELS = sorted(
    {one for model in (ExperimentConfig, SweepConfig, BackboneConfig, *_options()) for one in _models(model)},
    key=lambda model: (model.__module__, model.__name__),
)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.__module__}.{model.__name__}")
def test_every_section_and_plug_in_checks_its_numbers(model):
    assert issubclass(model, Section)
    assert model.model_config["allow_inf_nan"] is False
    opened = {name for name, one in model.model_fields.items() if "allow_inf_nan=True" in repr(one.metadata)}
    assert opened <= MAY_BE_INFINITE


class _Numbers(Section):
    count: int = 1
    share: float = 0.5
    pair: tuple[float, int] = (0.0, 1)
    named: dict[str, int] = Field(default_factory=dict)
    flag: bool | int = False


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"share": float("nan")}, "share=nan: Input should be a finite number"),
        ({"share": float("inf")}, "share=inf: Input should be a finite number"),
        ({"pair": (float("-inf"), 1)}, "pair.0=-inf: Input should be a finite number"),
        ({"share": -1e19}, r"share: -1e\+19 is larger than the largest supported number"),
        ({"count": 2**31}, r"count: 2\.15e\+09 is larger than"),
        ({"count": -(10**30)}, r"count: -1e\+30 is larger than"),
        ({"pair": (0.0, 10**12)}, r"pair: 1e\+12 is larger than"),
        ({"named": {"a": 1, "b": 10**12}}, r"named: 1e\+12 is larger than"),
        ({"count": True}, "count=True: give a number, not true or false"),
        ({"share": False}, "share=False: give a number, not true or false"),
    ],
)
def test_what_a_section_refuses(values, problem):
    with pytest.raises(MaskLoomError, match=problem):
        validated(values, _Numbers, "here")


def test_what_a_section_takes():
    values = {"count": 2**31 - 1, "share": 1e18, "pair": (-1.0, 0), "named": {"a": 3}, "flag": True}
    assert validated(values, _Numbers, "here").model_dump() == values
