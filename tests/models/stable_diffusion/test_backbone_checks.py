"""A backbone that cannot be trained or sampled here, or that brings code of its own, is one line
before anything is computed.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from safetensors.torch import load_file, save_file

from maskloom.models.stable_diffusion.checks import SCHEDULERS, check_backbone
from maskloom.models.stable_diffusion.loading import load_controlnet, load_noise_schedule, load_part
from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.text import load_text_settings, load_tokenizer
from maskloom.pipeline.errors import MaskLoomError, one_line
from tests.tiny_backbone import build_tiny_backbone, build_tiny_controlnet

KEY = "train.pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def backbone(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "backbone"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refusal(source: BackboneSource | Path, **settings: Any) -> str:
    with pytest.raises(MaskLoomError) as caught:
        check_backbone(source if isinstance(source, BackboneSource) else BackboneSource(str(source), **settings))
    message = str(caught.value)
    assert message == one_line(message)
    return message


def index(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model_index.json", **values)


def settings(part: str, **values: Any) -> Callable[[Path], None]:
    name = (
        "scheduler_config.json"
        if part == "scheduler"
        else "tokenizer_config.json"
        if part == "tokenizer"
        else "config.json"
    )
    return lambda folder: change(folder / part / name, **values)


def removed(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    # code of its own
    "scheduler of its own": (index(scheduler=["planted", "Planted"]), r"names planted\.Planted as its scheduler; code that comes with a backbone is never run"),
    "component of a module path": (index(vae=["os.path", "join"]), r"names os\.path\.join as its vae"),
    "further component": (index(helper=["helper", "Helper"]), r"names helper\.Helper as its helper"),
    "component of a third library": (index(unet=["onnxruntime", "OnnxModel"]), "as its unet"),
    "component that is nested": (index(unet=[["a"], {"b": 1}]), "as its unet"),
    "component without a class": (index(unet=["diffusers"]), "as its unet"),
    "no component at all": (index(unet=[None, None]), "as its unet"),
    "pipeline of its own": (index(_class_name=["pipeline", "Planted"]), "is a pipeline of its own"),
    "pipeline without a name": (index(_class_name=None), "is a pipeline of its own"),
    "auto_map of the pipeline": (index(auto_map={"AutoModel": "planted.Planted"}), r"model_index\.json names code of its own \(auto_map\)"),
    **{
        f"auto_map of the {part}": (settings(part, auto_map={"AutoModel": "planted.Planted"}), r"auto_map")
        for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer")
    },
    **{
        f"{key} of the text encoder": (settings("text_encoder", **{key: "planted/kernel"}), f"{key}='planted/kernel'")
        for key in ("_attn_implementation", "attn_implementation")
    },
    "adapter on the text encoder": (written("text_encoder/adapter_config.json", "{}"), r"text_encoder/adapter_config\.json would load an adapter"),
    # settings that fail later
    "fewer betas than timesteps": (settings("scheduler", trained_betas=[0.1] * 10), "10 trained_betas for 1000 timesteps"),
    "a shift that is text": (settings("unet", freq_shift="x"), "freq_shift='x'"),
    "a scale of nothing": (settings("unet", mid_block_scale_factor=0), "mid_block_scale_factor=0"),
    "an epsilon that is text": (settings("text_encoder", layer_norm_eps="x"), "layer_norm_eps='x'"),
    "a flow": (settings("scheduler", use_flow_sigmas=True), "use_flow_sigmas"),
    "a limit that is text": (settings("tokenizer", model_max_length="48"), "model_max_length"),
    "a limit with no room": (settings("tokenizer", model_max_length=2), "model_max_length"),
    # other kinds of models
    **{
        f"a {kind}": (index(_class_name=kind), f"says that it is a {kind}; only Stable Diffusion 1.x and 2.x")
        for kind in (
            "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionInpaintPipeline",
            "StableDiffusionImageVariationPipeline", "StableUnCLIPPipeline", "LatentConsistencyModelPipeline", "StableDiffusionUpscalePipeline",
        )
    },
    "two text encoders": (index(text_encoder_2=["transformers", "CLIPTextModelWithProjection"]), "as its text_encoder_2"),
    "inpainting": (settings("unet", in_channels=9), "takes 9 channels and returns 4, the VAE's latents have 4"),
    "editing": (settings("unet", in_channels=8), "takes 8 channels"),
    "variance": (settings("unet", out_channels=8), "returns 8"),
    "latents of 16 channels": (settings("vae", latent_channels=16), "latents have 16"),
    "classes": (settings("unet", class_embed_type="projection"), "class_embed_type='projection'"),
    "numbered classes": (settings("unet", num_class_embeds=10), "num_class_embeds=10"),
    "SDXL's UNet": (settings("unet", addition_embed_type="text_time"), "addition_embed_type='text_time'"),
    "image embeddings": (settings("unet", encoder_hid_dim_type="image_proj"), "encoder_hid_dim_type"),
    "distilled guidance": (settings("unet", time_cond_proj_dim=256), "time_cond_proj_dim=256"),
    "boxes": (settings("unet", attention_type="gated"), "attention_type='gated'"),
    "middle without text": (settings("unet", mid_block_type="UNetMidBlock2D"), "mid_block_type"),
    "quantised": (settings("unet", quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
    "another UNet": (settings("unet", _class_name="UNet3DConditionModel"), "_class_name='UNet3DConditionModel'"),
    "another VAE": (settings("vae", _class_name="AsymmetricAutoencoderKL"), "_class_name='AsymmetricAutoencoderKL'"),
    "VAE of factor 4": (settings("vae", block_out_channels=[8, 8, 16]), "a VAE with factor 4, not 8"),
    "VAE of factor 16": (settings("vae", block_out_channels=[8] * 5), "a VAE with factor 16, not 8"),
    "VAE of grey images": (settings("vae", in_channels=1), "in_channels=1"),
    "VAE with a shift": (settings("vae", shift_factor=0.06), "shift_factor=0.06"),
    "another text encoder": (settings("text_encoder", model_type="t5"), "model_type='t5'"),
    "text encoder of another width": (settings("text_encoder", hidden_size=48), "attends to 32 values per token, the text encoder returns 48"),
    "flow matching": (settings("scheduler", _class_name="FlowMatchEulerDiscreteScheduler"), "_class_name='FlowMatchEulerDiscreteScheduler'"),
    "unknown noise schedule": (settings("scheduler", beta_schedule="laplace"), "beta_schedule='laplace'"),
    "betas that are none": (settings("scheduler", trained_betas=[0.1, 2.0]), "trained_betas"),
    "another tokenizer": (settings("tokenizer", tokenizer_class="T5Tokenizer"), "tokenizer_class='T5Tokenizer'"),
    # damage
    "size that is none": (settings("unet", sample_size="large"), r"unet/config\.json: sample_size"),
    "channels that are none": (settings("unet", in_channels="four"), r"unet/config\.json: in_channels='four'"),
    "settings that are a list": (written("unet/config.json", "[1]"), r"unet/config\.json: must hold a mapping"),
    "settings that are no JSON": (written("vae/config.json", "{"), r"vae/config\.json: not valid JSON"),
    "index that is a number": (written("model_index.json", "7"), r"model_index\.json: must hold a mapping"),
    "no index": (removed("model_index.json"), r"model_index\.json missing"),
    "no VAE": (removed("vae"), "vae missing"),
    "no settings": (removed("unet/config.json"), r"unet/config\.json: no such file"),
    "no vocabulary": (removed("tokenizer/vocab.json", "tokenizer/tokenizer.json"), "has no tokenizer"),
    "no merges": (removed("tokenizer/merges.txt", "tokenizer/tokenizer.json"), "has no tokenizer"),
    "vocabulary of another model": (written("tokenizer/vocab.json", '{"a": 5000}'), "the tokenizer has 5001 tokens"),
    "vocabulary that is none": (written("tokenizer/vocab.json", '{"a": "b"}'), "is no vocabulary"),
    "no weights": (removed("unet/diffusion_pytorch_model.safetensors"), r"unet has no diffusion_pytorch_model\.safetensors; give a whole"),
    "weights cut short": (written("vae/diffusion_pytorch_model.safetensors", "short"), r"vae/diffusion_pytorch_model\.safetensors is no whole \.safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_here_is_refused_in_one_line(backbone: Path, case: str) -> None:
    damage, told = REFUSED[case]
    damage(backbone)
    message = refusal(backbone)
    assert message.startswith(KEY) or str(backbone) in message
    assert re.search(told, message), message


def test_a_whole_backbone_passes(backbone: Path) -> None:
    check_backbone(BackboneSource(str(backbone)))
    change(
        backbone / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    (backbone / "scheduler" / "planted.py").write_text("raise SystemExit")  # nothing reads it
    check_backbone(BackboneSource(str(backbone)))


def test_known_schedulers_are_those_of_stable_diffusion() -> None:
    assert set(SCHEDULERS) == {one.name for one in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "~/nowhere", "nowhere", "a/b/c", "a\0b/c", "sd/model.safetensors"]
)
def test_a_mistyped_place_is_no_hub_id(name: str) -> None:
    assert "no such folder or file; give a local folder, a .safetensors file, or a Hub id" in refusal(
        BackboneSource(name)
    )


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(BackboneSource("nobody/nothing", revision="v7"))
    assert "its files of revision v7 are neither in the Hub's cache nor can they be downloaded" in message


def test_pickles_are_never_read(backbone: Path, tmp_path: Path) -> None:
    weights = backbone / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(backbone)
    assert "only weights that are not safetensors" in message
    assert "pipe.save_pretrained(NEW_FOLDER, safe_serialization=True)" in message
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"pickle")
    assert "only .safetensors files are read" in refusal(checkpoint)


def half_precision(folder: Path) -> None:
    """Leave a backbone's weights as files of the fp16 variant only."""
    for file in list(folder.rglob("*.safetensors")):
        weights = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(weights, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
        file.unlink()


def test_a_variant_is_read_by_its_name_only(backbone: Path) -> None:
    assert "unet has no diffusion_pytorch_model.fp16.safetensors; set train.variant=null" in refusal(
        backbone, variant="fp16"
    )
    half_precision(backbone)
    check_backbone(BackboneSource(str(backbone), variant="fp16"))
    assert "unet has no diffusion_pytorch_model.safetensors; set train.variant=fp16" in refusal(backbone)
    assert "set train.variant=fp16" in refusal(backbone, variant="bf16")


def sharded(folder: Path) -> list[str]:
    """Split the UNet's weights into two shards with an index; return the shards' names."""
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    halves = [dict(list(weights.items())[:5]), dict(list(weights.items())[5:])]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / "unet" / name, {"format": "pt"})
    named = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = {"metadata": {"total_size": 1}, "weight_map": named}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    return names


