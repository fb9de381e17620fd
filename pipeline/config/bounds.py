"""Upper bounds of configured numbers, each with its reason.

A typing mistake gives a one-line error at once instead of an out-of-memory error hours later.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator

LARGEST_INT = 2**31 - 1  # the largest 32-bit counter of the libraries
LARGEST_FLOAT = 1e18  # its square still fits a 32-bit float


def at_most(limit: int, reason: str) -> AfterValidator:
    """Return a validator that rejects integers above `limit`; its error states the reason."""

    def check(value: int) -> int:
        if value > limit:
            raise ValueError(f"at most {limit}: {reason}")
        return value

    return AfterValidator(check)


Side = Annotated[int, at_most(8192, "a single image of that size fills the memory of a training")]
"""Side length of an image in pixels."""
BatchSize = Annotated[int, at_most(16_384, "no device holds a larger batch")]
"""Samples per device and micro-batch."""
Accumulation = Annotated[int, at_most(16_384, "an optimizer step would take days")]
"""Micro-batches per optimizer step."""
Steps = Annotated[int, at_most(100_000_000, "a hundred million steps of 0.1 s take four months")]
"""Optimizer steps."""
Epochs = Annotated[int, at_most(1_000_000, "a million epochs of a minute take two years")]
"""Passes over a dataset."""
Workers = Annotated[int, at_most(1024, "no machine has more cores, and each process takes memory")]
"""Processes."""
Rows = Annotated[int, at_most(10_000_000, "the list of that many rows alone takes gigabytes")]
"""Images or rows of a dataset."""
Rank = Annotated[int, at_most(2048, "no attention layer of a Stable Diffusion backbone is wider")]
"""Rank of adapters."""
Channels = Annotated[int, at_most(8192, "the weights of a layer that wide take gigabytes")]
"""Width of a network layer."""
Layers = Annotated[int, at_most(256, "no device holds the activations of that many layers")]
"""Depth of a network."""
Timesteps = Annotated[int, at_most(10_000, "a noise schedule has a thousand timesteps")]
"""Steps of a diffusion process."""
Repeats = Annotated[int, at_most(1_000_000, "more do not change any digit shown")]
"""Bootstrap resamples, random draws and the like."""
Trainings = Annotated[int, at_most(1000, "each is a separate training")]
"""Number of networks that are trained for one metric."""
Copies = Annotated[int, at_most(1000, "each copy of each image is kept on disk")]
"""Augmented copies of an image."""
Tries = Annotated[int, at_most(100_000, "an attempt that fails this often will not succeed")]
"""Attempts before giving up."""
Shown = Annotated[int, at_most(1000, "a browser cannot open a page with more images")]
"""Images on a page or in a grid."""


def unbounded_number(value: Any) -> int | float | None:
    """Return the first number above the bounds in a value, or None.

    Args:
        value: a number, or nested lists, tuples and mappings of numbers.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) > LARGEST_INT else None
    if isinstance(value, float):
        return value if math.isfinite(value) and abs(value) > LARGEST_FLOAT else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := unbounded_number(part)) is not None), None)
