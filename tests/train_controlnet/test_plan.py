"""The planner's estimates against real networks, a real step on the CPU and real caches.

Among the networks is Stable Diffusion 1.5.
"""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from maskloom.models.stable_diffusion.source import ORIGINAL
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_controlnet.__main__ import main
from maskloom.train_controlnet.memory_plan.memory import LiveMemory, OnGpu
from maskloom.train_controlnet.memory_plan.networks import planned_networks
from maskloom.train_controlnet.memory_plan.phases import step_memory
from maskloom.train_controlnet.memory_plan.plan import GIB, Planner
from maskloom.train_controlnet.memory_plan.prepared import differing_from
from maskloom.train_controlnet.memory_plan.switches import cheapest_fit
from maskloom.train_controlnet.memory_plan.text import overrides, plan_text
from maskloom.train_controlnet.networks import load_networks
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task
from tests.tiny_datasets import tiny_description
from tests.train_controlnet.conftest import tiny_config, tiny_values, write_config

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True, "unet_gradient_checkpointing": True},
    "zero_convs": {"controlnet": "zero_convs", "lesion_loss_weight": 3.0},
    "shallow": {"controlnet": "shallow", "controlnet_blocks": 1},
    "decoder": {"sd_locked": False, "gradient_checkpointing": True},
    "adapters": {"controlnet": "zero_convs", "lora": ["controlnet", "unet"]},
    "adapters alone": {"controlnet": "none", "lora": ["unet", "text_encoder"], "rank": 2},
}
EXHAUSTED: dict[str, Any] = {
    "gradient_checkpointing": True,
    "unet_gradient_checkpointing": True,
    "use_8bit_adam": True,
    "mixed_precision": "fp16",
}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """Return a folder with the settings of Stable Diffusion 1.5 and no weights."""
    folder = tmp_path_factory.mktemp("sd15") / "settings"
    shutil.copytree(ORIGINAL / "sd1", folder)
    shutil.copytree(backbone / "tokenizer", folder / "tokenizer")
    return folder


def changed(config: ExperimentConfig, **train: Any) -> ExperimentConfig:
    values = TrainConfig.model_validate({**config.train.model_dump(), **train})
    return config.model_copy(update={"train": values})


def parameters(network: nn.Module) -> list[tuple[str, int, torch.dtype, bool]]:
    return [(name, p.numel(), p.dtype, p.requires_grad) for name, p in network.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_those_of_the_training(config: ExperimentConfig, kind: str) -> None:
    train = changed(config, **KINDS[kind], mixed_precision="bf16").train
    real, planned = load_networks(train, CPU).loaded(), planned_networks(train).loaded()
    assert planned.keys() == real.keys()
    for name, network in planned.items():
        assert parameters(network) == parameters(real[name])
        assert all(p.device.type == "meta" for p in network.parameters())


def tensors(task: DiffusionTask) -> Iterator[Tensor]:
    yield task.text
    for network in task.parts.loaded().values():
        yield from network.parameters()
        yield from network.buffers()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_what_a_real_one_keeps(config: ExperimentConfig, kind: str) -> None:
    """Bytes alive when the backward pass begins and at the highest moment.

    And what autograd itself says that it saves.
    """
    config = changed(config, **KINDS[kind], train_batch_size=4)
    run = Run(config.run_folder)
    task = build_task(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    batch, draws = default_collate([task.dataset[i] for i in range(4)]), Draws(0, range(4), CPU)
    weights = {tensor.data_ptr() for tensor in tensors(task)}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = list(task.losses(batch, draws))
    del held
    gc.collect()
    live = LiveMemory(tensors(task), "cpu")
    with live:
        own = {key: value.clone() for key, value in batch.items()}
        for _, loss in task.losses(own, draws):
            kept = live.live
            loss.backward()
    found = step_memory(config.train, planned_networks(config.train), (32, 32), gradients_stay=False)
    # 4 KB: the noise schedule, which a device other than the CPU gets a copy of.
    assert found.kept == pytest.approx(kept, abs=6000)
    assert found.peak == pytest.approx(live.peak, abs=6000)
    assert found.kept == pytest.approx(sum(saved.values()), rel=0.05)
    assert sum(found.activations.values()) <= found.kept
    assert found.activations.keys() == (
        {"unet", "text_encoder"} if kind == "adapters alone" else {"controlnet", "unet"}
    )


def test_gradients_of_an_earlier_micro_batch_count(config: ExperimentConfig) -> None:
    fresh, accumulated = (
        step_memory(config.train, planned_networks(config.train), (32, 32), gradients_stay=stay)
        for stay in (False, True)
    )
    gradients = Planner(config).fixed(config.train).gradients
    assert accumulated.kept == fresh.kept
    assert fresh.peak < accumulated.peak <= fresh.peak + gradients


def test_a_gpu_runs_layers_in_the_precision_of_autocast() -> None:
    with torch.device("meta"):
        trained, frozen = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)) for _ in range(2))
        image = torch.empty(1, 4, 8, 8)
        heads = torch.empty(2, 3, 5, 8, dtype=torch.float16)
    with OnGpu([trained], torch.float16):
        assert trained[0](image).dtype == torch.float16
        assert trained[1](image.half()).dtype == torch.float32
        assert frozen[0](image).dtype == torch.float32
        assert functional.scaled_dot_product_attention(heads, heads, heads).shape == (2, 3, 5, 8)
    with OnGpu([trained], torch.float32):
        assert trained[0](image).dtype == torch.float32


