"""Adapters in kohya's names load as those in diffusers'.

A training goes on from either, or says in one line why it cannot.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskloom.models.stable_diffusion.trained_parts import ADAPTER_FILE, KOHYA_FILE
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from maskloom.pipeline.hub.uploads import Target, pack
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.memory_plan.plan import Planner
from maskloom.train_controlnet.train import train_stage
from tests.train_controlnet.conftest import tiny_config
from tests.train_controlnet.test_export import assert_close, exported, prediction, states
from tests.train_controlnet.test_longer import content

BOTH = ["unet", "text_encoder"]
QUICK = {"use_ema": False, "num_validation_images": 0, "validation_samples": 1, "validation_timestep_bins": 1}
STILL = {**QUICK, "controlnet": "none", "max_train_steps": 0}
Weights = dict[str, Tensor]


@pytest.mark.parametrize("targets", [BOTH, ["unet"], ["text_encoder"]])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_a_kohya_file_loads_as_it_was_trained(
    config: ExperimentConfig, backbone: Path, targets: list[str], alpha: float | None
) -> None:
    task, folder = exported(config, controlnet="none", lora=targets, rank=3, lora_alpha=alpha)
    pipe = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
    pipe.load_lora_weights(folder / "lora", weight_name=KOHYA_FILE)
    assert set(pipe.get_list_adapters()) == set(targets)
    assert_close(prediction(pipe.unet), prediction(task.parts.unet))
    assert_close(states(pipe.text_encoder), states(task.parts.text_encoder))


def test_both_files_load_as_the_same_weights_to_the_bit(config: ExperimentConfig, backbone: Path) -> None:
    _, folder = exported(config, controlnet="none", lora=BOTH, rank=3, lora_alpha=5.0)
    loaded = []
    for name in (
        {"weight_name": KOHYA_FILE},
        {},
    ):  # diffusers' own is found without its name, though there are two files
        pipe = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
        pipe.load_lora_weights(folder / "lora", **name, adapter_name="default")
        networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        assert {(n.peft_config["default"].r, n.peft_config["default"].lora_alpha) for n in networks.values()} == {
            (3, 3)
        }
        loaded.append({f"{n}.{k}": v for n, net in networks.items() for k, v in get_peft_model_state_dict(net).items()})
    assert loaded[0].keys() == loaded[1].keys()
    assert all(torch.equal(loaded[0][key], value) for key, value in loaded[1].items())


def test_kohyas_names_are_those_of_stable_diffusion_1(config: ExperimentConfig) -> None:
    _, folder = exported(config, controlnet="none", lora=BOTH, rank=2)
    weights = load_file(folder / "lora" / KOHYA_FILE)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in weights
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight" in weights
    assert {key.split(".", 1)[1] for key in weights} == {"lora_up.weight", "lora_down.weight", "alpha"}
    assert {float(value) for key, value in weights.items() if key.endswith(".alpha")} == {2.0}
    card = (folder / "lora" / "README.md").read_text()
    assert f"`{KOHYA_FILE}`: the same adapters under kohya's names" in card
    assert "<lora:kohya_lora_weights:1>" in card


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, dataset: Path, backbone: Path) -> Path:
    """The folder of adapters of rank 4 on both networks, after a training."""
    run = tmp_path_factory.mktemp("source")
    (run / "dataset").symlink_to(dataset)
    settings = {**QUICK, "controlnet": "none", "lora": BOTH, "max_train_steps": 2, "learning_rate": 0.1}
    train_stage(tiny_config(run, backbone, **settings), force=False)
    return run / "generator" / "lora"


def test_an_upload_holds_both_files(source: Path, backbone: Path) -> None:
    run = Run(source.parents[1])
    upload = pack(run, Target("generator", "lora"), "someone/lora")
    assert {ADAPTER_FILE, KOHYA_FILE} <= upload.files.keys()


def in_peft_names(weights: Weights) -> Weights:
    """Return weights as newer scripts of diffusers name them."""
    for old, new in (
        (".lora.down.", ".lora_A."),
        (".lora.up.", ".lora_B."),
        (".lora_linear_layer.down.", ".lora_A."),
        (".lora_linear_layer.up.", ".lora_B."),
    ):
        weights = {key.replace(old, new): value for key, value in weights.items()}
    return weights


def with_alpha(weights: Weights) -> Weights:
    """Return kohya's weights with an alpha of a half of the rank, and the second matrices twice as
    large.
    """
    return {
        key: value / 2 if key.endswith(".alpha") else value * 2 if ".lora_up." in key else value
        for key, value in weights.items()
    }


FILES: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "diffusers": (ADAPTER_FILE, dict),
    "kohya": (KOHYA_FILE, dict),
    "kohya with alpha": (KOHYA_FILE, with_alpha),
    "PEFT": (ADAPTER_FILE, in_peft_names),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_a_training_starts_from_adapters_in_any_names(
    config: ExperimentConfig, backbone: Path, source: Path, tmp_path: Path, kind: str, alpha: float | None
) -> None:
    name, change = FILES[kind]
    file = tmp_path / "given.safetensors"
    save_file(change(load_file(source / name)), file)
    settings = {**STILL, "lora": BOTH, "lora_alpha": alpha, "lora_model_name_or_path": str(file)}
    train_stage(tiny_config(config.run_folder, backbone, **settings), force=False)
    found, expected = (load_file(folder / ADAPTER_FILE) for folder in (config.run_folder / "generator/lora", source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())  # factors are powers of two


def test_an_alpha_in_the_files_notes_counts(
    config: ExperimentConfig, backbone: Path, source: Path, tmp_path: Path
) -> None:
    weights = in_peft_names(load_file(source / ADAPTER_FILE))
    doubled = {key: value * 2 if "lora_B" in key else value for key, value in weights.items()}
    notes = '{"unet.r": 4, "unet.lora_alpha": 2, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}'
    (tmp_path / "given").mkdir()
    save_file(doubled, tmp_path / "given" / "given.safetensors", metadata={"lora_adapter_metadata": notes})
    settings = {**STILL, "lora": BOTH, "lora_model_name_or_path": str(tmp_path / "given")}
    train_stage(tiny_config(config.run_folder, backbone, **settings), force=False)
    found, expected = (load_file(folder / ADAPTER_FILE) for folder in (config.run_folder / "generator/lora", source))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_file_is_an_input_of_the_stage(
    config: ExperimentConfig, backbone: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given.safetensors"
    weights = load_file(source / ADAPTER_FILE)
    save_file(weights, file)
    settings = {**STILL, "lora": BOTH, "lora_model_name_or_path": str(file)}
    given = tiny_config(config.run_folder, backbone, **settings)
    train_stage(given, force=False)
    record = read_json(config.run_folder / "logs" / "train" / "stage.json", "")
    assert len(record["inputs"]["lora"]) == 64
    train_stage(given, force=False)
    assert "up to date" in capsys.readouterr().err
    save_file({key: value + 1 for key, value in weights.items()}, file)
    train_stage(given, force=False)
    assert "up to date" not in capsys.readouterr().err
    assert (
        read_json(config.run_folder / "logs" / "train" / "stage.json", "")["inputs"]["lora"] != record["inputs"]["lora"]
    )


def changed(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        name = next(name for name in weights if key in name)
        return {**weights, name: value(weights[name]).contiguous()}

    return change


def only(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if key.startswith(part)}


def without_one(weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if "layers.1.self_attn.q_proj" not in key}


def with_another(weights: Weights) -> Weights:
    layer = "unet.down_blocks.0.attentions.0.proj_in.lora"
    return {**weights, f"{layer}.down.weight": torch.zeros(4, 16), f"{layer}.up.weight": torch.zeros(16, 4)}


REFUSED: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "rank": (dict, {"rank": 8}, "unet: its adapters have rank 4, and train.rank is 8; set train.rank=4"),
    "ranks": (changed("to_q.lora.down", lambda value: value[:2]), {}, "unet: its adapters have rank 2, 4, .* give adapters of one rank"),
    "too much": (dict, {"lora": ["unet"]}, "holds adapters of the text_encoder as well; add text_encoder to train.lora"),
    "too little": (only("unet"), {}, "holds no adapters of the text_encoder; take text_encoder out of train.lora"),
    "a layer less": (without_one, {}, r"text_encoder: lacks .*layers\.1\.self_attn\.q_proj.* \(0 weights too many, 2 missing\)"),
    "a layer more": (with_another, {}, r"unet: adapts .*proj_in.*, which this training does not \(2 weights too many, 0 missing\)"),
    "shape": (changed("to_q.lora.down", lambda value: value[:, :3]), {}, r"unet: .*to_q.* has shape \[4, 3\], not \[4, 16\]: made for another backbone"),
    "NaN": (changed("to_q.lora.up", lambda value: value * float("nan")), {}, "unet: .*to_q.* holds NaN or infinite values"),
    "unknown": (lambda weights: {"transformer.x.lora_A.weight": torch.zeros(4, 4)}, {}, "cannot be read as LoRA .*'transformer.x.lora_A.weight' belongs to neither"),
    "empty": (lambda weights: {}, {}, "cannot be read as LoRA .*it is empty"),
    "DoRA": (lambda weights: {**weights, "unet.a.dora_scale": torch.zeros(1)}, {}, "cannot be read as LoRA .*DoRA"),
    "an alpha of nothing": (lambda weights: {**weights, "unet.a.alpha": torch.ones(1)}, {}, "cannot be read as LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_fit_are_refused_before_anything_is_written(
    config: ExperimentConfig, backbone: Path, source: Path, tmp_path: Path, case: str
) -> None:
    change, settings, told = REFUSED[case]
    file = tmp_path / "given.safetensors"
    save_file(change(load_file(source / ADAPTER_FILE)), file)
    values = {**STILL, "lora": BOTH, "lora_model_name_or_path": str(file), **settings}
    before = content(config.run_folder)
    with pytest.raises(MaskLoomError, match=rf"train\.lora_model_name_or_path={file}: .*{told}"):
        train_stage(tiny_config(config.run_folder, backbone, **values), force=True)
    assert content(config.run_folder) == before


def test_a_file_that_is_none_is_refused(config: ExperimentConfig, backbone: Path, tmp_path: Path) -> None:
    def refused(name: Path, told: str) -> None:
        values = {**STILL, "lora": BOTH, "lora_model_name_or_path": str(name)}
        with pytest.raises(MaskLoomError, match=told):
            train_stage(tiny_config(config.run_folder, backbone, **values), force=False)

    refused(tmp_path / "absent", "absent: no such file or folder; give a LoRA's")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, r"folder: 0 \.safetensors files and no pytorch_lora_weights\.safetensors")
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(b"not weights")
    refused(folder, r"folder: 2 \.safetensors files and no")
    refused(folder / "a.safetensors", r"a\.safetensors cannot be read as LoRA of Stable Diffusion")
    torch.save({"a": torch.zeros(1)}, folder / "weights.bin")
    refused(
        folder / "weights.bin", r"weights\.bin cannot be read as LoRA of Stable Diffusion"
    )  # no pickle is ever opened


def test_the_plan_refuses_what_the_training_would(config: ExperimentConfig, backbone: Path, source: Path) -> None:
    fitting = tiny_config(config.run_folder, backbone, **STILL, lora=BOTH, lora_model_name_or_path=str(source))
    assert Planner(fitting).plan(fitting.train).needed > 0
    other = tiny_config(config.run_folder, backbone, **STILL, lora=BOTH, rank=8, lora_model_name_or_path=str(source))
    with pytest.raises(MaskLoomError, match=r"train\.rank is 8"):
        Planner(other).plan(other.train)


def test_nothing_but_unet_and_text_encoder_starts_from_adapters(backbone: Path, tmp_path: Path) -> None:
    for lora in ([], ["controlnet"]):
        with pytest.raises(ValidationError, match=r"lora_model_name_or_path needs lora=\[unet\]"):
            tiny_config(tmp_path, backbone, controlnet="zero_convs", lora=lora, lora_model_name_or_path="x")
