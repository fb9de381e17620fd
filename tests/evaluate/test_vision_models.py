"""Vision models of `transformers` as feature extractors: tiny ones with random weights, from a folder."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.metrics import cmmd
from maskloom.evaluate.questions import Question, check_question, open_question
from maskloom.evaluate.scores.extractors import huggingface
from maskloom.evaluate.scores.features import (
    ExtractorOptions,
    batch_features,
    check_extractor,
    extractor_digests,
    load_extractor,
)
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from tests.evaluate.runs import answer, faithful, noise, tiny_config, tiny_inputs
from tests.tiny_datasets import write_tiny_run

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
KINDS: dict[str, tuple[Any, Any, int]] = {
    "vit": (transformers.ViTModel, lambda: transformers.ViTConfig(**TINY), 16),
    "dinov2": (
        transformers.Dinov2Model,
        lambda: transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=8
        ),
        16,
    ),
    "clip_vision": (transformers.CLIPVisionModel, lambda: transformers.CLIPVisionConfig(**TINY), 16),
    "clip": (
        transformers.CLIPModel,
        lambda: transformers.CLIPConfig(vision_config=TINY, text_config=TEXT, projection_dim=12),
        12,
    ),
    "siglip_vision": (transformers.SiglipVisionModel, lambda: transformers.SiglipVisionConfig(**TINY), 16),
    "siglip": (
        transformers.SiglipModel,
        lambda: transformers.SiglipConfig(vision_config=TINY, text_config={**TEXT, "projection_size": 16}),
        16,
    ),
    "resnet": (
        transformers.ResNetModel,
        lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        16,
    ),
}
PROCESSOR = {
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "do_normalize": True,
}
COMMIT = "0123456789abcdef" * 2 + "01234567"


def saved(folder: Path, kind: str, **processor: Any) -> Any:
    """Save a tiny model with random weights and its image processor, and return the model."""
    network, config, _ = KINDS[kind]
    torch.manual_seed(0)
    model = network(config()).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return model


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    saved(tmp_path / "vit", "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path / kind, kind)
    found = huggingface.of_model(f"{tmp_path}/{kind}")
    assert (found.name, found.INPUT_SIZE) == (kind, 32)
    extractor = found.load(32, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    features = batch_features(extractor, [list(images)], "cpu")
    assert features.shape == (2, KINDS[kind][2])
    scaled = (images / 255 - PROCESSOR["image_mean"]) / PROCESSOR["image_std"]
    pixels = torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.inference_mode():
        if hasattr(model, "get_image_features"):
            expected = model.get_image_features(pixel_values=pixels)
            expected = getattr(expected, "pooler_output", expected)
        else:
            expected = model(pixel_values=pixels).pooler_output.flatten(1)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
    assert extractor.digest == found.digest()
    assert len(extractor.digest) == 64
    assert extractor.maps is not None
    maps = extractor.maps(pixels)
    assert len(maps) == 2
    assert all(len(one) == 2 and one.shape[1] in (8, 16) and one.ndim in (3, 4) for one in maps)


def test_normalisation_is_that_of_the_image_processor(tmp_path: Path) -> None:
    """The processor of `transformers` gives the pixels; images already have its size."""
    model = saved(tmp_path / "clip", "clip_vision")
    processor = transformers.CLIPImageProcessor(
        size={"height": 32, "width": 32},
        do_center_crop=False,
        image_mean=[0.48, 0.46, 0.41],
        image_std=[0.27, 0.26, 0.28],
    )
    processor.save_pretrained(tmp_path / "clip")
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = torch.as_tensor(np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"]))
    with torch.inference_mode():
        expected = model(pixel_values=pixels).pooler_output
    extractor = huggingface.of_model(f"{tmp_path}/clip").load(32, "cpu")
    np.testing.assert_allclose(batch_features(extractor, [[image]], "cpu"), expected.numpy(), atol=1e-5)


def test_without_a_pooling_layer_the_class_token_counts(tmp_path: Path) -> None:
    """A classifier's checkpoint has none; transformers would make a random one."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).eval()
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    found = [
        batch_features(huggingface.of_model(f"{tmp_path}/vit").load(32, "cpu"), [list(images)], "cpu") for _ in "ab"
    ]
    np.testing.assert_array_equal(*found)
    scaled = (images / 255 - PROCESSOR["image_mean"]) / PROCESSOR["image_std"]
    with torch.inference_mode():
        tokens = model.vit(torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32)).last_hidden_state
    np.testing.assert_allclose(found[0], tokens[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"size": 48}, 48),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}, 64),
        ({"size": {"shortest_edge": 40}}, 40),
    ],
)
def test_the_input_size_is_the_processors(tmp_path: Path, settings: dict[str, Any], side: int) -> None:
    saved(tmp_path / "m", "resnet", **settings)
    assert side == huggingface.of_model(f"{tmp_path}/m").INPUT_SIZE


def test_settings_of_newer_processors_and_of_timm_are_read(vit: Path) -> None:
    (vit / "preprocessor_config.json").rename(vit / "processor_config.json")
    (vit / "processor_config.json").write_text(json.dumps({"image_processor": {**PROCESSOR, "do_normalize": False}}))
    found = huggingface.of_model(str(vit))
    assert (found.INPUT_SIZE, found.mean, found.deviation) == (32, (0, 0, 0), (1, 1, 1))
    about = {"architecture": "vit", "pretrained_cfg": {"input_size": [3, 48, 48], "mean": [0.1] * 3, "std": [0.2] * 3}}
    (vit / "config.json").write_text(json.dumps(about))
    found = huggingface.of_model(str(vit))
    assert (found.INPUT_SIZE, found.mean, found.deviation) == (48, (0.1,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 32, "width": 48}},
        {"size": None},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_mean": ["a", "b", "c"]},
    ],
)
def test_a_processor_of_other_images_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    saved(tmp_path / "m", "resnet", **settings)
    with pytest.raises(MaskLoomError, match="use a model of RGB images"):
        huggingface.of_model(f"{tmp_path}/m")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_missing_settings_are_named(vit: Path, name: str) -> None:
    (vit / name).unlink()
    with pytest.raises(MaskLoomError, match=name):
        huggingface.of_model(str(vit))


