"""The parts in the order in which they run: the shortest answers first, the longest waits last."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.gpu.setup import Setup

CPU_PATIENCE = 10  # the machine may be busy with other work
OVERFLOWS = ("loss scale too large", "loss scale without bound", "learning rate too large")


@dataclass(frozen=True)
class Part:
    """A part: a file of this folder, whose `measure(setup, item)` returns the figures of an item.

    Attributes:
        name: name of the file.
        seconds: after this time, the process of the part is killed.
        items: what is measured, in order, each with figures of its own.
    """

    name: str
    seconds: int
    items: tuple[str, ...]


def parts(setup: Setup) -> tuple[Part, ...]:
    """Return the parts with their items; on a CPU they may take longer."""
    sizes = [f"{precision} batch {batch}" for batch in setup.scale.batches for precision in setup.precisions]
    kills = [f"kill, {precision}" for precision in dict.fromkeys((*setup.precisions, "no"))]
    listed = (
        Part("versions", 90, ("versions", "packages", "imports", "device")),
        Part("inputs", 150, ("backbone", "dataset", "controlnet")),
        Part("training", 150, ("plain", "cache_latents=false", "xformers", "use_8bit_adam")),
        Part("recovery", 210, (*kills, *OVERFLOWS)),
        Part("generation", 90, ("plain loop", "generate")),  # `generate` makes cuDNN deterministic, for good
        Part("features", 45, ("efficientnet_lite0",)),
        Part("train_step", 540, tuple(sizes)),
        Part("compilation", 240, ("torch_compile",)),
    )
    return listed if setup.on_gpu else tuple(replace(part, seconds=CPU_PATIENCE * part.seconds) for part in listed)