def test_fused_attention_keeps_no_matrix_of_tokens_against_tokens() -> None:
    with torch.device("meta"):
        query, key, value = (torch.empty(2, 4, length, 8, requires_grad=True) for length in (1000, 77, 77))
    live = LiveMemory([query, key, value])
    with live, OnGpu([], torch.float32):
        output = functional.scaled_dot_product_attention(query, key, value)
        assert live.live == output.nbytes + 4 * 2 * 4 * 1000  # and a float32 a row
        output.sum().backward()
    assert [tensor.grad.shape for tensor in (query, key, value)] == [query.shape, key.shape, value.shape]  # type: ignore[union-attr]


def test_memory_that_is_given_back_no_longer_counts() -> None:
    outside = torch.zeros(100)
    live = LiveMemory([outside], "cpu")
    with live:
        first = outside + 1
        view = first[:10]
        outside.add_(1)
        del first
        assert live.live == 400  # the view holds it
        del view
        second = torch.zeros(50)
    assert (live.live, live.peak) == (200, 400)
    del second
    assert live.live == 0


@pytest.mark.parametrize(
    ("switches", "controlnet", "unet"),
    [({}, 2.61, 1.82), ({"gradient_checkpointing": True}, 0.63, 1.82)],
)
def test_stable_diffusion_takes_what_was_measured(
    tmp_path: Path, sd15: Path, switches: dict[str, bool], controlnet: float, unet: float
) -> None:
    """512 x 512, 4 images, fp16: GiB of activations and weights as measured with diffusers' own
    script.
    """
    config = tiny_config(tmp_path, sd15, train_batch_size=4, mixed_precision="fp16", use_ema=False, **switches)
    config = config.model_copy(update={"data": config.data.model_copy(update={"image_size": (512, 512)})})
    plan = Planner(config).plan(config.train)
    counts = {name: network.trained + network.frozen for name, network in plan.fixed.networks.items()}
    assert counts == {"unet": 859_520_964, "controlnet": 361_279_120, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert plan.fixed.gradients == 4 * 361_279_120
    assert plan.fixed.optimizer == 8 * 361_279_120
    assert plan.step.activations["unet"] / GIB == pytest.approx(unet, rel=0.01)
    assert plan.step.activations["controlnet"] / GIB == pytest.approx(controlnet, abs=0.05)
    frozen = plan.fixed.all_weights - plan.fixed.networks["controlnet"].weights
    assert frozen / GIB == pytest.approx(2.0, abs=0.02)
    assert plan.cache.view_bytes == 64 * 1024
    assert plan.cache.prompt_bytes == 77 * 768 * 2


def test_eight_bit_moments_have_a_scale_a_block(config: ExperimentConfig) -> None:
    plain, eight = (Planner(config).fixed(changed(config, use_8bit_adam=on).train) for on in (False, True))
    sizes = [p.numel() for p in planned_networks(config.train).controlnet.parameters()]  # type: ignore[union-attr]
    assert plain.optimizer == 8 * sum(sizes)
    small = sum(size for size in sizes if size < 4096)
    scales = sum(8 * -(-size // 256) for size in sizes if size >= 4096)
    assert eight.optimizer == 8 * small + 2 * (sum(sizes) - small) + scales


def test_the_cache_is_as_large_as_foretold(config: ExperimentConfig) -> None:
    config = changed(config, max_train_samples=8)
    run = Run(config.run_folder)
    foretold = Planner(config).plan(config.train).cache
    build_task(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    size = 0
    for path in (run.generator / "cache").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (a file, not a dictionary)
    assert foretold.views == 8 + 6
    assert foretold.prompts == 3  # two labels, and none
    shown = plan_text(config, Planner(config).plan(config.train), {}, 1)
    assert "14 images and 3 prompts, with the empty one: " in shown
    assert foretold.total == size


def test_what_is_not_cached_takes_no_disk(config: ExperimentConfig) -> None:
    config = changed(config, cache_latents=False, controlnet="none", lora=["text_encoder"])
    plan = Planner(config).plan(config.train)
    assert plan.cache.total == 0
    assert plan.caching_peak == 0
    assert not any(network.leaves_the_gpu for network in plan.fixed.networks.values())
    assert "cache on disk: none" in plan_text(config, plan, {}, 1)


def test_changed_copies_and_kept_weights_count(config: ExperimentConfig) -> None:
    plain = Planner(config).plan(changed(config, use_ema=False).train)
    plan = Planner(config).plan(changed(config, augment={"variants": 2}, early_stopping_patience=2).train)
    assert plan.cache.views == 12 * 3 + 6
    assert plan.best_on_cpu == plan.fixed.average == plan.fixed.gradients
    assert plan.training_peak == plain.training_peak + plan.fixed.average


def test_several_gpus_keep_their_gradients(config: ExperimentConfig) -> None:
    one, two = (Planner(config, processes).plan(config.train) for processes in (1, 2))
    assert two.step.kept == one.step.kept
    assert two.training_peak > one.training_peak
    assert two.validation_peak == one.validation_peak + one.fixed.gradients
    assert "4 per step (2 per micro-batch, 1 accumulated, 2 GPUs)" in plan_text(config, two, {}, 2)


def large_images(run: Path, backbone: Path, **train: Any) -> ExperimentConfig:
    """Return a training whose activations are most of what it needs."""
    quiet = {"use_ema": False, "num_validation_images": 0, "validation_samples": 1}
    config = tiny_config(run, backbone, train_batch_size=4, **quiet, **train)
    return config.model_copy(update={"data": config.data.model_copy(update={"image_size": (128, 128)})})


def test_the_cheapest_switches_are_found_by_planning(tmp_path: Path, backbone: Path) -> None:
    config = large_images(tmp_path, backbone)
    planner, train = Planner(config), config.train
    plan = planner.plan(train)
    assert cheapest_fit(planner, train, plan.needed) == ({}, plan)
    found = cheapest_fit(planner, train, plan.needed - 1)
    assert found == (
        {"gradient_checkpointing": True},
        planner.plan(changed(config, gradient_checkpointing=True).train),
    )
    # Where only half precision is enough, what was tried before it is taken back.
    limit = planner.plan(changed(config, **{**EXHAUSTED, "mixed_precision": "no"}).train).needed - 1
    found = cheapest_fit(planner, train, limit)
    assert found is not None
    assert found[0] == {"mixed_precision": "fp16"}
    assert found[1].needed <= limit
    assert cheapest_fit(planner, train, GIB // 2) is None


def test_in_the_end_less_is_trained(tmp_path: Path, backbone: Path) -> None:
    """Each of the last switches alone: a ControlNet in part, then its adapters, then only its
    connections.
    """
    config = large_images(tmp_path, backbone, **EXHAUSTED, cache_latents=False)
    planner = Planner(config)
    found = cheapest_fit(planner, config.train, planner.plan(config.train).needed - 1)
    assert found is not None
    assert found[0] == {"cache_latents": True}
    config = changed(config, cache_latents=True, train_batch_size=1, controlnet_blocks=1)
    found = cheapest_fit(planner, config.train, planner.plan(config.train).needed - 1)
    assert found is not None
    assert found[0] == {"controlnet": "shallow"}
    config = changed(config, controlnet="shallow")
    found = cheapest_fit(planner, config.train, planner.plan(config.train).needed - 1)
    assert found is not None
    assert found[0] == {"controlnet": "zero_convs", "lora": ["controlnet"]}
    config = changed(config, controlnet="zero_convs", lora=["controlnet"])
    found = cheapest_fit(planner, config.train, planner.plan(config.train).needed - 1)
    assert found is not None
    assert found[0] == {"lora": []}


def test_smaller_micro_batches_keep_the_images_a_step(tmp_path: Path, backbone: Path) -> None:
    config = changed(large_images(tmp_path, backbone, **EXHAUSTED), train_batch_size=12, gradient_accumulation_steps=2)
    planner = Planner(config)
    found = cheapest_fit(planner, config.train, planner.plan(config.train).needed - 1)
    assert found is not None
    assert found[0] == {"train_batch_size": 6, "gradient_accumulation_steps": 4}
    assert overrides(found[0]) == "train.train_batch_size=6 train.gradient_accumulation_steps=4"
    switches = {"lora": ["unet", "controlnet"], "use_8bit_adam": True}
    assert overrides(switches) == "train.lora=[unet,controlnet] train.use_8bit_adam=true"


def test_the_command_prints_the_same_twice_and_touches_nothing(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No dataset, no run folder, no weights: settings are enough."""
    bare = tmp_path / "bare"
    shutil.copytree(backbone, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny_values(run, bare, adherence={}))
    pages = []
    for name in ("a.json", "b.json"):
        with pytest.raises(SystemExit, match="0"):
            main(["plan", "--config", str(config), "--json", str(tmp_path / name)])
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert not run.exists()
    assert "24 GB: fits, " in pages[0]
    assert "known when the dataset is prepared" in pages[0]
    assert "not counted: train.adherence" in pages[0]
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["fits_gib"]["12"]["switches"] == {}
    assert written["plan"]["cache"]["views"] is None


@pytest.mark.parametrize(
    ("changed_data", "said"),
    [
        ({"image_size": 64}, "image_size (there [32, 32], now [64, 64])"),
        ({"dataset": "busi"}, "dataset (there tiny, now busi)"),
        ({"conditioning": "both"}, "conditioning (there mask, now both)"),
    ],
)
def test_a_stale_dataset_is_left_out(
    tmp_path: Path,
    config: ExperimentConfig,
    capsys: pytest.CaptureFixture[str],
    changed_data: dict[str, Any],
    said: str,
) -> None:
    values = config.model_dump(mode="json")
    other = ExperimentConfig.model_validate({**values, "data": {**values["data"], **changed_data}})
    planner = Planner(other)
    assert planner.image_size == other.data.image_size and planner.dataset is None
    told = " ".join(capsys.readouterr().err.split())
    assert f"{config.run_folder}/dataset is stale ({said}): planned for the configuration" in told
    assert Planner(config).dataset is not None and capsys.readouterr().err == ""


def test_settings_that_a_dataset_states_are_compared(config: ExperimentConfig) -> None:
    data = config.data.model_copy(update={"options": {"mask_values": {0: "background", 1: "lesion"}}})
    mine = config.model_copy(update={"data": data})
    stated = {
        "options": {"mask_values": {"0": "background", "1": "lesion"}},
        "splits": data.splits.model_dump(),
        "resize_mode": "pad",
        "seed": config.seed,
    }
    about = tiny_description()
    assert differing_from(mine, about.model_copy(update={"preprocessing": stated})) == {}
    other = about.model_copy(update={"preprocessing": {**stated, "seed": 7, "resize_mode": "crop"}})
    assert differing_from(mine, other) == {"resize_mode": ("crop", "pad"), "seed": (7, config.seed)}


def test_a_run_that_does_not_fit_says_so(config: ExperimentConfig) -> None:
    plan = Planner(config).plan(config.train)
    text = plan_text(config, plan, {24: ({"use_8bit_adam": True}, plan), 12: None}, 1)
    assert "24 GB: fits with train.use_8bit_adam=true (needed: " in text
    assert "12 GB: does not fit, even with all switches" in text


def test_settings_that_are_not_there_are_named(config: ExperimentConfig, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match=r"nobody/nothing: its files are neither in the Hub's cache"):
        planned_networks(changed(config, pretrained_model_name_or_path="nobody/nothing").train)
    with pytest.raises(MaskLoomError, match=r"controlnet_model_name_or_path=nobody/nothing: its files are neither"):
        planned_networks(changed(config, controlnet_model_name_or_path="nobody/nothing").train)
    broken = tmp_path / "broken"
    shutil.copytree(backbone, broken)
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(
        MaskLoomError, match=r"broken/vae/config\.json: no such file; give a folder in diffusers format"
    ):
        planned_networks(changed(config, pretrained_model_name_or_path=str(broken)).train)
    shutil.copy(backbone / "vae" / "config.json", broken / "vae")
    (broken / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(MaskLoomError, match=r"broken/text_encoder/config\.json: not valid JSON"):
        planned_networks(changed(config, pretrained_model_name_or_path=str(broken)).train)


@pytest.mark.parametrize(
    ("name", "unet", "text_encoder"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964, 123_060_480),
        ("stabilityai/stable-diffusion-2-1", 865_910_724, 340_387_840),
    ],
)
def test_a_known_backbone_needs_no_network(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, name: str, unet: int, text_encoder: int
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    train = config.fine_tuning.model_copy(
        update={"pretrained_model_name_or_path": name, "variant": "fp16", "tokenizer_name": None}
    )
    networks = planned_networks(train)
    counts = [sum(p.numel() for p in one.parameters()) for one in (networks.unet, networks.text_encoder, networks.vae)]
    assert counts == [unet, text_encoder, 83_653_863]


@pytest.mark.parametrize("changes", [{"revision": "abc"}, {"pretrained_model_name_or_path": "someone/unheard-of"}])
def test_settings_of_any_other_backbone_are_read_from_the_hub(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    known = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-2-1"}
    train = config.fine_tuning.model_copy(update={**known, **changes})
    with pytest.raises(
        MaskLoomError, match=r"neither in the Hub's cache .* \(no network\); connect to the network once"
    ):
        planned_networks(train)


def test_the_plain_command_is_the_training(
    config: ExperimentConfig, tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path / "c.yaml", tiny_values(config.run_folder, backbone))
    with pytest.raises(SystemExit, match="0"):
        main(["--config", str(file), "--check"])
    assert capsys.readouterr().out == "missing\n"
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "find-lr" in capsys.readouterr().out
