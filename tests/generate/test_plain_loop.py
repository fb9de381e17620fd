"""`benchmarks.generate`: both sides make the same images from the same conditions, where they take the same steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.generate import GENERATOR, OURS, PLAIN, main, timed_parts
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.errors import MaskLoomError
from tests.generate.workbench import PLAIN as CONTROLNET_ALONE
from tests.generate.workbench import Bench

SAME_STEPS = [*CONTROLNET_ALONE, "generate.scheduler=ddim", "generate.guidance_scale=2"]
SMALL = [
    "evaluate.metrics.faithfulness.image_size=32",
    "evaluate.metrics.faithfulness.steps=2",
    "evaluate.metrics.faithfulness.channels=[4,8]",
    "evaluate.metrics.quality.extractor_size=32",
]


def test_the_plain_loop_makes_the_images_of_generate(bench: Bench, tmp_path: Path) -> None:
    """The scheduler of the tiny backbone is DDPM, so that the seeds decide the start alone: one step, without noise."""
    config = bench.config([*SAME_STEPS, "generate.num_inference_steps=1"])
    parts = timed_parts(config, bench.run, rounds=2, steps=1, scratch=tmp_path / "parts")
    assert [part.images for part in parts] == [3, 3]
    assert all(seconds > 0 for part in parts for seconds in part.seconds.values())
    for part in parts:
        for row in MaskPromptDataset.open(part.folder / GENERATOR).rows("train"):
            ours = png_array(row["image"]["bytes"]).astype(float)
            with Image.open(part.folder / f"{row['sample_id']}.png") as picture:
                plain = np.asarray(picture, dtype=float).mean(axis=2)
            assert np.abs(ours - plain).max() <= 1


def test_the_command_prints_rates_and_quality(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bench.config_file()
    main(file, [*CONTROLNET_ALONE, *SMALL], images=4, rounds=2, steps=1, json_file=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["rates"]) == {PLAIN, OURS} and len(figures["ratios"]) == 2
    assert set(figures["quality"]["Dice with the mask"]) >= {PLAIN, OURS}
    printed = capsys.readouterr().out
    assert "images/s" in printed and "not measured" in printed  # too few images for a distance


@pytest.mark.parametrize(
    ("overrides", "rounds", "message"),
    [
        ([], 1, "the run trains lora, vae as well; give one that trains a ControlNet alone"),
        (CONTROLNET_ALONE, 7, "--rounds 7: more than the 6 images"),
    ],
)
def test_what_cannot_be_compared_is_an_error(
    bench: Bench, tmp_path: Path, overrides: list[str], rounds: int, message: str
) -> None:
    with pytest.raises(MaskLoomError, match=message):
        timed_parts(bench.config(overrides), bench.run, rounds, 1, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
