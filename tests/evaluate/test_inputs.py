import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset
from PIL import Image

from maskloom.evaluate.downstream.masked import masked_images
from maskloom.evaluate.inputs import EvaluationInputs, grey, grey_batches, grey_images, in_batches, resized_array
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import DatasetWriter, plan_shards
from maskloom.pipeline.results import Interval, MetricResult, skipped_result
from tests.evaluate.runs import copied, tiny_inputs
from tests.tiny_datasets import Sample, tiny_description, tiny_samples, write_tiny_run


@pytest.fixture(scope="module")
def samples_and_inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Sample]], EvaluationInputs]:
    run: Path = tmp_path_factory.mktemp("inputs")

    def drop(sample: Sample) -> None:
        if sample.sample_id == "train-0001":
            sample.mask, sample.label = None, None

    samples = write_tiny_run(run, {"copied": copied}, {"train": 70, "test": 3}, change=drop)
    return samples, tiny_inputs(run, ("copied",))


def test_pixels_come_as_they_were_written(samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs]) -> None:
    samples, inputs = samples_and_inputs
    images = inputs.train.images()
    assert images.shape == (70, 32, 32, 1)
    assert all((image[..., 0] == sample.image).all() for image, sample in zip(images, samples["train"], strict=True))
    masks, present = inputs.train.masks()
    assert present.sum() == 69
    assert not present[1]
    assert (masks[5] == samples["train"][5].mask).all()
    assert not masks[1].any()


def test_some_masks_are_those_of_their_rows(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs],
) -> None:
    train = samples_and_inputs[1].train
    masks, present = train.masks(rows=[5, 1])
    assert (masks[0] == train.masks()[0][5]).all()
    assert present.tolist() == [True, False]


def test_grey_is_the_mean_of_the_channels(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs],
) -> None:
    train = samples_and_inputs[1].train
    assert (grey_images(train, 16) == train.images((16, 16))[..., 0]).all()
    some = [69, 3, *range(70), 5]
    assert (np.concatenate(list(grey_batches(train, 16, some))) == grey_images(train, 16)[some]).all()
    assert grey(np.array([[[1, 2, 5], [0, 0, 1]]], dtype=np.uint8)).tolist() == [[3, 0]]


def test_resizing_keeps_classes(samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs]) -> None:
    _, inputs = samples_and_inputs
    assert inputs.train.images((16, 24)).shape == (70, 16, 24, 1)
    assert set(np.unique(inputs.train.masks((16, 24))[0])) == {0, 1}


def test_no_class_vanishes_where_masks_are_resized(tmp_path: Path) -> None:
    def dot(sample: Sample) -> None:
        sample.mask = np.zeros_like(sample.mask)
        sample.mask[9, 9] = 1

    write_tiny_run(tmp_path, {}, {"train": 3}, change=dot)
    masks, _ = tiny_inputs(tmp_path, ()).train.masks((8, 8))
    assert [np.argwhere(mask).tolist() for mask in masks] == [[[2, 2]]] * 3


def test_batches_are_bounded(samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs]) -> None:
    _, inputs = samples_and_inputs
    assert [len(batch) for batch in inputs.train.batches("image")] == [64, 6]
    assert [len(batch) for batch in in_batches(inputs.train.images())] == [64, 6]


def test_a_file_is_opened_anew_so_that_its_pages_leave_memory(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, opened, split = samples_and_inputs[1].train, [], MaskPromptDataset.split
    expected = train.images()

    def counted(dataset: MaskPromptDataset, name: str) -> Dataset:
        opened.append(name)
        return split(dataset, name)

    monkeypatch.setattr(MaskPromptDataset, "split", counted)
    monkeypatch.setattr("maskloom.evaluate.inputs.BATCH", 8)
    monkeypatch.setattr("maskloom.evaluate.inputs.BATCHES_PER_OPENING", 3)
    assert (train.images() == expected).all()
    assert opened == ["train"] * 3


def test_missing_split_is_empty(samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs]) -> None:
    _, inputs = samples_and_inputs
    assert len(inputs.validation) == 0
    assert inputs.validation.images().shape == (0, 32, 32, 1)
    assert inputs.validation.masks()[0].shape == (0, 32, 32)
    assert inputs.validation.groups == []
    assert inputs.counts() == {"real train": 70, "real validation": 0, "real test": 3, "copied": 70}


def test_synthetic_images_take_their_parents_groups(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs],
) -> None:
    samples, inputs = samples_and_inputs
    assert inputs.synthetic["copied"].groups == [sample.group_id for sample in samples["train"]]
    assert inputs.synthetic["copied"].parents == [sample.sample_id for sample in samples["train"]]
    assert inputs.train.labels[:3].tolist() == [0, -1, 0]


def test_masks_are_never_interpolated() -> None:
    mask = np.zeros((30, 30), np.uint8)
    mask[10:23, 7:19] = 2  # between 0 and 2 lies another class
    picture = Image.fromarray(mask)
    assert set(np.unique(resized_array(picture, (17, 13), "mask"))) == {0, 2}
    assert len(np.unique(resized_array(picture, (17, 13), "image"))) > 2


def test_columns_are_in_the_order_of_the_images(tmp_path: Path) -> None:
    samples = tiny_samples("train", 5)
    writer = DatasetWriter(tmp_path / "dataset", tiny_description(), plan_shards({"train": 5}, 2), "key")
    writer.prepare_folder()
    for shard in writer.shards:
        writer.write_shard(shard, samples[shard.start : shard.stop])
    writer.finish("# tiny\n", [], "none", None)
    train = tiny_inputs(tmp_path, ()).train
    assert train.columns["sample_id"] == [sample.sample_id for sample in samples]
    assert all((image[..., 0] == sample.image).all() for image, sample in zip(train.images(), samples, strict=True))


