"""Random pipelines of a known architecture: diffusers and every stage's loading code open all forms of them."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.random_backbone import ARCHITECTURES, Form, Name, main, write_random_backbone, write_tiny_settings
from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.loading import load_part
from maskloom.models.stable_diffusion.source import INDEX, WEIGHTS, BackboneSource
from maskloom.pipeline.errors import MaskLoomError


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return settings of both generations whose networks are tiny."""
    return write_tiny_settings(tmp_path_factory.mktemp("settings"))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("form", [Form.FOLDER, Form.FP16])
def test_diffusers_opens_and_samples_it(settings: Path, tmp_path: Path, name: str, form: Form) -> None:
    out, architecture = tmp_path / "backbone", ARCHITECTURES[name]
    write_random_backbone(architecture, out, form, settings=settings)
    variant = "fp16" if form == Form.FP16 else None
    check_backbone(BackboneSource(str(out), variant=variant))
    pipe = StableDiffusionPipeline.from_pretrained(
        out, variant=variant, torch_dtype=torch.float32, local_files_only=True
    )
    assert pipe.scheduler.config.prediction_type == architecture.prediction_type
    assert pipe.unet.config.sample_size == architecture.latent_side
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a scan", height=64, width=64, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_a_single_file_holds_the_same_weights(settings: Path, tmp_path: Path) -> None:
    sd15 = ARCHITECTURES["sd15"]
    write_random_backbone(sd15, tmp_path / "folder", seed=3, settings=settings)
    write_random_backbone(sd15, tmp_path / "model.safetensors", Form.SINGLE_FILE, seed=3, settings=settings)
    single = BackboneSource(str(tmp_path / "model.safetensors"), single_file_config=str(tmp_path / "folder"))
    check_backbone(single)
    for part in WEIGHTS:
        ours = load_part(single, part).state_dict()
        theirs = load_part(BackboneSource(str(tmp_path / "folder")), part).state_dict()
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    with pytest.raises(MaskLoomError, match="--form single-file: written for sd15 alone"):
        write_random_backbone(ARCHITECTURES["sd21"], tmp_path / "other", Form.SINGLE_FILE, settings=settings)
    assert not (tmp_path / "other").exists()


def test_weights_follow_the_seed(settings: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_backbone(ARCHITECTURES["sd15"], tmp_path / name, seed=seed, settings=settings)
    weights = [load_part(BackboneSource(str(tmp_path / name)), "unet").state_dict() for name in "abc"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_what_exists_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match="exists; name a new place"):
        main(Name.SD15, tmp_path)
    assert not (tmp_path / INDEX).exists()


def test_the_command_writes_a_tiny_pipeline(tmp_path: Path) -> None:
    main(Name.SD21, tmp_path / "new", Form.FP16, tiny=True)
    check_backbone(BackboneSource(str(tmp_path / "new"), variant="fp16"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) < 20e6
