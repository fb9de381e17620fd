"""The speed of the evaluation's feature extractor."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.gpu.experiment import forget_memory, peak_mib, synchronise
from benchmarks.gpu.setup import Setup
from maskloom.evaluate.scores.features import batch_features, extractor_plugin


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Return images per second of an extractor, resizing and copies to and from the device included."""
    plugin, scale = extractor_plugin(item), setup.scale
    forget_memory(setup.device)
    extractor = plugin.load(plugin.INPUT_SIZE, setup.device)
    shape = (scale.extractor_batch, scale.image_size, scale.image_size, 3)
    pixels = list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    batch_features(extractor, [pixels], setup.device)  # chooses kernels
    synchronise(setup.device)
    start = time.perf_counter()
    features = batch_features(extractor, [pixels] * scale.rounds, setup.device)
    seconds = time.perf_counter() - start
    return {
        "images_per_second": len(features) / seconds,
        "features": features.shape[1],
        "mean_feature": float(features.mean()),
        "peak_mib": peak_mib(setup.device),
    }
