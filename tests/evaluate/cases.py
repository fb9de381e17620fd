"""Tables of cases with scores that are set by hand."""

from collections.abc import Mapping, Sequence

import numpy as np

from maskloom.evaluate.downstream.cases import ArmCases, ScoredTestSet


def dice_cases(
    arms: Mapping[str, np.ndarray],
    groups: Sequence[str] | None = None,
    score: str = "Dice",
    seeds: Mapping[str, Sequence[int]] | None = None,
    test_set: str = "real test",
) -> ScoredTestSet:
    """Return the cases of arms whose models have the scores (S, N)."""
    count = next(iter(arms.values())).shape[1]
    return ScoredTestSet(
        "downstream_segmentation",
        test_set,
        tuple(f"case-{i:04}" for i in range(count)),
        tuple(groups or (f"group-{i:04}" for i in range(count))),
        {
            name: ArmCases(tuple((seeds or {}).get(name, range(len(values)))), {score: np.asarray(values, dtype=float)})
            for name, values in arms.items()
        },
    )


def class_cases(
    arms: Mapping[str, np.ndarray], labels: Sequence[int], names: Sequence[str], groups: Sequence[str] | None = None
) -> ScoredTestSet:
    """Return the cases of classifiers with probabilities in proportion to (S, N, K)."""
    found = {}
    for name, values in arms.items():
        values = values / values.sum(axis=-1, keepdims=True)
        truth = np.tile(np.asarray(labels) == np.arange(len(names))[:, None], (len(values), 1, 1)).astype(float)
        scores = {f"probability of {one}": values[..., k] for k, one in enumerate(names)}
        scores |= {f"is {one}": truth[:, k] for k, one in enumerate(names)}
        found[name] = ArmCases(tuple(range(len(values))), scores)
    count = len(labels)
    samples = tuple(f"case-{i:04}" for i in range(count))
    return ScoredTestSet("downstream_classification", "real test", samples, tuple(groups or samples), found)
