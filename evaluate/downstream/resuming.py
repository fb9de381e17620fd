"""Downstream models that an interrupted evaluation has trained are read back, not trained again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.arms import ArmOptions
from maskloom.evaluate.downstream.cases import TrainedModel
from maskloom.evaluate.downstream.columns import SubgroupOptions
from maskloom.evaluate.downstream.phases import Phase
from maskloom.evaluate.downstream.shares import ShareOptions
from maskloom.evaluate.model_cache import ModelCache, Stored
from maskloom.pipeline import __version__
from maskloom.pipeline.files.atomic import value_digest

if TYPE_CHECKING:
    from torch import nn

Train = Callable[[Sequence[Phase], int], TrainedModel]
LOSSES, SCORE, WEIGHT = "losses", "score.", "network."


def resumable(
    train: Train,
    cache: ModelCache | None,
    metric: str,
    options: ArmOptions,
    depends_on: Sequence[object],
    tests: Mapping[str, Sequence[NDArray[Any]]],
    build: Callable[[], nn.Module],
) -> Train:
    """Return `train`, except that models in the cache are read back.

    Args:
        train: trains one model, phase by phase, and scores it on every test set.
        cache: keeps the models until the metric is answered; None: nothing is kept.
        metric: file name of the metric.
        options: options of the metric. Those that only choose which models are trained do not
            decide how one is trained.
        depends_on: all else that decides a model and its scores, as JSON values.
        tests: images and targets of each test set.
        build: returns an untrained network, which gets the weights that were kept.
    """
    if cache is None:
        return train
    choices = {*ArmOptions.model_fields, *SubgroupOptions.model_fields, *ShareOptions.model_fields}
    how = options.model_dump(mode="json", exclude=choices)
    scored = [[name, *map(array_digest, arrays)] for name, arrays in tests.items()]

    def read_or_train(phases: Sequence[Phase], seed: int) -> TrainedModel:
        first, *_ = phases
        augmentation = options.augmentation.model_dump(mode="json") if first.augmented else None
        images = [array_digest(one) for one in first.data]
        further = [] if is_plain(phases) else [phase_identity(one, options) for one in phases]
        key = value_digest([__version__, metric, how, augmentation, seed, images, scored, *depends_on, *further])
        return from_arrays(cache.stored(metric, key, lambda: as_arrays(train(phases, seed))), build)

    return read_or_train


def is_plain(phases: Sequence[Phase]) -> bool:
    """Whether the options and the images of a training say all of it."""
    first, *more = phases
    return not (more or first.balanced or first.copy_paste or first.exposure)


def phase_identity(phase: Phase, options: ArmOptions) -> dict[str, Any]:
    """Return what decides a phase besides the options that all arms share, as JSON values."""
    return {
        "images": [array_digest(one) for one in phase.data],
        "steps": phase.steps,
        "augmentation": options.augmentation.model_dump(mode="json") if phase.augmented else None,
        "balanced": phase.balanced,
        "copy_paste": options.copy_paste.model_dump(mode="json") if phase.copy_paste else None,
        "exposure": None if phase.exposure is None else asdict(phase.exposure),
    }


def array_digest(array: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's type, shape and values."""
    digest = sha256(json.dumps([array.dtype.str, array.shape]).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def as_arrays(model: TrainedModel) -> Stored:
    """Return a model as arrays, with the test set and name of each score in a note."""
    named = [(test_set, score) for test_set, scores in model.scores.items() for score in scores]
    arrays: dict[str, NDArray[Any]] = {LOSSES: np.array(model.losses, dtype=np.float64)}
    for i, (test_set, score) in enumerate(named):
        arrays[f"{SCORE}{i}"] = np.array(model.scores[test_set][score], order="C")
    if model.network is not None:
        arrays |= {f"{WEIGHT}{name}": one.cpu().numpy() for name, one in model.network.state_dict().items()}
    return arrays, {"scores": json.dumps(named)}


def from_arrays(stored: Stored, build: Callable[[], nn.Module]) -> TrainedModel:
    """Return the model of `as_arrays`; `build` returns the network for its weights, if it has any."""
    import torch

    arrays, notes = stored
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    for i, (test_set, score) in enumerate(json.loads(notes["scores"])):
        scores.setdefault(test_set, {})[score] = arrays[f"{SCORE}{i}"]
    weights = {
        name.removeprefix(WEIGHT): torch.from_numpy(one) for name, one in arrays.items() if name.startswith(WEIGHT)
    }
    network = build() if weights else None
    if network is not None:
        network.load_state_dict(weights)
        network.eval()
    return TrainedModel(arrays[LOSSES].tolist(), scores, network)
