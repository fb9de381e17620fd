"""Time and peak memory of precision, recall, density and coverage.

    python -m benchmarks.manifold [--images 10000] [--dimensions 1280] [--check]

`--check` compares the scores with those of SciPy's full distance matrices, which need
3 x 8 x N^2 bytes.
"""

import resource
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from maskloom.evaluate.scores.manifold import manifold_scores

NEIGHBOURS = 5


def main(
    images: Annotated[int, typer.Option(min=2, help="number of images on each side")] = 10_000,
    dimensions: Annotated[int, typer.Option(min=1, help="number of features of an image")] = 1280,
    check: Annotated[bool, typer.Option("--check", help="compare with full distance matrices")] = False,
) -> None:
    """Measure the scores of two sets of random features."""
    random = np.random.default_rng(0)
    scale = np.geomspace(1, 0.01, dimensions)  # with equal variances no ball would reach another point
    real, synthetic = (
        (shift + scale * random.standard_normal((images, dimensions))).astype(np.float32) for shift in (0.0, 0.005)
    )
    before, processor, start = _peak_mib(), time.process_time(), time.perf_counter()
    scores = manifold_scores(real, synthetic, NEIGHBOURS)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    table = Table(title=f"{images} x {images} images, {dimensions} features, k = {NEIGHBOURS}")
    for column in ("seconds", "CPU seconds", "peak MiB", "peak MiB before", *scores):
        table.add_column(column)
    figures = [f"{seconds:.1f}", f"{processor:.1f}", f"{_peak_mib():.0f}", f"{before:.0f}"]
    table.add_row(*figures, *(f"{value:.4f}" for value in scores.values()))
    Console(width=120).print(table)
    if check:
        print(f"equal to full matrices: {scores == full_matrix_scores(real, synthetic)}")


def full_matrix_scores(real: np.ndarray, synthetic: np.ndarray) -> dict[str, float]:
    """Return the scores from full matrices of distances."""
    from scipy.spatial.distance import cdist

    between = cdist(real, synthetic)
    real_radii, synthetic_radii = (
        np.partition(cdist(points, points), NEIGHBOURS, axis=1)[:, NEIGHBOURS] for points in (real, synthetic)
    )
    inside = between <= real_radii[:, None]
    return {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((between <= synthetic_radii).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / NEIGHBOURS),
        "coverage": float(inside.any(axis=1).mean()),
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    typer.run(main)
