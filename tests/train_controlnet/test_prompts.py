"""Prompts beyond the text encoder's limit: told before the first step, by every command.

With chunks they are read whole, and alike everywhere.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from maskloom.generate.diffusion import Sampler
from maskloom.models.stable_diffusion.trained_pipeline import load_backbone
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import Sample
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.__main__ import main
from maskloom.train_controlnet.data.latent_cache import cache_folder
from maskloom.train_controlnet.memory_plan.plan import Planner
from maskloom.train_controlnet.model_card import model_card
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task, train_stage
from maskloom.train_controlnet.validation.samples import SampleRequest, Sampling, sample_images
from tests.tiny_datasets import tiny_description, write_tiny_run
from tests.train_controlnet.conftest import tiny_config

WORDS = (
    "a long report comes to its point at its very end and reads "  # 46 letters: all that the tiny text encoder reads
)
QUICK = {"use_ema": False, "num_validation_images": 0, "validation_samples": 2, "validation_timestep_bins": 1}


@pytest.fixture(scope="module")
def long_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both classes have one text once it is cut."""

    def lengthen(sample: Sample) -> None:
        sample.text = f"{WORDS}{('disc', 'square')[sample.label or 0]}"

    run = tmp_path_factory.mktemp("long")
    write_tiny_run(run, {}, {"train": 6, "validation": 4, "test": 2}, change=lengthen)
    return run / "dataset"


@pytest.fixture
def run(tmp_path: Path, long_dataset: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "dataset").symlink_to(long_dataset)
    return folder


def task_of(run: Path, backbone: Path, **settings: Any) -> DiffusionTask:
    config = tiny_config(run, backbone, **QUICK, **settings)
    accelerator = Accelerator(cpu=True, project_dir=str(Run(run).logs("train")))
    return build_task(config, Run(run), MaskPromptDataset.open(run / "dataset"), accelerator)


def test_training_tells_before_its_first_step(run: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"controlnet": "none", "lora": ["unet"], "validation_prompt": ["x " * 50]}
    train_stage(tiny_config(run, backbone, **QUICK, max_train_steps=1, **settings), force=False)
    said = capsys.readouterr().err
    assert "train: 3 of 4 different prompts are longer than the text encoder reads" in said  # and the empty prompt
    assert "train: WARNING: 2 different prompts become only 1" in said
    assert said.index("different prompts") < said.index("training: 1 steps")


def test_plan_tells(run: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(run, backbone)
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))

    def planned(*overrides: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["plan", "--config", str(file), *overrides])
        assert not stop.value.code
        return capsys.readouterr().out

    said = planned()
    assert "prompts: 2 of 2 different prompts are longer than the text encoder reads (46 tokens" in said
    assert "prompts: none of 2 is truncated, the longest has 52 of 92 tokens" in planned("train.prompt_chunks=2")
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (words / "merges.txt").write_text("#version: 0.2\n")
    assert f"prompts: not checked ({words}: a tokenizer of 2 tokens" in planned(f"train.tokenizer_name={words}")


def test_plan_counts_the_pieces(run: Path, backbone: Path) -> None:
    planner = Planner(tiny_config(run, backbone))
    plain, chunked = (planner.plan(tiny_config(run, backbone, prompt_chunks=chunks).train) for chunks in (None, 2))
    assert chunked.cache.prompt_bytes == 2 * plain.cache.prompt_bytes
    assert chunked.training_peak > plain.training_peak


def test_caches_keep_their_name_without_pieces_and_get_another_with_them(run: Path, backbone: Path) -> None:
    names = [cache_folder(run, tiny_config(run, backbone, prompt_chunks=n), "digest").name for n in (None, 2, 3)]
    assert len(set(names)) == 3


@pytest.mark.parametrize("lora", [["unet"], ["unet", "text_encoder"]])
def test_pieces_tell_the_classes_apart_in_training(
    run: Path, backbone: Path, capsys: pytest.CaptureFixture[str], lora: list[str]
) -> None:
    numbers = torch.tensor([1, 2])
    cut = task_of(run, backbone, lora=lora).prompt_states(numbers)
    assert torch.equal(cut[0], cut[1])
    assert "WARNING" in capsys.readouterr().err
    whole = task_of(run, backbone, lora=lora, prompt_chunks=2).prompt_states(numbers)
    assert whole.shape == (2, 96, 32)
    assert not torch.equal(whole[0], whole[1])
    assert "prompts" not in capsys.readouterr().err


def test_a_training_in_pieces_runs_and_validates(run: Path, backbone: Path) -> None:
    settings = {**QUICK, "num_validation_images": 1, "max_train_steps": 1, "lora": ["text_encoder"]}
    train_stage(tiny_config(run, backbone, **settings, prompt_chunks=2), force=False)
    assert (run / "logs" / "train" / "images" / "step-000001.png").is_file()
    card = (run / "generator" / "lora" / "README.md").read_text()
    assert "2 chunks of 46 tokens" in card
    assert "prompt_embeds" in card


@torch.no_grad()
def test_training_validation_and_generation_read_a_prompt_alike(run: Path, backbone: Path) -> None:
    config = tiny_config(run, backbone, **QUICK, prompt_chunks=2)
    task = task_of(run, backbone, prompt_chunks=2)
    text = f"{WORDS}disc"
    pipe = load_backbone(config, torch.device("cpu"), {}, [(32, 32)])
    how = Sampling.of(config.generate)
    sampler = Sampler(pipe, how, tiny_description(), config.train.prompt_chunks)
    assert torch.equal(sampler.embedding(text), task.parts.text_states(task.prompt_encoder, [text]))
    plain = Sampler(pipe, how, tiny_description())
    expected = pipe.encode_prompt(text, pipe.device, 1, do_classifier_free_guidance=False)[0]
    assert torch.equal(plain.embedding(text), expected)  # without pieces: as diffusers does


def test_validation_pictures_see_the_end_of_a_prompt(run: Path, backbone: Path) -> None:
    blank = np.zeros((32, 32, 3), np.uint8)
    how = Sampling(num_inference_steps=2, guidance_scale=1.0, controlnet_conditioning_scale=1.0)
    config = tiny_config(run, backbone, **QUICK)
    differ = []
    for chunks in (None, 2):
        task = task_of(run, backbone, prompt_chunks=chunks)
        accelerator = Accelerator(cpu=True)
        one, other = (
            sample_images(task, accelerator, [SampleRequest(blank, WORDS + end)], config, how, "test")[0]
            for end in ("disc", "square")
        )
        differ.append(not np.array_equal(one, other))
    assert differ == [False, True]


@torch.no_grad()
def test_the_cards_lines_give_the_states_of_the_training(run: Path, backbone: Path) -> None:
    config = tiny_config(run, backbone, **QUICK, prompt_chunks=2)
    card = model_card(config, MaskPromptDataset.open(run / "dataset"), None)
    code = card.split("```python\n")[1].split("image = pipe")[0]
    lines: dict[str, Any] = {"pipe": StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)}
    exec(code, lines)
    text = f"{WORDS}disc"
    task = task_of(run, backbone, prompt_chunks=2)
    assert torch.equal(lines["prompt_embeds"](text), task.parts.text_states(task.prompt_encoder, [text]))
    for plain in (
        model_card(tiny_config(run, backbone), MaskPromptDataset.open(run / "dataset"), None),
        model_card(config, MaskPromptDataset.open(run / "dataset"), None, "vae"),
    ):
        assert "prompt_embeds" not in plain