def test_a_synthetic_image_is_of_its_parents_group_whatever_its_own_row_says(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs],
) -> None:
    _, inputs = samples_and_inputs
    assert inputs.synthetic["copied"].group_of["test-0001"] == "test-group-0000"
    moved = replace(inputs.synthetic["copied"], group_of={"train-0000": "elsewhere"})
    assert moved.groups[:2] == ["elsewhere", "train-group-0000"]
    assert replace(inputs.train, group_of={"train-0000": "elsewhere"}).groups[0] == "train-group-0000"


def test_groups_and_parents_are_those_of_the_images_with_masks(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs],
) -> None:
    samples, inputs = samples_and_inputs
    kept = [sample for sample in samples["train"] if sample.mask is not None]
    masked = masked_images(inputs, inputs.synthetic["copied"], (32, 32))
    assert masked.groups == [sample.group_id for sample in kept]
    assert masked.parents == [sample.sample_id for sample in kept]


def test_images_without_mask_are_counted(samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs]) -> None:
    _, inputs = samples_and_inputs
    masked = masked_images(inputs, inputs.train, (32, 32))
    assert len(masked) == len(masked.groups) == len(masked.parents) == 69
    assert masked.without_mask == 1
    assert masked_images(inputs, inputs.train, (32, 32)) is masked


def test_what_is_large_is_kept_until_it_is_released(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs],
) -> None:
    _, inputs = samples_and_inputs
    first, again = (masked_images(inputs, inputs.train, (16, 16)) for _ in range(2))
    assert first is again
    assert inputs.once("small", lambda: 1) == 1
    inputs.release()
    assert inputs.once("small", lambda: 2) == 1
    other = masked_images(inputs, inputs.train, (16, 16))
    assert other is not first
    np.testing.assert_array_equal(other.images, first.images)


def test_released_memory_goes_back_to_the_system(
    samples_and_inputs: tuple[dict[str, list[Sample]], EvaluationInputs],
) -> None:
    """Many small arrays, as decoded images are: the C library would keep their memory."""
    _, inputs = samples_and_inputs
    process = psutil.Process()
    inputs.once("images", lambda: [np.ones(4000, np.uint8) for _ in range(25_000)], large=True)
    held = process.memory_info().rss
    inputs.release()
    assert held - process.memory_info().rss > 50 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_large_arrays_leave_memory_as_soon_as_they_are_freed() -> None:
    """Once a larger one was freed, the C library would keep them, as what lies behind them is in use."""
    code = """
import numpy, psutil
from maskloom.evaluate.memory import return_freed_memory
return_freed_memory()
larger = numpy.ones(30 << 20, numpy.uint8)
del larger
pairs = [[numpy.ones(size, numpy.uint8) for size in (20 << 20, 100_000)] for _ in range(5)]
held = psutil.Process().memory_info().rss
pairs = [small for _, small in pairs]
print(held - psutil.Process().memory_info().rss)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(found.stdout) > 80 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_threads_share_one_heap(tmp_path: Path) -> None:
    """What one thread has freed, others can use."""
    code = f"""
import ctypes, threading
import numpy
from maskloom.evaluate.memory import return_freed_memory
return_freed_memory()
threads = [threading.Thread(target=lambda: numpy.ones(100_000)) for _ in range(4)]
[one.start() for one in threads], [one.join() for one in threads]
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(library.fopen({os.fsencode(tmp_path / "heaps.xml")!r}, b"w"))
library.malloc_info(0, file), library.fclose(file)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "heaps.xml").read_text().count("<heap nr=") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_memory_that_is_soon_used_again_is_kept() -> None:
    """The C library would return it, and the system would clear its pages each time."""
    code = """
import resource
import numpy
from maskloom.evaluate.memory import return_freed_memory
return_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(50):
    numpy.ones(8 << 20, numpy.uint8)
print(faults() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 10_000  # 2,048 pages each time would be 100,000


def test_memory_that_rows_were_read_into_goes_back_too() -> None:
    """PyArrow keeps what it frees in a pool of its own."""
    code = """
import psutil, pyarrow
from maskloom.evaluate.memory import return_freed_memory
buffers = [pyarrow.allocate_buffer(1 << 20) for _ in range(100)]
for one in buffers:
    memoryview(one).cast("B")[:] = bytes(1 << 20)
del buffers, one
held = psutil.Process().memory_info().rss
return_freed_memory()
print(held - psutil.Process().memory_info().rss)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(found.stdout) > 80 << 20


def test_colour_images(tmp_path: Path) -> None:
    def colour(sample: Sample) -> None:
        sample.image = np.stack([sample.image] * 3, axis=2)

    write_tiny_run(tmp_path, {}, {"train": 3}, change=colour, description=tiny_description(channels=3))
    assert tiny_inputs(tmp_path, ()).train.images((8, 8)).shape == (3, 8, 8, 3)


def test_result_has_no_figures_that_json_lacks() -> None:
    result = MetricResult(
        question="?", verdict="v.", values={"x": float("nan"), "y": [float("inf"), 1.5], "z": {1: Interval(value=2)}}
    )
    values = result.as_json()
    assert values["values"] == {"x": None, "y": [None, 1.5], "z": {"1": {"value": 2.0, "low": None, "high": None}}}
    json.dumps(values, allow_nan=False)


def test_skipped_result_says_why() -> None:
    result = skipped_result("Why?", "there is no mask")
    assert result.verdict == "Not measured: there is no mask."
    assert result.skipped == "there is no mask"