def test_pickles_are_never_opened(vit: Path) -> None:
    (vit / "model.safetensors").unlink()
    (vit / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(MaskLoomError, match=r"no model\.safetensors; pickles"):
        check_extractor(ExtractorOptions(extractor=str(vit)))


def test_code_of_the_model_is_never_run(vit: Path, tmp_path: Path) -> None:
    about = json.loads((vit / "config.json").read_text())
    about |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (vit / "config.json").write_text(json.dumps(about))
    (vit / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(MaskLoomError, match="cannot be read by transformers"):
        huggingface.of_model(str(vit)).load(32, "cpu")
    assert not (tmp_path / "ran").exists()


def test_incomplete_weights_are_refused(vit: Path) -> None:
    weights = load_file(vit / "model.safetensors")
    dropped = sorted(name for name in weights if name.startswith("encoder") or "layer" in name)[0]
    del weights[dropped]
    save_file(weights, vit / "model.safetensors", {"format": "pt"})
    with pytest.raises(MaskLoomError, match="are missing; download the model again"):
        huggingface.of_model(str(vit)).load(32, "cpu")


def test_a_model_that_takes_no_image_of_its_size_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "vit", "vit", size={"height": 40, "width": 40})
    with pytest.raises(MaskLoomError, match="gives no features of an image of 40 x 40"):
        huggingface.of_model(f"{tmp_path}/vit").load(40, "cpu")


def test_another_side_than_the_models_is_refused(vit: Path) -> None:
    with pytest.raises(MaskLoomError, match="extractor_size=64: the extractor vit takes 32 only"):
        check_question("cmmd", {"extractor": str(vit), "extractor_size": 64})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huggingface", "names no model"),
        ("./nowhere", "no such folder"),
        ("owner/model", "give the commit"),
        ("owner/model@main", "give the commit"),
        ("a/b/c", "no such folder"),
    ],
)
def test_a_name_that_is_no_model_says_what_to_write(name: str, message: str) -> None:
    with pytest.raises(MaskLoomError, match=message):
        check_extractor(ExtractorOptions(extractor=name))


def test_a_model_of_the_hub_is_read_at_its_commit(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def downloaded(*arguments: Any) -> Path:
        asked.append(arguments)
        return vit

    monkeypatch.setattr(huggingface, "hub_files", downloaded)
    found = huggingface.of_model(f"owner/model@{COMMIT}")
    assert asked == [("owner/model", COMMIT, huggingface.SETTINGS, "extractor")]
    assert found.name == "owner/model@01234567"
    extractor = found.load(32, "cpu")
    assert asked[1][:2] == ("owner/model", COMMIT)
    assert set(asked[1][2]) == {*huggingface.SETTINGS, *huggingface.WEIGHTS}
    assert extractor.name == found.name
    assert extractor.digest == found.digest() != huggingface.of_model(f"owner/model@{COMMIT[::-1]}").digest()


def test_a_changed_model_is_another_input(vit: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, {})
    question = open_question("cmmd", {"extractor": str(vit)})
    before = question.own_inputs(Run(tmp_path), config)
    assert before == extractor_digests(question.options)  # type: ignore[arg-type]
    assert list(before) == ["extractor vit"]
    shutil.rmtree(vit)
    model = saved(vit, "vit")
    assert question.own_inputs(Run(tmp_path), config) == before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(vit)
    assert question.own_inputs(Run(tmp_path), config) != before
    assert Question("cmmd", cmmd, cmmd.Options()).own_inputs(Run(tmp_path), config) == {}


def test_a_metric_names_the_model(vit: Path, tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "run", {"faithful": faithful, "noise": noise}, {"train": 10, "test": 8})
    inputs = tiny_inputs(tmp_path / "run", ("faithful", "noise"))
    result = answer(inputs, "cmmd", extractor=str(vit))
    assert result.tables[0].title == "CMMD to real test images at equal N, vit"
    assert result.values["extractor"]["digest"] == load_extractor(inputs, ExtractorOptions(extractor=str(vit))).digest
    assert str(tmp_path) not in json.dumps(result.as_json())


def test_a_record_names_no_folder_of_this_machine(vit: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_tiny_run(run, {"faithful": faithful}, {"train": 10, "test": 8})
    evaluate(tiny_config(run, {"cmmd": {"extractor": str(vit)}}, ("faithful",)), force=False)
    written = (run / "evaluation/cmmd.json").read_text()
    assert json.loads(written)["options"]["extractor"] == "…/vit"
    assert str(tmp_path) not in written


def test_models_of_timm_are_read_where_it_is_installed(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0).eval()
    about = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {"img_size": 32, "patch_size": 8},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pixels = torch.tensor((images / 255 - 0.5) / 0.25, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = model(pixels).numpy()
    extractor = huggingface.of_model(str(tmp_path)).load(32, "cpu")
    np.testing.assert_allclose(batch_features(extractor, [list(images)], "cpu"), expected, atol=1e-5)


def test_models_of_timm_name_the_package_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3}}
    about["pretrained_cfg"]["std"] = [0.25] * 3  # type: ignore[index]
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MaskLoomError, match=r"extractor=.* needs timm: pip install timm"):
        huggingface.of_model(str(tmp_path)).check(32)
