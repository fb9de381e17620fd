"""One `.safetensors` file in Stable Diffusion's original layout: the same weights as the folder it
was written from, and one line where it cannot be.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.loading import KINDS, load_part, new_network
from maskloom.models.stable_diffusion.original_layout import original_names, write_original
from maskloom.models.stable_diffusion.single_file import PREFIXES, converted_names, generation_of
from maskloom.models.stable_diffusion.source import ORIGINAL, WEIGHTS, BackboneSource
from maskloom.models.stable_diffusion.text import load_tokenizer
from maskloom.pipeline.errors import MaskLoomError
from tests.tiny_backbone import build_tiny_backbone

NANO = Path(__file__).parents[3] / "assets/nano-sd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    return write_original(folder, tmp_path / "model.safetensors")


def refusal(source: BackboneSource) -> str:
    with pytest.raises(MaskLoomError) as caught:
        check_backbone(source)
    return str(caught.value)


@pytest.mark.parametrize("original", ["tiny", "nano"])
def test_the_file_holds_what_the_folder_holds(folder: Path, tmp_path: Path, original: str) -> None:
    whole = folder if original == "tiny" else NANO
    file = write_original(whole, tmp_path / "model.safetensors")
    settings = Path(shutil.copytree(whole, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors")))
    single, plain = BackboneSource(str(file), single_file_config=str(settings)), BackboneSource(str(whole))
    check_backbone(single)
    for part in WEIGHTS:
        ours, theirs = load_part(single, part).state_dict(), load_part(plain, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), part
    assert load_part(single, "unet", torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(single).get_vocab() == load_tokenizer(plain).get_vocab()
    assert single.scheduler_settings() == plain.scheduler_settings()


@pytest.mark.parametrize(
    ("generation", "counts"),
    [("sd1", (859_520_964, 83_653_863, 123_060_480)), ("sd2", (865_910_724, 83_653_863, 340_387_840))],
)
def test_the_settings_in_the_package_are_those_of_stable_diffusion(generation: str, counts: tuple[int, ...]) -> None:
    source = BackboneSource(str(ORIGINAL / generation))
    with torch.device("meta"):
        parts = [new_network(KINDS[part], source, part) for part in ("unet", "vae", "text_encoder")]
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == counts


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_stable_diffusion_1_is_translated_whole(part: str) -> None:
    """The names and shapes of the real sizes, on the meta device."""
    source = BackboneSource(str(ORIGINAL / "sd1"))
    with torch.device("meta"):
        network = new_network(KINDS[part], source, part)
    weights = network.state_dict()
    found = converted_names(part, original_names(part, weights), network)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in weights.items()}


def test_the_digest_follows_the_file_its_settings_and_tokenizer(file: Path, folder: Path, tmp_path: Path) -> None:
    settings = Path(shutil.copytree(folder, tmp_path / "settings"))
    source = BackboneSource(str(file), single_file_config=str(settings))
    before = source.digest()
    next((settings / "unet").glob("*.safetensors")).unlink()  # not read
    assert source.digest() == before
    for path in (file, settings / "vae/config.json", settings / "tokenizer/vocab.json"):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert source.digest() != before, path
        path.write_bytes(content)
    assert len(BackboneSource(str(file), tokenizer_name=str(folder / "tokenizer")).digest()) == 64


def test_a_tokenizer_must_come_from_somewhere(file: Path) -> None:
    message = refusal(BackboneSource(str(file)))
    assert (
        "a single file holds no tokenizer; set train.tokenizer_name to a folder with its vocab.json and merges.txt"
        in message
    )
    assert "train.single_file_config" in message


def test_a_file_of_another_shape_than_the_settings_names_the_remedy(file: Path, folder: Path) -> None:
    source = BackboneSource(str(file), tokenizer_name=str(folder / "tokenizer"))
    check_backbone(source)  # sizes are compared when weights are read
    with (
        torch.device("meta"),
        pytest.raises(
            MaskLoomError, match=r"its unet does not fit the settings in .*sd1.*set train\.single_file_config"
        ),
    ):
        load_part(source, "unet")


def changed(file: Path, **extra: torch.Tensor | None) -> Path:
    weights = {**load_file(file), **extra}
    save_file({key: value for key, value in weights.items() if value is not None}, file)
    return file


def test_other_kinds_of_files(file: Path, folder: Path, tmp_path: Path) -> None:
    source = BackboneSource(str(file), single_file_config=str(folder))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    original = load_file(file)
    changed(file, **{first: torch.zeros(16, 9, 3, 3)})
    assert "its UNet takes 9 channels, not 4 (inpainting" in refusal(source)
    changed(file, **{first: original[first], "conditioner.embedders.0.x": torch.zeros(1)})
    assert "a Stable Diffusion XL file" in refusal(BackboneSource(str(file)))
    for part, prefix in PREFIXES.items():
        save_file({key: value for key, value in original.items() if not key.startswith(prefix)}, file)
        assert f"holds no {part} in Stable Diffusion's original layout" in refusal(source), part
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, file)
    assert "holds no unet, vae, text_encoder" in refusal(source)
    file.write_bytes(b"short")
    assert "no whole .safetensors file" in refusal(source)


def test_weights_that_are_not_finite(file: Path, folder: Path) -> None:
    first = "model.diffusion_model.input_blocks.0.0.bias"
    changed(file, **{first: torch.full_like(load_file(file)[first], torch.nan)})
    with pytest.raises(MaskLoomError, match=r"unet: its weights hold NaN or infinite values"):
        load_part(BackboneSource(str(file), single_file_config=str(folder)), "unet")


def test_what_stable_diffusion_2_predicts_must_be_said(file: Path, folder: Path, tmp_path: Path) -> None:
    weights = {key: value for key, value in load_file(file).items() if not key.startswith("cond_stage_model.")}
    second = tmp_path / "two.safetensors"
    save_file({**weights, "cond_stage_model.model.positional_embedding": torch.zeros(77, 1024)}, second)
    assert generation_of(second) == "sd2"
    words = str(folder / "tokenizer")
    assert "does not say what it predicts; set train.prediction_type to v_prediction" in refusal(
        BackboneSource(str(second), tokenizer_name=words)
    )
    for kind in ("epsilon", "v_prediction"):
        source = BackboneSource(str(second), tokenizer_name=words, prediction_type=kind)
        check_backbone(source)
        assert source.scheduler_settings()["prediction_type"] == kind


def test_a_single_file_has_no_variant(file: Path, folder: Path) -> None:
    assert "train.variant=fp16: a single file has no variants" in refusal(
        BackboneSource(str(file), variant="fp16", single_file_config=str(folder))
    )


def test_settings_that_are_not_there(file: Path) -> None:
    assert "train.single_file_config=/no/where: no such folder" in refusal(
        BackboneSource(str(file), single_file_config="/no/where")
    )


def test_settings_of_code_of_their_own(file: Path, folder: Path, tmp_path: Path) -> None:
    settings = Path(shutil.copytree(folder, tmp_path / "settings"))
    index = json.loads((settings / "model_index.json").read_text())
    (settings / "model_index.json").write_text(json.dumps({**index, "scheduler": ["planted", "Planted"]}))
    assert "names planted.Planted" in refusal(BackboneSource(str(file), single_file_config=str(settings)))
