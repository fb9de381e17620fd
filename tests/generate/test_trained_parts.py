"""What training left takes part in generation: which weights, which noise schedule, and what an
ablation takes away.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionControlNetPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from maskloom.generate.generate import generate, open_generators
from maskloom.generate.generator import Condition, ImageGenerator
from maskloom.models.stable_diffusion.sampling import sampling_scheduler
from maskloom.models.stable_diffusion.trained_parts import ADAPTER_FILE
from maskloom.models.stable_diffusion.trained_pipeline import load_backbone, trained_parts
from maskloom.pipeline.config.generate import DEFAULT_GENERATORS, SchedulerName
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from tests.generate.conftest import MakeBench
from tests.generate.workbench import PLAIN, Bench
from tests.tiny_backbone import build_tiny_backbone
from tests.tiny_datasets import Sample, tiny_description

CPU = torch.device("cpu")
ALL = ("controlnet", "unet", "lora", "vae")
TUNED_UNET = ["train.lora=[text_encoder]", "train.sd_locked=false"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = [(32, 32)]
SCHEDULERS = get_args(SchedulerName)


@pytest.fixture
def bench_with_unet(bench: Bench) -> Bench:
    """A run whose UNet was trained, and adapters of the text encoder alone."""
    build_tiny_backbone(bench.folder / "other", seed=1)
    shutil.copytree(bench.folder / "other" / "unet", bench.run.generator / "unet")
    file = bench.run.generator / "lora" / ADAPTER_FILE
    save_file({key: value for key, value in load_file(file).items() if key.startswith("text_encoder.")}, file)
    bench.record_training()
    return bench


def opened(bench: Bench, name: str, overrides: list[str] | None = None, **options: object) -> ImageGenerator:
    return open_generators(bench.config(overrides or [], generators={name: options}), bench.run)[name]


def loaded(bench: Bench, name: str, overrides: list[str] | None = None, **options: object) -> ImageGenerator:
    generator = opened(bench, name, overrides, **options)
    generator.load(CPU, tiny_description())
    return generator


def condition(brightness: int = 200, text: str = "a disc", seed: int = 3) -> Condition:
    return Condition(text, None, np.full((32, 32, 3), brightness, np.uint8), 0, seed)


def same_weights(module: torch.nn.Module, file: Path) -> bool:
    expected = load_file(file)
    return all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_controlnet_uses_all_that_was_trained_and_text_only_none_of_it(bench_with_unet: Bench):
    bench = bench_with_unet
    tuned = loaded(bench, "controlnet", TUNED_UNET).sampler.pipe
    for part in ("controlnet", "unet", "vae"):
        assert same_weights(getattr(tuned, part), bench.run.generator / part / WEIGHTS)
    plain = loaded(bench, "text_only", TUNED_UNET).sampler.pipe
    for part in ("unet", "vae"):
        assert same_weights(getattr(plain, part), bench.backbone / part / WEIGHTS)
    encoder = bench.backbone / "text_encoder/model.safetensors"
    assert same_weights(plain.text_encoder, encoder)
    assert not same_weights(tuned.text_encoder, encoder)


def test_adapters_give_the_images_that_diffusers_gives_with_them(bench: Bench):
    generator = loaded(bench, "controlnet", ["train.vae_decoder=null"])
    pipe = load_backbone(bench.config(PLAIN), CPU, trained_parts(bench.config(PLAIN), bench.run, ALL), SIZES)
    without = replace_pipe(generator, pipe).images([condition()])
    pipe.load_lora_weights(bench.run.generator / "lora", weight_name=ADAPTER_FILE)
    beside = replace_pipe(generator, pipe).images([condition()])
    np.testing.assert_allclose(
        loaded(bench, "controlnet", ["train.vae_decoder=null"]).images([condition()]), beside, atol=1e-5
    )
    assert abs(beside - without).max() > 0.01


def replace_pipe(generator: ImageGenerator, pipe: StableDiffusionControlNetPipeline) -> ImageGenerator:
    """Let a generator sample from another pipeline, whose prompts it has not embedded yet."""
    generator.sampler = type(generator.sampler)(pipe, generator.sampler.how, tiny_description())
    return generator


def test_adapters_leave_no_layers_behind(bench: Bench):
    pipe = loaded(bench, "lora").sampler.pipe
    names = {key for part in (pipe.unet, pipe.text_encoder) for key in part.state_dict()}
    assert not [name for name in names if "lora" in name]
    assert set(pipe.unet.state_dict()) == set(load_file(bench.backbone / "unet" / WEIGHTS))


def test_lora_takes_adapters_or_a_trained_unet_and_the_vae(bench_with_unet: Bench):
    bench = bench_with_unet
    adapters = loaded(bench, "lora", ["train.lora=[text_encoder]"]).images([condition()])
    unet = loaded(bench, "lora", ["train.lora=[]", "train.sd_locked=false"]).images([condition()])
    no_vae = loaded(bench, "lora", ["train.lora=[text_encoder]", "train.vae_decoder=null"]).images([condition()])
    plain = loaded(bench, "text_only").images([condition()])
    pictures = [adapters, unet, no_vae, plain]
    assert all(abs(a - b).max() > 1e-3 for i, a in enumerate(pictures) for b in pictures[:i])


def test_text_only_fine_tuning_generates_without_a_controlnet(bench: Bench):
    shutil.rmtree(bench.run.generator / "controlnet")
    config = bench.config(["train.controlnet=none"], generators={"lora": {}, "text_only": {}})
    generate(config, force=False)
    about = verify_fully(bench.run.synthetic / "lora").description
    assert about.preprocessing["generation"]["uses_mask"] is False


def test_controlnet_without_a_controlnet_names_what_to_use(bench: Bench):
    with pytest.raises(MaskLoomError, match=r"train\.controlnet=none trains without a ControlNet; set ") as error:
        generate(bench.config(["train.controlnet=none"]), force=False)
    assert_advice_leaves_out("controlnet", bench, ["train.controlnet=none"], str(error.value))


def assert_advice_leaves_out(name: str, bench: Bench, overrides: list[str], message: str) -> None:
    """Check that the overrides that an error advises work, whether or not a file names generators
    already.
    """
    advice = re.findall(r"generate\.generators\.\w+=\S+", message)
    files = [{"generators": {name: {}}}, {"generators": {name: {}, "pix2pix": {}}}]
    for values in [*files, *([{}] if name in DEFAULT_GENERATORS else [])]:
        config = bench.config([*overrides, *advice], **values)
        assert name not in config.generate.generators
        opened = open_generators(config, bench.run).items()
        assert all(one.digest for kind, one in opened if kind != "pix2pix")
        assert set(config.generate.generators) - {"pix2pix"}


def test_lora_where_neither_unet_nor_text_encoder_was_trained(bench: Bench):
    with pytest.raises(MaskLoomError, match=r"generators\.lora: .*set train\.lora=\[unet\] and train again") as error:
        _ = opened(bench, "lora", ["train.lora=[]"]).digest
    assert_advice_leaves_out("lora", bench, ["train.lora=[]"], str(error.value))


@pytest.mark.parametrize("part", ["controlnet", "unet", "lora", "vae"])
def test_the_digest_is_of_every_part_and_a_missing_part_is_named(bench_with_unet: Bench, part: str):
    bench = bench_with_unet
    before, plain = opened(bench, "controlnet", TUNED_UNET).digest, opened(bench, "text_only", TUNED_UNET).digest
    file = bench.run.generator / part / (ADAPTER_FILE if part == "lora" else WEIGHTS)
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    with pytest.raises(
        MaskLoomError, match=rf"generator/{part}/{file.name}: changed since it was written: .*run train again"
    ):
        _ = opened(bench, "controlnet", TUNED_UNET).digest
    bench.record_training()
    assert opened(bench, "controlnet", TUNED_UNET).digest != before
    assert opened(bench, "text_only", TUNED_UNET).digest == plain
    file.unlink()
    with pytest.raises(MaskLoomError, match=rf"generator/{part}/{file.name}: missing: .*run train again"):
        _ = opened(bench, "controlnet", TUNED_UNET).digest


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("controlnet", "ControlNetModel"),
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
        ("lora", "LoRA of this"),
    ],
)
def test_damaged_parts_are_named(bench_with_unet: Bench, part: str, kind: str):
    folder = bench_with_unet.run.generator / part
    (folder / (ADAPTER_FILE if part == "lora" else WEIGHTS)).write_bytes(b"short")
    with pytest.raises(MaskLoomError, match=rf"{folder}: cannot be read as {kind}.* run train again with --force"):
        loaded(bench_with_unet, "controlnet", TUNED_UNET)


def test_adapters_of_another_backbone_are_named(bench: Bench):
    file = bench.run.generator / "lora" / ADAPTER_FILE
    save_file(
        {
            key: value.repeat(1, 2) if "lora_A" in key or "down" in key else value
            for key, value in load_file(file).items()
        },
        file,
    )
    with pytest.raises(MaskLoomError, match=r"generator/lora: cannot be read as LoRA of this backbone"):
        loaded(bench, "lora")


def test_empty_conditioning_shows_a_black_image(bench: Bench):
    ablation, full = loaded(bench, "controlnet", empty_conditioning=True), loaded(bench, "controlnet")
    bright, black = condition(200), condition(0)
    np.testing.assert_array_equal(ablation.images([bright]), full.images([black]))
    assert abs(full.images([bright]) - full.images([black])).max() > 1e-4
    assert (ablation.uses_mask, full.uses_mask) == (False, True)


def test_empty_prompt_shows_no_words(bench: Bench):
    ablation, full = loaded(bench, "controlnet", empty_prompt=True), loaded(bench, "controlnet")
    np.testing.assert_array_equal(ablation.images([condition()]), full.images([condition(text="")]))
    assert abs(full.images([condition()]) - full.images([condition(text="")])).max() > 1e-3
    assert ablation.uses_mask


def test_an_ablation_keeps_masks_and_prompts_and_says_what_it_is(bench: Bench):
    generate(bench.config(generators={"controlnet": {}, "text_only": {}}), force=False)
    rows = content_of(bench.run)
    generate(bench.config(generators={"controlnet": {"empty_conditioning": True}, "text_only": {}}), force=False)
    about = verify_fully(bench.run.synthetic / "controlnet").description.preprocessing["generation"]
    assert about["options"]["empty_conditioning"] is True
    assert about["uses_mask"] is False
    for before, after in zip(rows, content_of(bench.run), strict=True):
        assert before["image"] != after["image"]
        assert (before["mask"], before["text"], before["seed"]) == (after["mask"], after["text"], after["seed"])


def content_of(run: Run) -> list[dict]:
    import pyarrow.parquet as pq

    files = sorted((run.synthetic / "controlnet" / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_images_need_not_be_square(make_bench: MakeBench, size: tuple[int, int]):
    def grow(sample: Sample) -> None:
        pad = [(0, side - 32) for side in size]
        sample.image, sample.mask = np.pad(sample.image, pad, mode="reflect"), np.pad(sample.mask, pad)
        sample.conditioning_image = np.pad(sample.conditioning_image, [*pad, (0, 0)])

    bench = make_bench(description=tiny_description().model_copy(update={"image_size": size}), change=grow)
    generate(bench.config(generators={"controlnet": {}, "lora": {}}, num_images=2), force=False)
    for name in ("controlnet", "lora"):
        assert verify_fully(bench.run.synthetic / name).description.image_size == size


def test_rows_of_several_sizes_are_made_in_batches_of_one(make_bench: MakeBench):
    def grow_squares(sample: Sample) -> None:
        if sample.label == 1:
            sample.image, sample.mask = np.pad(sample.image, (0, 8), mode="reflect"), np.pad(sample.mask, (0, 8))
            sample.conditioning_image = np.pad(sample.conditioning_image, [(0, 8), (0, 8), (0, 0)])

    bench = make_bench(change=grow_squares)
    generate(bench.config(generators={"controlnet": {}}, num_images=4, batch_size=4), force=False)
    rows = content_of(bench.run)
    sizes = [png_array(row["image"]["bytes"]).shape for row in rows]
    assert sorted(set(sizes)) == [(32, 32), (40, 40)]
    assert sizes == [png_array(row["mask"]["bytes"]).shape for row in rows]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_zero_terminal_snr_starts_where_training_ended(bench: Bench, kind: str):
    overrides = ["train.rescale_betas_zero_snr=true", "train.prediction_type=v_prediction"]
    config = bench.config(overrides, scheduler=kind)
    scheduler = sampling_scheduler(
        DDPMScheduler(beta_schedule="scaled_linear").config, config.generate, config.train, trained=True
    )
    scheduler.set_timesteps(5)
    assert int(scheduler.timesteps[0]) == 999
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    generator = loaded(bench, "controlnet", overrides)
    assert np.isfinite(generator.images([condition()])).all()


def test_the_plain_backbone_keeps_its_own_schedule(bench: Bench):
    overrides = ["train.rescale_betas_zero_snr=true", "train.prediction_type=v_prediction"]
    scheduler = loaded(bench, "text_only", overrides).sampler.pipe.scheduler
    assert scheduler.config.prediction_type == "epsilon"
    assert not scheduler.config.rescale_betas_zero_snr
    tuned = loaded(bench, "lora", overrides).sampler.pipe.scheduler
    assert tuned.config.prediction_type == "v_prediction"
    assert tuned.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("overrides", [["train.lora=[]"], ["train.lora=[text_encoder]"]])
def test_a_prediction_type_set_for_a_frozen_unet_corrects_the_backbone(bench: Bench, overrides: list[str]):
    generator = loaded(bench, "text_only", [*overrides, "train.prediction_type=v_prediction"])
    assert generator.sampler.pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),  # not the noise where no signal is left: the configuration refuses it
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_network_that_knows_the_image_leads_to_it(bench: Bench, kind: str, prediction: str, zero_snr: bool):
    """Whatever it is asked for: noise, velocity or image, on the schedule that training used."""
    overrides = [f"train.prediction_type={prediction}", f"train.rescale_betas_zero_snr={zero_snr}"]
    config = bench.config(overrides, scheduler=kind)
    backbone = DDPMScheduler.from_pretrained(bench.backbone, subfolder="scheduler")
    scheduler = sampling_scheduler(backbone.config, config.generate, config.train, trained=True)
    noised = DDPMScheduler.from_config(backbone.config, rescale_betas_zero_snr=zero_snr)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    image, state = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for timestep in scheduler.timesteps:
        signal = noised.alphas_cumprod[timestep] ** 0.5
        spread = (1 - noised.alphas_cumprod[timestep]) ** 0.5
        noise = (state - signal * image) / spread
        output = {"epsilon": noise, "sample": image, "v_prediction": signal * noise - spread * image}[prediction]
        state = scheduler.step(output, timestep, state).prev_sample
    torch.testing.assert_close(state, image, atol=0.05, rtol=0)


def test_the_trained_unet_is_read_in_the_precision_of_generation(bench_with_unet: Bench):
    config = bench_with_unet.config(TUNED_UNET, mixed_precision="bf16")
    pipe = load_backbone(config, CPU, trained_parts(config, bench_with_unet.run, ALL), SIZES)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.controlnet.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert isinstance(pipe.unet, UNet2DConditionModel)


def test_seeds_and_prompts_still_tell_images_apart(bench: Bench):
    generator = loaded(bench, "lora")
    base = generator.images([condition()])
    assert abs(base - generator.images([replace(condition(), seed=4)])).max() > 0.01
    assert abs(base - generator.images([condition(text="square")])).max() > 1e-4
