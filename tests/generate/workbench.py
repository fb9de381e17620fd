"""A run folder with a tiny dataset, a backbone and all that can be trained on it: everything that
`generate` reads.

Generator architectures of `train_baselines` are trained there for a few steps, whichever there are,
with the options of their `configs/tiny/NAME.yaml`.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextModel

from maskloom.generate.generate import generate
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.files.ownership import seal_folder
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import open_run
from maskloom.train_baselines.train import PACKAGE, train_baselines
from tests.pipeline.line_task import forget_accelerator
from tests.processes import FORKS
from tests.records import record_outputs
from tests.tiny_datasets import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]
SIDE = 32
COUNTS = {"train": 7, "validation": 2, "test": 2}  # four discs and three squares to train on
ARCHITECTURES = plugin_names(PACKAGE)
ARCHITECTURE_STEPS = 3  # images are noise then, but not constant
PLAIN = ["train.lora=[]", "train.vae_decoder=null"]
"""Overrides after which the ControlNet is all that was trained."""


class Bench:
    """One experiment in a folder of its own: a ControlNet, adapters and a VAE's decoder have been
    trained.
    """

    def __init__(self, folder: Path, models: Path, **dataset: Any) -> None:
        """Lay a tiny dataset and trained weights into `folder/run`.

        Args:
            folder: of the experiment.
            models: holds `backbone` and `controlnet`; `lora` and `vae` are built beside them once.
            dataset: changes to `write_tiny_run`.
        """
        self.folder, self.models, self.backbone = folder, models, models / "backbone"
        self.run = Run(folder / "run")
        write_tiny_run(self.run.folder, {}, **{"counts": COUNTS, "size": SIDE, **dataset})
        if not (models / "vae").is_dir():
            build_tiny_lora(self.backbone, models / "lora")
            build_tiny_vae(self.backbone, models / "vae")
        for part in ("controlnet", "lora", "vae"):
            shutil.copytree(models / part, self.run.generator / part)
        self.record_training()

    def record_training(self) -> None:
        """Leave the record of a training that wrote the weights as they are now."""
        parts = [path for path in sorted(self.run.generator.iterdir()) if path.is_dir()]
        for part in parts:
            seal_folder(part)
        record_outputs(self.run, "train", parts)

    def train_architecture(self, name: str) -> None:
        """Train an architecture of `train_baselines` on the bench's dataset.

        Weights for a dataset seen before are taken from then.
        """
        kept = self.models / f"{name} {read_contract(self.run.dataset).digest}"
        if not kept.is_dir():
            train_baselines(self.config(generators={name: {}}), force=False)
            forget_accelerator()
            shutil.copytree(self.run.baselines / name / "weights", kept)
        weights = self.run.baselines / name / "weights"
        if not weights.is_dir():
            shutil.copytree(kept, weights)
            record_outputs(self.run, f"baselines/{name}", [weights])

    def config_file(self, **generate: Any) -> Path:
        """Write a configuration with changes to the section `generate` and return its path.

        Architectures among its generators are in the section `baselines` too.
        """
        values = {
            "experiment": "tiny",
            "run_dir": str(self.run.folder),
            "seed": 7,
            "data": {"dataset": "tiny", "image_size": SIDE},
            "train": {
                "pretrained_model_name_or_path": str(self.backbone),
                "lora": ["unet", "text_encoder"],
                "vae_decoder": {},
            },
            "baselines": {
                name: architecture_options(name) for name in generate.get("generators", {}) if name in ARCHITECTURES
            },
            "generate": {"num_images": 6, "num_inference_steps": 2, "batch_size": 2, "rows_per_shard": 3, **generate},
        }
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def config(self, overrides: Sequence[str] = (), **generate: Any) -> ExperimentConfig:
        """Return the configuration itself, and open its run."""
        config = load_experiment(self.config_file(**generate), list(overrides))
        open_run(config)
        return config


def architecture_options(name: str) -> dict[str, Any]:
    """Return the options of an architecture's tiny configuration, for a few steps at the bench's
    size; lengths in samples are those of its own training.
    """
    tiny = load_experiment(ROOT / f"configs/tiny/{name}.yaml", []).baselines[name]
    found = {key: value for key, value in tiny.items() if not key.endswith("_samples")}
    found.pop("growth_samples", None)  # a few steps are not enough to grow in
    epochs = {f"{kind}_epochs": None for kind in ("num_train", "logging", "validation", "checkpointing")}
    return {
        **found,
        **epochs,
        "image_size": SIDE,
        "train_batch_size": 4,
        "max_train_steps": ARCHITECTURE_STEPS,
        "report_to": None,
    }


def build_tiny_lora(backbone: Path, folder: Path, seed: int = 0) -> Path:
    """Write adapters on the attention of a tiny backbone's UNet and text encoder.

    Trained ones change every image.
    """
    unet = UNet2DConditionModel.from_pretrained(backbone, subfolder="unet", local_files_only=True)
    text_encoder = CLIPTextModel.from_pretrained(backbone, subfolder="text_encoder", local_files_only=True)
    adapters = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, network, layers in (
            ("unet", unet, ["to_q", "to_v"]),
            ("text_encoder", text_encoder, ["q_proj", "v_proj"]),
        ):
            network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False))
            weights = get_peft_model_state_dict(network, save_embedding_layers=False)
            # LoRA files have a level of names that transformers 5 dropped.
            level = "text_model." if name == "text_encoder" and not hasattr(network, "text_model") else ""
            named = {level + key: value for key, value in weights.items()}
            adapters[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(named)
    StableDiffusionPipeline.save_lora_weights(folder, **adapters)
    return folder


def build_tiny_vae(backbone: Path, folder: Path, seed: int = 0) -> Path:
    """Write the VAE of a tiny backbone with another last layer of the decoder, as fine-tuning
    leaves one.
    """
    vae = AutoencoderKL.from_pretrained(backbone, subfolder="vae", local_files_only=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        vae.decoder.conv_out.weight += 0.1 * torch.randn_like(vae.decoder.conv_out.weight)
    vae.save_pretrained(folder)
    return folder


def run_command(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout."""
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def start_stage(config: Path, rank: int = 0, of: int = 1, port: int = 0) -> BaseProcess:
    """Start the stage in a process of its own.

    With `of` > 1 it is one of the ranks of `accelerate launch`.
    """
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of, "MASTER_PORT": port}
    environment = {key: str(value) for key, value in launched.items()} if of > 1 else {}
    process = FORKS.Process(target=_run_stage, args=(config, {"MASTER_ADDR": "127.0.0.1", **environment}))
    process.start()
    return process


def _run_stage(config: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    generate(load_experiment(config, []), force=False)


def content(folder: Path) -> dict[str, str]:
    """Return the hash of every data file of a synthetic dataset by path."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".parquet", ".jsonl", ".md") and p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
