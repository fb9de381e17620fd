import json
import shutil
import socket
import sys
import time
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from maskloom.generate.generate import generate, open_generator, open_generators, settings_of_other_sections
from maskloom.generate.pixels import checked_pixels
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, read_contract
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json, write_json
from tests.generate.conftest import MakeBench
from tests.generate.workbench import Bench, content, run_command, start_stage
from tests.tiny_backbone import build_tiny_controlnet
from tests.tiny_datasets import Sample, tiny_description

PAIRED = ["mask", "conditioning_image", "text", "label", "group_id", "attributes", "parent_id", "seed"]


def rows_of(bench: Bench, name: str) -> list[dict]:
    files = sorted((bench.run.synthetic / name / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def made_now(bench: Bench) -> dict[str, int]:
    results = read_json(bench.run.logs("generate") / "stage.json", "")["results"]
    return {name: result["made_now"] for name, result in results.items()}


def test_every_generator_gets_the_same_rows_and_makes_other_images(bench: Bench):
    generate(bench.config(), force=False)
    for name in ("controlnet", "text_only"):
        contract = verify_fully(bench.run.synthetic / name).contract
        assert contract.description.origin == "synthetic"
        assert contract.description.preprocessing["generation"]["uses_mask"] == (name == "controlnet")
        assert contract.splits["train"].rows == 6
    with_control, without = rows_of(bench, "controlnet"), rows_of(bench, "text_only")
    for one, other in zip(with_control, without, strict=True):
        assert {key: one[key] for key in PAIRED} == {key: other[key] for key in PAIRED}
        assert one["image"] != other["image"]
        assert one["parent_id"].startswith("train-")
    assert [row["sample_id"] for row in with_control] == [f"controlnet-{i:06d}" for i in range(6)]
    assert sorted(row["label"] for row in with_control) == [0, 0, 0, 1, 1, 1]


def test_a_set_of_the_users_is_in_the_way_before_any_is_made(bench: Bench):
    bench.run.mark()
    (bench.run.synthetic / "text_only").mkdir(parents=True)
    (bench.run.synthetic / "text_only" / "mine").write_text("mine")
    with pytest.raises(MaskLoomError, match=r"text_only: holds files that MaskLoom did not write \(mine\)"):
        generate(bench.config(), force=False)
    assert sorted(path.name for path in bench.run.synthetic.iterdir()) == ["text_only"]


def test_masks_of_source_train_are_the_parents_and_warped_ones_are_not(bench: Bench):
    generate(bench.config(generators={"text_only": {}}), force=False)
    real = {row["sample_id"]: row for row in pq.read_table(bench.run.dataset / "data").to_pylist()}
    same = [row["mask"] == real[row["parent_id"]]["mask"] for row in rows_of(bench, "text_only")]
    assert sum(same) == 4  # of three rows a class, two are of the first source


def test_the_output_opens_as_a_hugging_face_dataset(bench: Bench):
    generate(bench.config(generators={"text_only": {}}), force=False)
    split = load_dataset(str(bench.run.synthetic / "text_only"))["train"]
    assert split.features["label"].names == ["disc", "square"]
    assert split[0]["image"].size == (32, 32)


def test_a_finished_stage_is_skipped_and_force_makes_the_same_again(bench: Bench, capsys: pytest.CaptureFixture[str]):
    config = bench.config()
    generate(config, force=False)
    before = content(bench.run.synthetic)
    capsys.readouterr()
    generate(config, force=False)
    assert "generate: up to date" in capsys.readouterr().err
    generate(config, force=True)
    assert made_now(bench)["controlnet"] == 6
    assert content(bench.run.synthetic) == before


def test_a_lost_shard_is_made_again_with_the_same_bytes(bench: Bench):
    config = bench.config()
    generate(config, force=False)
    before = content(bench.run.synthetic)
    (bench.run.synthetic / "controlnet/data/train-00001-of-00002.parquet").unlink()
    (bench.run.synthetic / "controlnet" / CONTRACT_FILE).unlink()
    generate(config, force=False)
    assert made_now(bench)["controlnet"] == 3
    assert content(bench.run.synthetic) == before


def test_new_weights_make_new_images_of_that_generator_only(bench: Bench):
    generate(bench.config(), force=False)
    before = content(bench.run.synthetic)
    build_tiny_controlnet(bench.backbone, bench.run.generator / "controlnet", seed=1)
    bench.record_training()
    generate(bench.config(), force=False)
    changed = {path for path, digest in content(bench.run.synthetic).items() if before[path] != digest}
    assert {path.split("/")[0] for path in changed} == {"controlnet"}
    assert {path for path in before if path.startswith("controlnet/data/")} <= changed
    assert made_now(bench) == {"controlnet": 6, "text_only": 0}
    verify_fully(bench.run.synthetic / "controlnet")


@pytest.mark.parametrize(
    "override",
    [
        "seed=8",
        "generate.num_inference_steps=3",
        "generate.guidance_scale=2",
        "generate.generators.controlnet.negative_prompt=disc",
        "train.rescale_betas_zero_snr=true",
    ],
)
def test_whatever_images_depend_on_makes_them_anew(bench: Bench, override: str):
    settings = {"generators": {"controlnet": {}}, "num_images": 2}
    generate(bench.config(**settings), force=False)
    before = content(bench.run.synthetic)
    generate(bench.config([override], **settings), force=False)
    assert made_now(bench) == {"controlnet": 2}
    after = content(bench.run.synthetic)
    assert all(after[path] != before[path] for path in after if "/data/" in path)


@pytest.mark.parametrize(
    "override",
    ["seed=8", "train.prediction_type=v_prediction", "train.rescale_betas_zero_snr=true", "train.variant=fp16"],
)
def test_settings_of_the_training_that_images_depend_on_make_them_anew(bench: Bench, override: str):
    known = settings_of_other_sections(bench.config())
    assert settings_of_other_sections(bench.config([override])) != known
    assert settings_of_other_sections(bench.config()) == known


def test_without_a_backbone_images_depend_on_the_seed_anew(bench: Bench):
    configs = [bench.config([f"seed={seed}"]).model_copy(update={"train": None}) for seed in (7, 8)]
    assert settings_of_other_sections(configs[0]) != settings_of_other_sections(configs[1])


def test_a_generator_without_its_backbone_is_named(bench: Bench):
    config = bench.config(generators={"text_only": {}, "pix2pix": {}}).model_copy(update={"train": None})
    assert open_generator(config, bench.run, "pix2pix").uses_mask
    with pytest.raises(
        MaskLoomError,
        match=r"^generate\.generators\.text_only: the configuration has no section `train`, .* "
        r"remove this generator with generate\.generators\.text_only=false$",
    ):
        open_generator(config, bench.run, "text_only")


def test_another_version_and_another_dataset_make_images_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    config = bench.config(generators={"text_only": {}}, num_images=2)
    generate(config, force=False)
    for module in ("maskloom.generate.generate", "maskloom.pipeline.runs.stage"):
        monkeypatch.setattr(f"{module}.__version__", "another")
    generate(config, force=False)
    assert made_now(bench) == {"text_only": 2}
    contract = json.loads((bench.run.dataset / CONTRACT_FILE).read_text())
    contract["description"]["citation"] = "another"
    write_json(bench.run.dataset / CONTRACT_FILE, contract)
    (bench.run.logs("generate") / "stage.json").unlink()
    generate(config, force=False)
    assert made_now(bench) == {"text_only": 2}


def test_what_a_generator_finds_wrong_is_told_before_an_older_set_is_touched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    generate(bench.config(generators={"text_only": {}}), force=False)
    before = content(bench.run.synthetic)

    def wrong(self: Any) -> None:
        raise MaskLoomError("a setting does not suit the weights")

    monkeypatch.setattr("maskloom.generate.generators.text_only.Generator.check", wrong)
    with pytest.raises(MaskLoomError, match="does not suit the weights"):
        generate(bench.config(["seed=8"], generators={"text_only": {}}), force=False)
    assert content(bench.run.synthetic) == before


def test_colour_datasets_get_colour_images(make_bench: MakeBench):
    def colour(sample: Sample) -> None:
        sample.image = np.repeat(sample.image[..., None], 3, axis=2)

    bench = make_bench(description=tiny_description(channels=3), change=colour)
    generate(bench.config(), force=False)
    verify_fully(bench.run.synthetic / "controlnet")


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("mode", ["edges", "foreground"])
def test_what_is_drawn_from_the_image_is_drawn_from_the_warped_one(make_bench: MakeBench, mode: str, with_masks: bool):
    def without_mask(sample: Sample) -> None:
        if not with_masks:
            sample.mask = None

    about = tiny_description().model_copy(update={"conditioning": mode})
    bench = make_bench(description=about, change=without_mask)
    generate(bench.config(mask_source=["warped"]), force=False)
    verify_fully(bench.run.synthetic / "controlnet")
    rows = rows_of(bench, "controlnet")
    assert all((row["mask"] is not None) == with_masks for row in rows)
    assert len({row["conditioning_image"]["bytes"] for row in rows}) == len(rows)
    if mode == "foreground" and with_masks:  # the tiny images are bright where their mask is, and dim elsewhere
        for row in rows:
            mask, seen = png_array(row["mask"]["bytes"]), png_array(row["conditioning_image"]["bytes"])
            assert ((seen[..., 0] > 0) == (mask > 0)).mean() > 0.97


@pytest.mark.parametrize("with_masks", [True, False])
def test_a_paired_picture_is_the_condition_and_is_warped_with_its_mask(make_bench: MakeBench, with_masks: bool):
    """The paired picture shows the mask in two greys, so that it tells whether it went the mask's
    way.
    """

    def pair(sample: Sample) -> None:
        assert isinstance(sample.mask, np.ndarray)
        sample.conditioning_image = np.repeat((40 + 160 * sample.mask)[..., None], 3, axis=2).astype(np.uint8)
        sample.mask = sample.mask if with_masks else None

    about = tiny_description().model_copy(update={"conditioning": "image"})
    bench = make_bench(description=about, change=pair)
    generate(bench.config(mask_source=["train", "warped"], generators={"controlnet": {}}), force=False)
    verify_fully(bench.run.synthetic / "controlnet")
    before = content(bench.run.synthetic)
    real = {row["sample_id"]: row for row in pq.read_table(bench.run.dataset / "data").to_pylist()}
    rows = rows_of(bench, "controlnet")
    same = [row["conditioning_image"] == real[row["parent_id"]]["conditioning_image"] for row in rows]
    assert sum(same) == 4  # of three rows a class, two are of the first source
    for row in rows:
        seen = png_array(row["conditioning_image"]["bytes"])
        assert seen.shape == (32, 32, 3)
        assert seen.min() >= 40
        if with_masks:
            mask = png_array(row["mask"]["bytes"])
            assert ((seen[..., 0] > 120) == (mask > 0)).mean() > 0.97
    generate(bench.config(mask_source=["train", "warped"], generators={"controlnet": {}}), force=True)
    assert content(bench.run.synthetic) == before


def test_masks_that_cannot_be_warped_are_replaced_and_listed(make_bench: MakeBench):
    def huge_disc(sample: Sample) -> None:
        if sample.label == 0 and sample.sample_id != "train-0000":
            sample.mask = np.ones((32, 32), np.uint8)
            sample.mask[0] = 0  # fills the picture but for the upper row: every turn runs into that border

    bench = make_bench(change=huge_disc)
    warp = {"attempts": 2, "rotation_degrees": 45, "scale": [1.0, 1.1], "translation": 0.0}
    generate(bench.config(mask_source=["warped"], warp=warp), force=False)
    ledger = (bench.run.synthetic / "controlnet/rejected.jsonl").read_text().splitlines()
    assert ledger
    assert "no valid warp in 2 attempts" in json.loads(ledger[0])["reason"]
    rows = rows_of(bench, "controlnet")
    assert sorted(row["label"] for row in rows) == [0, 0, 0, 1, 1, 1]
    assert {row["parent_id"] for row in rows if row["label"] == 0} == {"train-0000"}
    assert verify_fully(bench.run.synthetic / "controlnet").contract.rejected == len(ledger)


def test_limits_that_no_mask_meets_are_an_error_that_names_them(bench: Bench):
    config = bench.config(mask_source=["warped"], warp={"scale": [0.2, 0.3], "attempts": 1})
    with pytest.raises(
        MaskLoomError, match=r"no mask like 'train-.*loosen generate\.warp or set generate\.mask_source"
    ):
        generate(config, force=False)
    assert not (bench.run.synthetic / "controlnet" / CONTRACT_FILE).exists()


def test_a_synthetic_dataset_is_refused_as_the_source(make_bench: MakeBench):
    bench = make_bench(description=tiny_description(origin="synthetic"))
    with pytest.raises(MaskLoomError, match="a synthetic dataset; masks must come from a real one"):
        generate(bench.config(), force=False)


def test_a_dataset_edited_by_hand_is_refused(bench: Bench):
    (bench.run.dataset / "README.md").write_text("edited")
    with pytest.raises(MaskLoomError, match=r"README\.md: its SHA-256 differs"):
        generate(bench.config(), force=False)


def test_a_synthetic_row_of_a_test_mask_does_not_pass_verification(bench: Bench):
    generate(bench.config(generators={"text_only": {}}), force=False)
    contract = bench.run.dataset / CONTRACT_FILE
    values = json.loads(contract.read_text())
    train = next(file for file in values["files"] if "train" in file)
    (bench.run.dataset / train).rename(bench.run.dataset / train.replace("train", "test"))
    values["files"][train.replace("train", "test")] = values["files"].pop(train)
    write_json(contract, values)
    synthetic = bench.run.synthetic / "text_only" / CONTRACT_FILE
    changed = json.loads(synthetic.read_text())
    changed["parent"]["digest"] = read_contract(bench.run.dataset).digest
    write_json(synthetic, changed)
    with pytest.raises(MaskLoomError, match="lies in the test split"):
        verify_fully(bench.run.synthetic / "text_only")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generators": {}}, "generate.generators is empty"),
        ({"generators": {"control_net": {}}}, "unknown generator 'control_net': did you mean 'controlnet'"),
        (
            {"generators": {"text_only": {"negativ_prompt": "x"}}},
            "generate.generators.text_only: unknown key 'negativ_prompt'",
        ),
    ],
)
def test_wrong_generators(bench: Bench, changes: dict, message: str):
    with pytest.raises(MaskLoomError, match=message):
        open_generators(bench.config(**changes), bench.run)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "holds NaN or infinite values"), (0.5, "every pixel of the image is 128")]
)
def test_broken_images_are_errors_that_name_sample_and_seed(value: float, message: str):
    with pytest.raises(MaskLoomError, match=rf"controlnet-000003 \(seed 42\): .*{message}"):
        checked_pixels(np.full((4, 4), value, np.float32), "controlnet-000003", 42)


