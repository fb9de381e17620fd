"""The VAE's ceiling: the backbone's VAE, and a fine-tuned decoder beside it on the same images."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from maskloom.evaluate.metrics import vae_ceiling
from maskloom.evaluate.metrics.vae_ceiling import BACKBONE, TUNED, reconstruct, through_vae
from maskloom.evaluate.scores.features import ExtractorOptions, load_extractor
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.results import Interval, MetricResult
from tests.evaluate.runs import answer, tiny_inputs
from tests.tiny_backbone import build_tiny_backbone
from tests.tiny_datasets import tiny_picture, write_tiny_run

COLUMNS = ["VAE", "N", "Fréchet distance", "PSNR in dB", "SSIM"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tiny_run(tmp_path, {})
    return tmp_path


def ceiling(run: Path, backbone: Path) -> MetricResult:
    return answer(tiny_inputs(run, (), pretrained_model_name_or_path=str(backbone)), "vae_ceiling")


def test_without_a_backbone_it_says_so(run: Path) -> None:
    inputs = tiny_inputs(run, ())
    result = answer(replace(inputs, backbone=None), "vae_ceiling")
    assert result.skipped == "no backbone is fine-tuned, so no image passes through a VAE"
    assert result.verdict == f"Not measured: {result.skipped}."


def leave_tuned_vae(run: Path, backbone: Path) -> None:
    """Write a VAE that paints the train images' mean grey: better than random weights, and easily
    so.
    """
    vae = AutoencoderKL.from_pretrained(backbone, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.05
        vae.decoder.conv_out.bias.fill_(-0.45)
    vae.save_pretrained(run / "generator" / "vae")


def test_without_a_tuned_decoder_there_is_one_row(run: Path, backbone: Path) -> None:
    result = ceiling(run, backbone)
    (table,) = result.tables
    assert table.columns == COLUMNS
    assert [row[:2] for row in table.rows] == [[BACKBONE, 12]]
    assert set(result.values) == {"n", BACKBONE}
    assert "the backbone's VAE have a PSNR" in result.verdict


def test_a_tuned_decoder_stands_beside_the_backbones(run: Path, backbone: Path) -> None:
    before = ceiling(run, backbone)
    leave_tuned_vae(run, backbone)
    result = ceiling(run, backbone)
    rows = {row[0]: row for row in result.tables[0].rows}
    assert list(rows) == [BACKBONE, TUNED, "paired difference"]
    assert rows[BACKBONE] == before.tables[0].rows[0]
    gain = rows["paired difference"]
    assert gain[2] is None  # a distance between sets has no value an image
    for column in (3, 4):
        old, new, gained = (row[column] for row in (rows[BACKBONE], rows[TUNED], gain))
        assert isinstance(old, Interval)
        assert isinstance(new, Interval)
        assert isinstance(gained, Interval)
        assert gained.value == pytest.approx(new.value - old.value)
        assert gained.low <= gained.value <= gained.high
    assert gain[3].low > 3  # dB
    assert result.values["gain"]["PSNR in dB"]["value"] == gain[3].value
    assert "fine-tuned decoder have a PSNR" in result.verdict
    assert "with the backbone's own decoder" in result.verdict
    assert any("smooth texture" in limit for limit in result.limits)
    assert result.pictures[0].pixels.shape[0] > before.pictures[0].pixels.shape[0]
    assert (
        "real test images; the same images after the backbone's VAE, and after the fine-tuned decoder"
        in result.pictures[0].caption
    )


def test_the_same_weights_gain_nothing(run: Path, backbone: Path) -> None:
    shutil.copytree(backbone / "vae", run / "generator" / "vae")
    result = ceiling(run, backbone)
    assert result.values[TUNED] == result.values[BACKBONE]
    assert result.values["gain"]["SSIM"] == {"value": 0.0, "low": None, "high": None}


def test_a_damaged_tuned_vae_is_named(run: Path, backbone: Path) -> None:
    leave_tuned_vae(run, backbone)
    (run / "generator/vae/diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(
        MaskLoomError, match=r"generator/vae: cannot be read as AutoencoderKL: .*train again with --force"
    ):
        ceiling(run, backbone)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_keep_their_shape_and_batches_do_not_matter(backbone: Path, channels: int) -> None:
    vae = AutoencoderKL.from_pretrained(backbone, subfolder="vae").eval()
    picture = tiny_picture(0, 32, 0, seed=1)[0]
    images = np.stack([np.repeat(np.roll(picture, i, axis=1)[:24, :, None], channels, axis=2) for i in range(3)])
    whole = through_vae(vae, images, 3, "cpu")
    assert whole.shape == images.shape == (3, 24, 32, channels)
    single = np.concatenate([through_vae(vae, images[i : i + 1], 1, "cpu") for i in range(3)])
    assert abs(whole.astype(int) - single).max() <= 1


def test_a_few_images_are_in_memory_at_a_time(run: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images in batches of five: the same figures, and the same images shown."""
    inputs = tiny_inputs(run, (), pretrained_model_name_or_path=str(backbone))
    extractor = load_extractor(inputs, ExtractorOptions(extractor_size=32))
    vae = AutoencoderKL.from_pretrained(backbone, subfolder="vae").eval()
    whole = reconstruct(vae, inputs.test, list(range(12)), [0, 4, 5, 11], extractor, 4, "cpu")
    monkeypatch.setattr(vae_ceiling, "BATCH", 5)
    read: list[int] = []
    original = vae_ceiling.through_vae

    def noted(vae: AutoencoderKL, images: np.ndarray, batch_size: int, device: str) -> np.ndarray:
        read.append(len(images))
        return original(vae, images, batch_size, device)

    monkeypatch.setattr(vae_ceiling, "through_vae", noted)
    parts = reconstruct(vae, inputs.test, list(range(12)), [0, 4, 5, 11], extractor, 4, "cpu")
    assert read == [5, 5, 2]
    assert abs(whole.shown.astype(int) - parts.shown).max() <= 1
    assert whole.shown.shape == (4, 32, 32, 1)
    assert parts.psnr == pytest.approx(whole.psnr, abs=0.01)
    assert parts.ssim == pytest.approx(whole.ssim, abs=0.001)
    assert parts.features == pytest.approx(whole.features, abs=0.05)
    decoded = original(vae, inputs.test.images(), 4, "cpu")
    assert abs(decoded[[0, 4, 5, 11]].astype(int) - whole.shown).max() <= 1
    error = ((inputs.test.images().astype(float) - decoded) ** 2).mean(axis=(1, 2, 3))
    assert whole.psnr == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)


def test_of_many_images_some_spread_evenly_are_measured(run: Path, backbone: Path) -> None:
    inputs = tiny_inputs(run, (), pretrained_model_name_or_path=str(backbone))
    options = vae_ceiling.Options(extractor_size=32, most_images=5, shown_images=2)
    result = vae_ceiling.evaluate(inputs, options)
    assert (result.n, result.values["n"]) == ({"real test": 5}, 5)
    images, rows = inputs.test.images(), [0, 3, 6, 8, 11]
    vae = AutoencoderKL.from_pretrained(backbone, subfolder="vae").eval()
    error = ((images[rows].astype(float) - through_vae(vae, images[rows], 8, "cpu")) ** 2).mean(axis=(1, 2, 3))
    psnr = result.values[BACKBONE]["PSNR in dB"]["value"]
    assert psnr == pytest.approx((10 * np.log10(255**2 / error)).mean(), abs=0.01)
    every = vae_ceiling.evaluate(inputs, vae_ceiling.Options(extractor_size=32, most_images=12))
    assert every.values[BACKBONE]["PSNR in dB"]["value"] != psnr