def test_shards_are_read_and_belong_to_the_digest(backbone: Path) -> None:
    source = BackboneSource(str(backbone))
    whole = load_part(source, "unet").state_dict()
    names = sharded(backbone)
    again = load_part(source, "unet").state_dict()
    assert all(whole[key].equal(again[key]) for key in whole)
    before = source.digest()
    file = backbone / "unet" / names[1]
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert source.digest() != before
    file.unlink()
    assert f"unet/{names[1]} is missing, which the index of its shards names" in refusal(source)


@pytest.mark.parametrize("name", ["../planted.safetensors", "planted.bin", "a\\b.safetensors"])
def test_an_index_names_only_safetensors_beside_it(backbone: Path, name: str) -> None:
    sharded(backbone)
    index = backbone / "unet/diffusion_pytorch_model.safetensors.index.json"
    change(index, weight_map={"conv_in.weight": name})
    assert "only safetensors are read" in refusal(backbone)


def test_the_digest_covers_exactly_what_is_read(backbone: Path, tmp_path: Path) -> None:
    source = BackboneSource(str(backbone))
    before = source.digest()
    moved = Path(shutil.copytree(backbone, tmp_path / "elsewhere"))
    assert BackboneSource(str(moved)).digest() == before
    for name in (
        "README.md",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "safety_checker.json",
    ):
        (backbone / name).write_text("not read")
        assert source.digest() == before, name
    read = [
        "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    ]  # fmt: skip
    for name in read:
        file = backbone / name
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert source.digest() != before, name
        file.write_bytes(content)
    assert source.digest() == before
    assert BackboneSource(str(backbone), variant="fp16").digest() != before
    other = BackboneSource(str(backbone), tokenizer_name=str(backbone / "tokenizer"))
    assert other.inputs().keys() == {"backbone", "tokenizer"}
    assert BackboneSource("org/name").inputs() == {"backbone": "org/name@main"}
    assert BackboneSource("org/name", "v1", "fp16").inputs() == {"backbone": "org/name@v1 fp16"}


@pytest.mark.parametrize(("part", "lost"), [("unet", "conv_in.weight"), ("vae", "decoder.conv_out.bias")])
def test_weights_that_are_missing_are_not_drawn_at_random(backbone: Path, part: str, lost: str) -> None:
    file = next((backbone / part).glob("*.safetensors"))
    weights = load_file(file)
    save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(
        MaskLoomError, match=rf"{part}: its weights are not those .*1 missing or unknown, such as {lost}"
    ):
        load_part(BackboneSource(str(backbone)), part)
    save_file({**weights, "unknown.weight": weights[lost].clone()}, file, {"format": "pt"})
    with pytest.raises(MaskLoomError, match="such as unknown"):
        load_part(BackboneSource(str(backbone)), part)


def test_a_text_encoder_that_lacks_weights(backbone: Path) -> None:
    file = backbone / "text_encoder/model.safetensors"
    weights = load_file(file)
    lost = next(key for key in weights if key.endswith("final_layer_norm.weight"))
    save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(MaskLoomError, match=r"text_encoder: its weights are not those .*final_layer_norm"):
        load_part(BackboneSource(str(backbone)), "text_encoder")


def test_a_text_encoder_of_more_layers_than_its_settings_say(backbone: Path) -> None:
    """Its last layers would be left out without a word.

    The image encoder of a whole CLIP may be.
    """
    file = backbone / "text_encoder/model.safetensors"
    rest = {"vision_model.weight": torch.ones(2), "logit_scale": torch.ones(1), "text_projection.weight": torch.ones(2)}
    save_file({**load_file(file), **rest}, file, {"format": "pt"})
    load_part(BackboneSource(str(backbone)), "text_encoder")
    change(backbone / "text_encoder/config.json", num_hidden_layers=1)
    with pytest.raises(MaskLoomError, match=r"text_encoder: its weights are not those .*layers\.1"):
        load_part(BackboneSource(str(backbone)), "text_encoder")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite(backbone: Path, part: str, value: float) -> None:
    file = next((backbone / part).glob("*.safetensors"))
    weights = load_file(file)
    weights[max(weights)].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MaskLoomError, match=rf"{part}: its weights hold NaN or infinite values in torch\.float32"):
        load_part(BackboneSource(str(backbone)), part)