def test_pixels_are_rounded_and_clipped():
    np.testing.assert_array_equal(checked_pixels(np.array([[-0.1, 0.5, 1.1]], np.float32), "a", 0), [[0, 128, 255]])


def test_mistakes_on_the_command_line_are_one_line(bench: Bench):
    (bench.run.generator / "controlnet" / "config.json").unlink()
    done = run_command([sys.executable, "-m", "generate", "--config", str(bench.config_file())])
    assert done.returncode == 2
    assert "controlnet/config.json: missing: damaged since train wrote it; run train again" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_finished_stage_is_skipped_without_importing_torch(bench: Bench):
    generate(bench.config(), force=False)
    script = (
        "import sys; from pathlib import Path; from maskloom.generate.generate import generate;"
        "from maskloom.pipeline.config.loading import load_experiment;"
        "generate(load_experiment(Path(sys.argv[1]), []), False); print('torch' in sys.modules)"
    )
    done = run_command([sys.executable, "-c", script, str(bench.config_file())])
    assert "up to date" in done.stderr
    assert done.stdout.strip() == "False"


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(bench: Bench):
    config = bench.config_file(num_images=24, num_inference_steps=4)
    generate(load_experiment(config, []), force=False)
    expected = content(bench.run.synthetic)
    bench.run.synthetic.rename(bench.folder / "expected")
    for shards in (0, 1, 5, 12):
        process = start_stage(config)
        while len(list(bench.run.synthetic.glob("*/data/train-*.parquet"))) < shards and process.is_alive():
            time.sleep(0.002)
        time.sleep(0.05)
        process.kill()
        process.join()
    last = start_stage(config)
    last.join()
    assert last.exitcode == 0
    assert content(bench.run.synthetic) == expected
    verify_fully(bench.run.synthetic / "text_only")


def test_two_processes_write_what_one_writes(bench: Bench):
    config = bench.config_file(num_images=12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [start_stage(config, rank, 2, port) for rank in range(2)]
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0, 0]
    results = read_json(bench.run.logs("generate") / "stage.json", "")["results"]
    assert results["controlnet"]["processes"] == 2
    expected = content(bench.run.synthetic)
    generate(load_experiment(config, []), force=True)
    assert content(bench.run.synthetic) == expected


def test_a_backbone_where_images_are_written_is_refused(bench: Bench):
    config = bench.config(generators={"text_only": {}})
    backbone = bench.run.synthetic / "text_only"
    shutil.copytree(bench.backbone, backbone)
    moved = config.fine_tuning.model_copy(update={"pretrained_model_name_or_path": str(backbone)})
    with pytest.raises(
        MaskLoomError, match=r"train\.pretrained_model_name_or_path=.*: lies in .*synthetic, which is written"
    ):
        generate(config.model_copy(update={"train": moved}), force=True)
    assert (backbone / "model_index.json").is_file()
