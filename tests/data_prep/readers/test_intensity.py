"""Intensity windows, and the parts of the configuration that say how raw pixels are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import BaseModel

from maskloom.data_prep.adapter import RawImage
from maskloom.data_prep.processing.resizing import resized
from maskloom.data_prep.readers.intensity import window_range
from maskloom.pipeline.config.data import DataConfig, IntensityWindow, StainConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError

RAMP = np.arange(101, dtype=np.int16) - 20  # -20 .. 80, one voxel a value


def test_percentiles_are_of_the_values():
    assert window_range(RAMP, IntensityWindow()) == (-19, 79)
    assert window_range(RAMP.reshape(1, 101), IntensityWindow(lower=0, upper=50)) == (-20, 30)


def test_a_window_is_its_middle_and_its_width_whatever_the_values():
    window = IntensityWindow(method="window", center=40, width=400)  # soft tissue of CT
    assert window_range(RAMP, window) == (-160, 240)
    assert window_range(np.array([]), window) == (-160, 240)


def test_zscore_reaches_so_many_deviations_to_both_sides():
    values = np.array([0.0, 10.0])  # mean 5, deviation 5
    assert window_range(values, IntensityWindow(method="zscore", deviations=2)) == (-5, 15)
    assert window_range(np.full(5, 7.0), IntensityWindow(method="zscore")) == (7, 7)


def test_large_integers_neither_wrap_nor_lose_their_mean():
    values = np.array([65535, 65533] * 5000, dtype=np.uint16)
    black, white = window_range(values, IntensityWindow(method="zscore", deviations=1))
    assert (black, white) == (65533, 65535)
    half = np.full(200_000, 100, dtype=np.float16)  # whose sum float16 cannot hold
    assert window_range(half, IntensityWindow(method="zscore")) == (100, 100)


@pytest.mark.parametrize("method", ["percentile", "zscore"])
def test_no_values_at_all_have_a_range(method: str):
    assert window_range(np.zeros((0, 4)), IntensityWindow(method=method)) == (0, 1)


@given(arrays(np.int16, st.integers(1, 60)), st.sampled_from(["percentile", "zscore"]))
def test_a_range_is_ordered_and_percentiles_lie_within_the_values(values: np.ndarray, method: str):
    black, white = window_range(values, IntensityWindow(method=method))
    assert black <= white
    assert isinstance(black, float)
    assert method == "zscore" or (values.min() <= black and white <= values.max())


def test_what_lies_beyond_the_window_is_black_or_white():
    image = np.array([[-1000, -160, 40, 240, 3000]] * 8, dtype=np.int16)
    window = window_range(image, IntensityWindow(method="window", center=40, width=400))
    pixels, *_ = resized(RawImage(image, None, window), (8, 5), "stretch", 1)
    assert pixels[0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (IntensityWindow, {"method": "window"}, "method=window needs center and width, in raw units"),
        (IntensityWindow, {"method": "window", "center": 40}, "method=window needs center and width"),
        (IntensityWindow, {"method": "window", "center": 40, "width": 0}, "width"),
        (IntensityWindow, {"lower": 60, "upper": 40}, "lower=60 must be below upper=40"),
        (IntensityWindow, {"lower": 50, "upper": 50}, "lower=50 must be below upper=50"),
        (IntensityWindow, {"lower": -1}, "lower=-1"),
        (IntensityWindow, {"upper": 101}, "upper=101"),
        (IntensityWindow, {"method": "zscore", "deviations": 0}, "deviations=0"),
        (IntensityWindow, {"method": "minmax"}, "method='?minmax"),
        (IntensityWindow, {"centre": 40}, "unknown key 'centre'.*'center'"),
        (StainConfig, {"method": "reinhard"}, "method=reinhard needs reference: the path of an image"),
        (StainConfig, {"method": "vahadane"}, "method='?vahadane"),
        (StainConfig, {}, "method"),
        (StainConfig, {"method": "macenko", "target": "a.png"}, "unknown key 'target'"),
        (DataConfig, {"dataset": "busi", "conditioning": "sketch"}, "conditioning='?sketch"),
    ],
)
def test_mistakes_in_the_configuration_are_named(model: type[BaseModel], values: dict[str, Any], message: str):
    with pytest.raises(MaskLoomError, match=f"here.*{message}"):
        validated(values, model, "here")


def test_a_whole_section_is_read():
    data = DataConfig(
        dataset="busi",
        conditioning="foreground",
        intensity={"method": "window", "center": -600, "width": 1500},
        stain={"method": "reinhard", "reference": "reference.png"},
    )
    assert data.intensity is not None
    assert data.stain is not None
    assert (data.intensity.center, data.intensity.width) == (-600, 1500)
    assert data.stain.reference == Path("reference.png")
    assert StainConfig(method="macenko").reference is None
