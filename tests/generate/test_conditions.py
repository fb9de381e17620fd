"""What a row's warp and words depend on."""

from dataclasses import replace

import numpy as np

from maskloom.generate.conditions import ConditionReader
from maskloom.generate.planning import plan_rows, read_parents
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from tests.generate.conftest import MakeBench
from tests.tiny_datasets import tiny_description

TEMPLATES = ("{modality} of a {label}", "a {label}")


def test_warps_differ_by_seed_row_and_try_and_words_by_row(make_bench: MakeBench):
    about = tiny_description().model_copy(update={"prompt_templates": TEMPLATES})
    bench = make_bench(description=about)
    config = bench.config(mask_source=["warped"])
    dataset = MaskPromptDataset.open(bench.run.dataset)
    parents = read_parents(dataset)

    def reader(seed: int) -> ConditionReader:
        changed = config.model_copy(update={"seed": seed})
        return ConditionReader(dataset, changed, parents)

    first = plan_rows(parents, dataset.description.labels, config.generate, config.seed)[0]
    rows = [replace(first, index=index) for index in range(8)]
    one = reader(7)
    found = [one.resolve(row).condition for row in rows]
    assert all((one.resolve(row).condition.mask == was.mask).all() for row, was in zip(rows, found, strict=True))
    assert len({condition.mask.tobytes() for condition in found}) == len(rows)
    assert len({condition.text for condition in found}) == len(TEMPLATES)
    masks = [one._mask_and_image(first, first.parent, tried)[0] for tried in (0, 1)]
    masks.append(reader(8)._mask_and_image(first, first.parent, 0)[0])
    assert all(not np.array_equal(masks[0], other) for other in masks[1:])