def test_weights_that_are_too_large_for_half_precision(backbone: Path) -> None:
    file = next((backbone / "unet").glob("*.safetensors"))
    weights = {key: value.float() for key, value in load_file(file).items()}
    weights["conv_in.bias"][0] = 1e5
    save_file(weights, file, {"format": "pt"})
    load_part(BackboneSource(str(backbone)), "unet")
    with pytest.raises(MaskLoomError, match=r"in torch\.float16 \(such as conv_in\.bias\).*train\.mixed_precision=no"):
        load_part(BackboneSource(str(backbone)), "unet", torch.float16)


def test_weights_of_another_shape(backbone: Path) -> None:
    change(backbone / "unet/config.json", layers_per_block=2)
    with pytest.raises(MaskLoomError, match="unet"):
        load_part(BackboneSource(str(backbone)), "unet")


def test_prompts_are_cut_where_the_text_encoder_ends(backbone: Path) -> None:
    change(backbone / "tokenizer/tokenizer_config.json", model_max_length=10**30)
    assert load_tokenizer(BackboneSource(str(backbone))).model_max_length == 48


def test_a_tokenizer_that_cannot_be_read(backbone: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (backbone / "tokenizer" / name).write_bytes(b"\xff\xfe")
    with pytest.raises(MaskLoomError, match=f"{KEY}=.*cannot be read as CLIPTokenizer"):
        load_tokenizer(BackboneSource(str(backbone)))


def test_a_tokenizer_without_marks_is_refused_and_a_broken_limit_rounded(backbone: Path) -> None:
    change(backbone / "tokenizer" / "tokenizer_config.json", model_max_length=10.5)
    tokenizer = load_tokenizer(BackboneSource(str(backbone)))
    assert tokenizer.model_max_length == 10
    text = load_text_settings(BackboneSource(str(backbone)))
    change(backbone / "tokenizer" / "tokenizer_config.json", pad_token=None)
    with pytest.raises(MaskLoomError, match="lacks a special token"):
        PromptEncoder.of(load_tokenizer(BackboneSource(str(backbone))), text, None)


def test_a_noise_schedule_that_the_training_cannot_read(backbone: Path) -> None:
    change(backbone / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True, beta_schedule="none")
    with pytest.raises(MaskLoomError, match="cannot be read as DDPMScheduler"):
        load_noise_schedule(BackboneSource(str(backbone)), None, False)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"conditioning_channels": 1}, "conditioning_channels=1"),
        ({"conditioning_embedding_out_channels": [16, 32, 96]}, "an embedding with factor 4, not 8 as the VAE"),
        ({"global_pool_conditions": True}, "global_pool_conditions=True"),
        ({"controlnet_conditioning_channel_order": "x"}, "controlnet_conditioning_channel_order='x'"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ({"num_class_embeds": 4}, "num_class_embeds=4"),
        ({"auto_map": {"AutoModel": "planted.Planted"}}, "auto_map"),
    ],
)
def test_a_controlnet_of_another_make_is_refused(
    backbone: Path, tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    weights = build_tiny_controlnet(backbone, tmp_path / "controlnet")
    change(weights / "config.json", **values)
    with pytest.raises(
        MaskLoomError,
        match=f"^train.controlnet_model_name_or_path=.*{re.escape(named)}.*give a ControlNet of Stable Diffusion",
    ):
        load_controlnet(str(weights))
