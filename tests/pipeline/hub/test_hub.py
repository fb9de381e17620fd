"""Pushing to the Hub: the real client against a Hub on the loopback interface
(tests/hub_server.py).
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.contract import Contract, Parent, read_contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.licence import OPEN_LICENCE, licence_metadata
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import content_digest, file_digest, read_json, write_json
from maskloom.pipeline.files.private_paths import ABSOLUTE_PATH
from maskloom.pipeline.hub.cards import hub_base_model
from maskloom.pipeline.hub.client import Hub, PushOptions
from maskloom.pipeline.hub.push import push
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.model_card import model_card
from tests.hub_server import TOKEN, USER, HubState, Repo, running_hub, sha256
from tests.pipeline import fake_run
from tests.records import write_record

ROOT = Path(__file__).parents[3]
BACKBONE = "stable-diffusion-v1-5/stable-diffusion-v1-5@main"
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEPT = (WEIGHTS, "pytorch_lora_weights.safetensors", "config.json", "samples.png", "README.md")
MODEL = f"{USER}/fake-controlnet"
DATASET = f"{USER}/fake-dataset"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
    """Return an empty Hub that the client in this process talks to, signed in."""
    with running_hub() as state:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", state.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", state.endpoint)  # of the module's functions
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # as by default: a push switches Xet off
        huggingface_hub.close_session()
        yield state
        assert state.leaks == []
    huggingface_hub.close_session()


@dataclass
class World:
    """A finished run and its configuration file."""

    folder: Path
    path: Path
    config: ExperimentConfig
    run: Run
    real: Contract

    @property
    def weights(self) -> Path:
        return self.run.generator / "controlnet"

    def record_weights(self) -> None:
        """Have the training's record list what lies there now."""
        kept = [
            path
            for folder in ("controlnet", "lora")
            for path in (self.run.generator / folder).glob("*")
            if path.name in KEPT
        ]
        files = {path.relative_to(self.run.folder).as_posix(): content_digest(path) for path in kept}
        write_record(self.run, "train", files=files)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Write a run with a trained ControlNet (of a few numbers), and much that must stay at home."""
    return make_world(tmp_path)


def make_world(folder: Path, backbone: str = BACKBONE, **description: object) -> World:
    path = fake_run.write_config(folder, train={"pretrained_model_name_or_path": BACKBONE.split("@")[0]})
    config = load_experiment(path, [])
    run = Run(config.run_folder)
    real = fake_run.write_real(run, **description)
    fake_run.write_records(run, ("train",))
    write_record(run, "train", inputs={"backbone": backbone, "dataset": real.digest})
    weights = run.generator / "controlnet"
    weights.mkdir(parents=True)
    save_file({"w": np.arange(50_000, dtype=np.float32)}, weights / WEIGHTS, metadata={"format": "pt"})
    write_json(weights / "config.json", {"_class_name": "ControlNetModel", "_name_or_path": "/home/me/sd15"})
    Image.fromarray(np.zeros((8, 24), dtype=np.uint8)).save(weights / "samples.png")
    (weights / "README.md").write_text(
        model_card(config, MaskPromptDataset(run.dataset, real), weights / "samples.png"), encoding="utf-8"
    )
    for stays in ("checkpoint-3/optimizer.bin", "cache/moments.safetensors", "controlnet/optimizer.bin"):
        (run.generator / stays).parent.mkdir(parents=True, exist_ok=True)
        (run.generator / stays).write_bytes(b"stays here")
    for stays in (f".{WEIGHTS}.123.tmp", "notes.txt", "scheduler.bin", "other.safetensors"):
        (weights / stays).write_bytes(b"stays here")
    world = World(folder, path, config, run, real)
    world.record_weights()
    return world


@dataclass
class Ended:
    """How a push ended; its texts hold no token."""

    code: int
    out: str
    err: str


@pytest.fixture
def pushed(world: World, capsys: pytest.CaptureFixture[str]):
    """Return a function that pushes as the command line does."""

    def run(*words: str, **options: object) -> Ended:
        return push_told(world, capsys, *words, **options)

    return run


def push_told(world: World, capsys: pytest.CaptureFixture[str], *words: str, **options: object) -> Ended:
    code = 0
    try:
        run_command(lambda: push(world.config, words, PushOptions(**options)))
    except SystemExit as end:
        code = int(end.code or 0)
    texts = capsys.readouterr()
    assert_no_token(world.folder, texts.out, texts.err)
    return Ended(code, texts.out, texts.err)


def assert_no_token(folder: Path, *texts: str) -> None:
    assert not [text for text in texts if TOKEN in text or "secret-of-the-upload" in text]
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def error_of(ended: Ended) -> str:
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in ended.err
    return lines[-1].removeprefix("error: ")


def test_the_weights_go_to_a_private_repository_and_nothing_else_does(hub, world, pushed):
    ended = pushed()
    assert ended.code == 0
    assert ended.out == f"{hub.endpoint}/{MODEL}\n"
    assert "licence of the data: CC0-1.0" in ended.err
    assert hub.repos["models", MODEL].private
    files = hub.model(MODEL)
    assert sorted(files) == ["README.md", "config.json", WEIGHTS, "samples.png"]
    assert files[WEIGHTS] == (world.weights / WEIGHTS).read_bytes()
    assert json.loads(files["config.json"]) == {"_class_name": "ControlNetModel"}
    assert list(hub.repos) == [("models", MODEL)]
    assert hub.repos["models", MODEL].commits == ["Push generator:controlnet (MaskLoom 0.1.0)"]


def test_a_dataset_goes_without_its_ledger_and_loads_from_a_copy(hub, world, pushed, tmp_path):
    ended = pushed("dataset")
    assert ended.code == 0
    assert ended.out == f"{hub.endpoint}/datasets/{DATASET}\n"
    assert "sample_id 'test-0', group_id 'group-test-0'" in ended.err
    files = hub.dataset(DATASET)
    assert set(files) == {"contract.json", *world.real.files} - {"rejected.jsonl"}
    copy = Path(snapshot_download(DATASET, repo_type="dataset", cache_dir=tmp_path / "hub", endpoint=hub.endpoint))
    assert {path: (copy / path).read_bytes() for path in files} == files
    assert {path: file_digest(copy / path) for path in world.real.files if path in files} == {
        path: digest for path, digest in world.real.files.items() if path in files
    }
    assert read_contract(copy).digest == world.real.digest
    rows = datasets.load_dataset(str(copy), cache_dir=str(tmp_path / "cache"))
    assert {split: len(part) for split, part in rows.items()} == fake_run.ROWS
    assert rows["train"][0]["image"].size == (fake_run.SIDE, fake_run.SIDE)
    assert rows["train"].features["label"].names == list(fake_run.LABELS)


def test_a_synthetic_dataset_goes_with_its_contract(hub, world, pushed):
    fake_run.write_synthetic(world.run, "controlnet", world.real)
    assert pushed("synthetic:controlnet").code == 0
    files = hub.dataset(f"{USER}/fake-synthetic-controlnet")
    assert json.loads(files["contract.json"])["parent"] == {"path": "../../dataset", "digest": world.real.digest}


def test_what_the_hub_has_is_not_sent_again(hub, world, pushed):
    pushed("dataset", "generator")
    uploads, commits = len(hub.uploads), hub.count("POST", "/commit/")
    assert commits == 2
    ended = pushed("dataset", "generator")
    assert ended.err.count("up to date") == 2
    assert (len(hub.uploads), hub.count("POST", "/commit/")) == (uploads, commits)


def test_only_changed_files_go_and_replaced_ones_are_removed(hub, world, pushed):
    pushed()
    before = len(hub.uploads)
    old = f"diffusion_pytorch_model-00002-of-00002.{WEIGHTS.split('.')[1]}"
    hub.model(MODEL).update({old: b"old", "mine.safetensors": b"kept", ".gitattributes": b"kept"})
    save_file({"w": np.ones(9, dtype=np.float32)}, world.weights / WEIGHTS)
    world.record_weights()
    listed = pushed(dry_run=True).out.splitlines()
    assert listed[0] == f"generator:controlnet -> {MODEL} (model, private): would change"
    states = {line.split()[-1]: line.split()[0] for line in listed[1:]}
    assert states == {
        "README.md": "changed",  # it holds the weights' SHA-256
        WEIGHTS: "changed",
        "config.json": "unchanged",
        "samples.png": "unchanged",
        old: "removed",
    }
    pushed()
    assert hub.uploads[before:] == [file_digest(world.weights / WEIGHTS)]
    assert set(hub.model(MODEL)) == {"README.md", "config.json", WEIGHTS, "samples.png"} | {
        "mine.safetensors",
        ".gitattributes",
    }


def test_shards_of_an_older_dataset_are_removed(hub, world, pushed):
    pushed("dataset")
    hub.dataset(DATASET).update({"data/train-00000-of-00009.parquet": b"old", "data/mine.csv": b"kept"})
    pushed("dataset")
    assert "data/train-00000-of-00009.parquet" not in hub.dataset(DATASET)
    assert hub.dataset(DATASET)["data/mine.csv"] == b"kept"


def test_a_branch_is_made_and_main_stays(hub, world, pushed):
    assert pushed(revision="v2").out == f"{hub.endpoint}/{MODEL}/tree/v2\n"
    branches = hub.repos["models", MODEL].branches
    assert branches["main"] == {}
    assert WEIGHTS in branches["v2"]
    assert "up to date" in pushed(revision="v2").err
    assert f"{MODEL} (model, private): would change" in pushed(revision="v3", dry_run=True).out
    assert "v3" not in branches


@pytest.mark.parametrize(("given", "repo_id"), [("mine", f"{USER}/mine"), (f"{USER}/other", f"{USER}/other")])
def test_the_repository_can_be_named(hub, world, pushed, given, repo_id):
    pushed(repo_id=given)
    assert list(hub.repos) == [("models", repo_id)]
    assert hub.count("GET", "whoami") == (given == "mine")


def test_public_is_public_only_when_asked_for(hub, world, pushed):
    pushed(public=True)
    assert not hub.repos["models", MODEL].private
    assert error_of(pushed()) == (
        f"{MODEL}: the repository is public; push with --public, make it private on its settings page, or choose another --repo-id"
    )
    hub.repos["models", MODEL].private = True
    assert "is private and stays so" in pushed(public=True).err


def test_nothing_is_sent_where_private_is_not_to_be_had(hub, world, pushed):
    hub.always_public = True
    told = error_of(pushed())
    assert told == f"{MODEL}: {hub.endpoint} made it public although private was asked for; nothing was sent"
    assert hub.uploads == []
    assert hub.model(MODEL) == {}


@pytest.mark.parametrize(
    ("licence", "is_open"),
    [
        ("CC0", True),
        ("CC-BY-4.0", True),
        ("CC0-1.0 (simulated by this project)", True),
        ("CC-BY-NC-SA-4.0", False),
        ("CC-BY-ND-4.0", False),
        ("research use under an agreement with its owner, who is asked for it; no open licence", False),
        ("not stated (the user's own data)", False),
        ("CC-BY-4.0 (2021, The Cancer Imaging Archive); the other releases: data usage agreement", False),
        ("that of each image in the ISIC Archive (CC0, CC-BY or CC-BY-NC)", False),
    ],
)
def test_open_licences(licence, is_open):
    assert bool(OPEN_LICENCE.fullmatch(licence)) == is_open


@pytest.mark.parametrize("what", ["dataset", "generator"])
def test_publishing_under_another_licence_takes_the_users_word(hub, tmp_path, capsys, what):
    world = make_world(tmp_path, licence="CC-BY-NC-4.0")
    told = error_of(push_told(world, capsys, what, public=True))
    assert "does not plainly let everyone pass it on: 'CC-BY-NC-4.0'; push without --public, or add --i-have" in told
    assert hub.count("POST", "") == 0
    private = push_told(world, capsys, what)
    assert "licence of the data: CC-BY-NC-4.0" in private.err
    assert "who may see the private repository must be allowed to have the data" in private.err
    hub.repos.clear()
    assert push_told(world, capsys, what, public=True, may_publish=True).code == 0
    assert not next(iter(hub.repos.values())).private


def test_the_licences_of_external_test_sets_count(hub, tmp_path, capsys):
    about = {"external": {"udiat": {"licence": "by agreement", "citation": "", "homepage": ""}}}
    world = make_world(tmp_path, preprocessing=about)
    assert "'by agreement'" in error_of(push_told(world, capsys, "dataset", public=True))
    assert "licence of the data: CC0-1.0; by agreement" in push_told(world, capsys, "dataset").err


def test_a_dry_run_sends_nothing(hub, world, pushed):
    ended = pushed("dataset", dry_run=True)
    assert ended.code == 0
    assert f"dataset -> {DATASET} (dataset, private): would create\n" in ended.out
    assert {line.split()[0] for line in ended.out.splitlines()[1:]} == {"new"}
    assert hub.repos == {}
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_needs_no_network_and_no_token(hub, world, pushed, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = pushed(dry_run=True)
    assert offline.code == 0
    assert "NAMESPACE/fake-controlnet (model, private): not compared: " in offline.out
    assert "the Hub is not asked while HF_HUB_OFFLINE is set; unset it" in offline.out
    assert f"would send  200.1 kB  {WEIGHTS}" in offline.out
    monkeypatch.delenv("HF_TOKEN")
    assert "not compared: no token (`hf auth login`)" in pushed(dry_run=True).out
    assert hub.requests == []


@pytest.mark.parametrize(
    ("fault", "answer", "told"),
    [
        (
            ("GET", "/api/models"),
            (401, "Bad ECHO"),
            r"answers 401 \(Bad Bearer <token>\); it does not take the token: run `hf auth login`",
        ),
        (("GET", "/api/whoami-v2"), (401, "Invalid"), "your account: .* answers 401.*it does not take the token"),
        (
            ("POST", "/api/repos/create"),
            (403, "No ECHO"),
            r"answers 403 \(No Bearer <token>\); the token may not write",
        ),
        (("GET", "/api/models"), (500, "Oops ECHO"), r"answers 500 \(Oops Bearer <token>\); run the same command"),
        (("PUT", "/lfs/objects"), (403, "expired ECHO"), "answers 403 .*the token may not write there"),
        (("POST", f"/api/models/{MODEL}/commit"), (409, "moved"), r"answers 409 \(moved\).*changed at the same time"),
        (("POST", f"/api/models/{MODEL}/commit"), (429, "slow"), "answers 429.*too many requests: wait"),
        (("GET", "/api/models"), "cut", "no answer from http://127.0.0.1:.*run the same command again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_secrets(hub, world, pushed, fault, answer, told):
    hub.faults[fault] = answer
    assert re.search(told, error_of(pushed()))


def test_a_refused_commit_leaves_the_uploads_for_the_next_run(hub, world, pushed):
    fault = ("POST", f"/api/models/{MODEL}/commit")
    hub.faults[fault] = (503, "busy")
    assert "answers 503 (busy)" in error_of(pushed())
    assert hub.model(MODEL) == {}
    arrived = sorted(hub.uploads)
    del hub.faults[fault]
    assert pushed().code == 0
    assert sorted(hub.uploads) == arrived
    assert WEIGHTS in hub.model(MODEL)


def test_a_connection_cut_in_an_upload_is_tried_again(hub, world, pushed):
    hub.faults["PUT", "/lfs/objects"] = "cut"
    hub.repeats["PUT", "/lfs/objects"] = 1
    assert pushed().code == 0
    assert hub.count("PUT", "/lfs/objects") == 3
    assert len(hub.uploads) == 2
    assert hub.model(MODEL)[WEIGHTS] == (world.weights / WEIGHTS).read_bytes()


def test_nobody_listening_is_one_line(world, pushed, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert re.search(r"no answer from http://127.0.0.1:9.*check the network", error_of(pushed()))
    assert "not compared: " in pushed(dry_run=True).out


def test_no_network_when_offline(world, pushed, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert error_of(pushed()) == "your account: the Hub is not asked while HF_HUB_OFFLINE is set; unset it"


def test_a_missing_or_broken_token_is_told_before_anything_is_asked(hub, world, pushed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_with a\tgap")
    told = error_of(pushed())
    assert told.startswith("the Hugging Face token holds characters that no token has")
    assert "gap" not in told
    monkeypatch.delenv("HF_TOKEN")
    assert error_of(pushed()) == "no Hugging Face token; run `hf auth login`, or set HF_TOKEN, then push again"
    assert hub.requests == []


def test_a_name_taken_by_the_other_kind_is_refused(hub, world, pushed):
    hub.repos["datasets", MODEL] = Repo("datasets", private=True)
    assert error_of(pushed()) == f"{MODEL}: exists as a dataset, and this is a model; choose another --repo-id"


def test_a_file_that_the_repository_ignores_is_noticed(hub, world, pushed):
    hub.repos["models", MODEL] = Repo("models", private=True, branches={"main": {".gitignore": b"samples.png"}})
    assert error_of(pushed()).startswith(f"{MODEL}: samples.png did not arrive as it is here")


def test_the_hubs_own_check_of_the_card_is_told(hub, world, pushed):
    fake_run.write_synthetic(world.run, "warped", world.real)
    folder = world.run.synthetic / "warped"
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: My Own Licence\n---\n", encoding="utf-8")
    contract = read_json(folder / "contract.json", "")
    contract["files"]["README.md"] = file_digest(folder / "README.md")
    write_json(folder / "contract.json", contract)
    told = error_of(pushed("synthetic:warped"))
    assert 'answers 400 (Invalid metadata "license_name" must be an id in small letters); it does not take' in told
    assert hub.uploads == []


def test_what_is_not_there_cannot_be_pushed(hub, tmp_path, capsys):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    world = World(tmp_path, tmp_path, config, Run(config.run_folder), None)
    told = [error_of(push_told(world, capsys, word)) for word in ("generator", "synthetic:a", "dataset", "model")]
    assert told == [
        f"{tmp_path}/run/generator: nothing has been trained yet; run train first",
        f"{tmp_path}/run/synthetic: nothing has been generated yet; run generate first",
        f"{tmp_path}/run/dataset: no such dataset; run `maskloom prepare` first, or correct the path",
        f"model: no such part of {tmp_path}/run; known: dataset, generator",
    ]


def test_an_unknown_part_names_the_known(hub, world, pushed):
    told = error_of(pushed("generator:controlnets"))
    assert told.endswith("did you mean 'generator:controlnet'? known: dataset, generator, generator:controlnet")


def test_one_name_for_two_repositories_is_refused(hub, world, pushed):
    assert "one name for 2 repositories (dataset, generator:controlnet)" in error_of(
        pushed("dataset", "generator", repo_id="a/b")
    )
    assert "give NAMESPACE/NAME" in error_of(pushed(repo_id="a/b/c"))


def test_weights_must_be_whole_and_finished(hub, world, pushed):
    whole = (world.weights / WEIGHTS).read_bytes()
    (world.weights / WEIGHTS).write_bytes(whole[:-4])
    assert re.search(f"{WEIGHTS}: damaged weights .*; run its training again", error_of(pushed()))
    (world.weights / WEIGHTS).unlink()
    assert error_of(pushed()).endswith("controlnet: no weights to push (*.safetensors); run train again")
    (world.run.logs("train") / "stage.json").unlink()
    assert error_of(pushed()).endswith("stage.json: no such file; the training has not ended; run train again")
    assert hub.repos == {}


@pytest.mark.parametrize("kind", ["another training's", "one bit", "a picture", "another shard"])
def test_only_what_the_training_wrote_is_pushed(hub, world, pushed, kind):
    path = world.weights / ("samples.png" if kind == "a picture" else WEIGHTS)
    if kind == "another training's":
        save_file({"w": np.ones(50_000, np.float32)}, path, metadata={"format": "pt"})
    elif kind == "one bit":
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    elif kind == "a picture":
        Image.fromarray(np.ones((8, 24), np.uint8)).save(path)
    else:
        path = world.weights / "diffusion_pytorch_model-00002-of-00002.safetensors"
        save_file({"w": np.ones(3, np.float32)}, path)
    told = {"another shard": "not a file that the training wrote; move it away, then push again"}
    usual = "changed since it was written: damaged since its training; run train again, which makes it anew"
    assert error_of(pushed()) == f"{path}: {told.get(kind, usual)}"
    assert hub.repos == {}


def test_weights_of_another_dataset_are_not_pushed(hub, world, pushed):
    fake_run.write_real(world.run, licence="CC-BY-4.0")
    assert "controlnet: trained on another dataset than" in error_of(pushed())


def test_pictures_come_from_the_training_where_the_weights_have_none(hub, world, pushed):
    (world.weights / "samples.png").unlink()
    fake_run.write_training_log(world.run)
    assert pushed().code == 0
    newest = world.run.logs("train") / "images" / "step-000400.png"
    assert hub.model(MODEL)["samples.png"] == newest.read_bytes()


def test_a_damaged_config_is_told(hub, world, pushed):
    (world.weights / "config.json").write_bytes(b"{")
    assert "config.json: not valid JSON" in error_of(pushed())


def test_a_file_of_this_machine_keeps_its_own_error(hub, tmp_path):
    with pytest.raises(FileNotFoundError), Hub(dry_run=False).one_line_errors("a file"):
        (tmp_path / "none").read_bytes()


@pytest.mark.parametrize("metadata", ["- a list", "tags: [", "1: a number"])
def test_a_damaged_card_is_told(hub, world, pushed, metadata):
    (world.weights / "README.md").write_text(f"---\n{metadata}\n---\n", encoding="utf-8")
    assert "README.md: its metadata cannot be read" in error_of(pushed())


def test_a_changed_dataset_is_not_pushed(hub, world, pushed):
    (world.run.dataset / "README.md").write_text("other", encoding="utf-8")
    assert "README.md: its SHA-256 differs from contract.json" in error_of(pushed("dataset"))


def test_a_dataset_without_rows_is_not_pushed(hub, world, pushed):
    fake_run.write_dataset(world.run.synthetic / "none", fake_run.description("synthetic"), {"train": []})
    assert "there are no rows to push" in error_of(pushed("synthetic:none"))


def test_no_path_of_this_machine_goes(hub, tmp_path, capsys):
    world = make_world(tmp_path, preprocessing={"options": {"table": "/data/hospital/list.csv"}})
    told = error_of(push_told(world, capsys, "dataset"))
    assert f"{world.run.dataset}/contract.json: names a path of this machine, '/data/hospital/list.csv'" in told
    card = world.weights / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + f"from {tmp_path}/x\n", encoding="utf-8")
    assert f"README.md: names a path of this machine, '{tmp_path}" in error_of(push_told(world, capsys))
    card.unlink()
    adapters = {"base_model_name_or_path": "/home/me/models/sd15"}
    save_file({"w": np.ones(3, np.float32)}, world.weights / WEIGHTS, metadata=adapters)
    world.record_weights()
    assert f"{WEIGHTS}: names a path of this machine, '/home/me/models/sd15'" in error_of(push_told(world, capsys))
    assert hub.count("POST", "") == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"/home/anna/data"', True),
        ("see /mnt/x/y.png", True),
        ("file:///x", True),
        (r"C:\\Users\\anna", True),
        ("https://example.org/a/b/c and doi 10.1016/j.media/2", False),
        ("masks/{stem}.png, {grandparent}/masks/a.png, (p\\d+)/images/.*, **/masks/a.png", False),
        ("notes: …/synthetic/synthetic was stopped", False),
        ("T1/T2/FLAIR and/or </td></tr>, ../../dataset, ./a/b", False),
    ],
)
def test_absolute_paths(text, found):
    assert bool(ABSOLUTE_PATH.search(text)) == found


def write_evaluated(world: World, backbone: str = BACKBONE) -> None:
    """Write images of the trained weights and of the backbone alone, and figures about them."""
    digests = {"real": world.real.digest}
    for name, weights in (("controlnet", "f" * 64), ("text_only", backbone)):
        about = world.real.description.model_copy(
            update={"origin": "synthetic", "preprocessing": {"generation": {"weights": weights}}}
        )
        rows = [
            fake_run.sample(f"{name}-{i}", i, about, parent_id=f"train-{i}", generator=weights, seed=i)
            for i in range(3)
        ]
        parent = Parent(path="../../dataset", digest=world.real.digest)
        made = fake_run.write_dataset(world.run.synthetic / name, about, {"train": rows}, parent=parent)
        digests[name] = made.digest
    table = {
        "title": "Dice",
        "note": "Means of 3.",
        "columns": ["set", "class", "n", "Dice", "kernel distance", "its standard deviation"],
        "rows": [
            ["controlnet", "lesion|wide", 3, {"value": 0.71, "low": 0.68, "high": 0.74}, 0.125, 0.01],
            ["text_only", "lesion|wide", 3, {"value": 0.41, "low": None, "high": None}, 0.25, 0.02],
        ],
    }
    second = {**table, "title": "Not on the card"}
    fake_run.write_evaluation(world.run, "faith", fake_run.evaluation("faith", tables=[table, second], inputs=digests))
    fake_run.write_evaluation(world.run, "none", fake_run.evaluation("none", skipped="no masks", inputs=digests))


def test_the_card_gains_figures_and_provenance(hub, world, pushed):
    write_evaluated(world)
    assert pushed().code == 0
    text = hub.model(MODEL)["README.md"].decode()
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data["tags"][:4] == ["stable-diffusion", "diffusers", "controlnet", "diffusers-training"]
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "cc0-1.0",
        "https://example.org/",
    )
    index = data["model-index"][0]
    assert index["name"] == "fake-controlnet"
    assert index["results"][0]["dataset"] == {"name": "ellipses", "type": "ellipses"}
    assert index["results"][0]["metrics"] == [
        {
            "type": "dice",
            "value": 0.71,
            "name": "Dice (controlnet; lesion|wide)",
            "args": {"low": 0.68, "high": 0.74},
        },
        {"type": "kernel-distance", "value": 0.125, "name": "kernel distance (controlnet; lesion|wide)"},
    ]
    assert "![conditioning | real | samples](samples.png)" in text
    assert f'ControlNetModel.from_pretrained("{MODEL}")' in text
    assert "### Does it faith?" in text
    assert "| controlnet | lesion\\|wide | 3 | 0.710 [0.680, 0.740] |" in text
    assert "Does it none?" not in text
    assert text.count("Means of 3.") == 1
    assert "Warning: Fewer than 2048 samples." in text
    assert "commit `0123456789abcdef-dirty`" in text
    assert f"| dataset | `{world.real.digest}` |" in text
    assert f"| SHA-256 of `{WEIGHTS}` | `{file_digest(world.weights / WEIGHTS)}` |" in text
    assert "| seed | 0 |" in text
    assert "other.safetensors" not in text


def test_the_card_leaves_out_the_controls_of_the_evaluation(hub, world, pushed):
    write_evaluated(world)
    fake_run.write_evaluation(
        world.run, "controls", fake_run.evaluation("controls", inputs={"real": world.real.digest})
    )
    assert pushed().code == 0
    text = hub.model(MODEL)["README.md"].decode()
    assert "### Does it faith?" in text
    assert "Does it controls?" not in text


def test_figures_of_other_images_are_left_out(hub, world, pushed):
    write_evaluated(world)
    path = world.run.evaluation / "faith.json"
    measured = read_json(path, "")
    fake_run.write_evaluation(
        world.run, "faith", {**measured, "inputs": {**measured["inputs"], "controlnet": "0" * 64}}
    )
    ended = pushed()
    assert "the evaluation is of other images than these weights' and is left out of the card" in ended.err
    text = hub.model(MODEL)["README.md"].decode()
    assert "model-index" not in text
    assert "## Evaluation" not in text


def test_figures_older_than_the_weights_are_left_out(hub, world, pushed):
    write_evaluated(world)
    assert "left out" not in pushed(dry_run=True).err
    newer = (world.run.synthetic / "controlnet" / "contract.json").stat().st_mtime + 5
    os.utime(world.weights / WEIGHTS, (newer, newer))
    assert "left out of the card" in pushed().err


def test_a_local_backbone_is_not_named(hub, tmp_path, capsys):
    world = make_world(tmp_path, backbone="b" * 64)
    local = tmp_path / "backbone"
    local.mkdir()
    train = world.config.train.model_copy(update={"pretrained_model_name_or_path": str(local)})
    text = model_card(
        world.config.model_copy(update={"train": train}), MaskPromptDataset(world.run.dataset, world.real), None
    )
    assert str(tmp_path) not in text
    assert "base_model" not in text
    assert "samples.png" not in text
    (world.weights / "README.md").write_text(text, encoding="utf-8")
    assert push_told(world, capsys).code == 0
    pushed_text = hub.model(MODEL)["README.md"].decode()
    assert "base_model" not in yaml.safe_load(pushed_text.split("---\n")[1])
    assert "![conditioning | real | samples](samples.png)" in pushed_text


@pytest.mark.parametrize(
    ("identity", "base_model"),
    [(BACKBONE, BACKBONE.split("@")[0]), ("b" * 64, None), ("/models/sd15@main", None), ("", None)],
)
def test_the_hub_id_of_a_backbone(identity, base_model):
    assert hub_base_model(identity) == base_model


def test_a_licence_without_a_page_has_no_link():
    about = fake_run.description(licence="Licence of Göttingen (2020)", homepage="none")
    assert licence_metadata(about) == {"license": "other", "license_name": "licence-of-gottingen-2020"}


@pytest.mark.parametrize(
    ("kind", "train", "trained"),
    [
        ("controlnet", {"sd_locked": False}, "ControlNet (full); the UNet's decoder"),
        ("lora", {"controlnet": "none", "lora": ["unet"], "rank": 8}, "LoRA of rank 8 on unet"),
        ("vae", {"vae_decoder": {"max_train_steps": 5}}, "ControlNet (full); the VAE's decoder"),
    ],
)
def test_the_card_names_what_is_trained(world, kind, train, trained):
    values = world.config.model_dump(mode="json")
    config = ExperimentConfig.model_validate({**values, "train": {**values["train"], **train}})
    text = model_card(config, MaskPromptDataset(world.run.dataset, world.real), None, kind)
    assert f"| trained | {trained} |" in text
    assert kind in yaml.safe_load(text.split("---\n")[1])["tags"]
    assert ("The conditioning image" in text) == (kind == "controlnet")


def command_line(hub: HubState, world: World, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "push", "--config", str(world.path), *arguments]


def environment(hub: HubState, folder: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "0", "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **own, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}


def test_a_killed_push_goes_on_where_it_stopped(hub, world):
    run = {"env": environment(hub, world.folder), "cwd": ROOT, "text": True, "stderr": subprocess.PIPE}
    shards = [path for path in world.real.files if path.startswith("data/")]
    last = world.real.files[shards[-1]]
    hub.hold.add(last)
    killed = subprocess.Popen(command_line(hub, world, "dataset"), stdout=subprocess.PIPE, **run)
    assert hub.held.wait(60)
    while len(hub.uploads) < len(shards) - 1:
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    assert_no_token(world.folder, *killed.communicate(timeout=60))
    assert hub.dataset(DATASET) == {}
    hub.hold.clear()
    hub.released.set()
    arrived = list(hub.uploads)
    assert last not in arrived
    ended = subprocess.run(command_line(hub, world, "dataset"), stdout=subprocess.PIPE, check=False, **run)
    assert (ended.returncode, ended.stdout) == (0, f"{hub.endpoint}/datasets/{DATASET}\n")
    assert hub.uploads[len(arrived) :] == [last]
    assert {path: sha256(hub.dataset(DATASET)[path]) for path in shards} == {p: world.real.files[p] for p in shards}
    assert_no_token(world.folder, ended.stdout, ended.stderr)


def test_diffusers_loads_what_the_command_line_pushed(hub, world, monkeypatch):
    import torch
    from diffusers import ControlNetModel, StableDiffusionPipeline
    from diffusers.loaders import lora_base
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from tests.tiny_backbone import build_tiny_backbone, build_tiny_controlnet

    backbone = build_tiny_backbone(world.folder / "backbone")
    build_tiny_controlnet(backbone, world.weights)
    pipe = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapters = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(world.run.generator / "lora", unet_lora_layers=adapters)
    world.record_weights()

    command = command_line(hub, world, "generator", "experiment=other")
    run = {"env": environment(hub, world.folder), "cwd": ROOT, "text": True, "capture_output": True}
    ended = subprocess.run(command, check=False, **run)
    names = [f"{USER}/other-controlnet", f"{USER}/other-lora"]
    assert (ended.returncode, ended.stdout.split()) == (0, [f"{hub.endpoint}/{name}" for name in names])
    assert_no_token(world.folder, ended.stdout, ended.stderr)

    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
    controlnet = ControlNetModel.from_pretrained(names[0], cache_dir=world.folder / "cache")
    trained = ControlNetModel.from_pretrained(world.weights).state_dict()
    assert controlnet.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in controlnet.state_dict().items())
    fresh = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
    fresh.load_lora_weights(names[1], cache_dir=world.folder / "cache")
    loaded = convert_state_dict_to_diffusers(get_peft_model_state_dict(fresh.unet, adapter_name="default_0"))
    assert loaded.keys() == adapters.keys()
    assert all(torch.equal(value, adapters[key]) for key, value in loaded.items())


def test_a_password_in_the_address_of_a_mirror_is_not_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    client = Hub(dry_run=True)
    client.api.endpoint = "https://me:pass@mirror"
    upload = SimpleNamespace(target=SimpleNamespace(repo_type="dataset"), repo_id="a/b")
    assert client.address(upload, PushOptions()) == "https://mirror/datasets/a/b"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", client.api.endpoint)
    with (
        pytest.raises(MaskLoomError, match=r"^a/b: no answer from https://mirror, ") as error,
        client.one_line_errors("a/b"),
    ):
        raise ConnectionError(f"https://me:pass@mirror?token={TOKEN}")
    assert "pass" not in str(error.value) and TOKEN not in str(error.value)


def linked(path: Path, secret: Path) -> None:
    secret.write_text("not for others")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


@pytest.mark.parametrize("name", ["samples.png", "README.md", "config.json", WEIGHTS])
def test_a_link_is_never_followed(hub, world, pushed, name):
    linked(world.weights / name, world.folder / "secret")
    ended = pushed("generator", dry_run=True)
    assert f"{world.weights / name}: a link" in error_of(ended)
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["contract.json", "data"])
def test_a_link_in_a_dataset_is_never_followed(hub, world, pushed, name):
    path = world.run.dataset / name
    path.rename(world.folder / "elsewhere")
    path.symlink_to(world.folder / "elsewhere")
    assert "link" in error_of(pushed("dataset", dry_run=True))


def test_a_folder_behind_a_link_is_not_pushed(hub, world, pushed):
    world.weights.rename(world.folder / "elsewhere")
    world.weights.symlink_to(world.folder / "elsewhere")
    assert "lies outside the run, behind a link" in error_of(pushed("generator"))


def test_a_picture_of_the_log_that_is_a_link_is_not_pushed(hub, world, pushed):
    (world.weights / "samples.png").unlink()
    (world.run.logs("train") / "images").mkdir(parents=True, exist_ok=True)
    linked(world.run.logs("train") / "images/step-000009.png", world.folder / "secret")
    assert "step-000009.png: a link" in error_of(pushed("generator"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.png", b"-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("samples.png", b"\x89PNG\r\n\x1a\n and nothing"),
        ("README.md", b"\xff\xfe\x00"),
        ("config.json", b"[1]"),
        (WEIGHTS, b"pickle"),
    ],
)
def test_a_file_is_of_the_kind_that_its_name_says(hub, world, pushed, name, content):
    (world.weights / name).write_bytes(content)
    assert str(world.weights / name) in error_of(pushed("generator"))


def test_nothing_hides_behind_the_end_of_a_picture(hub, world, pushed):
    picture = world.weights / "samples.png"
    picture.write_bytes(picture.read_bytes() + b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert "does not begin or end as a PNG does" in error_of(pushed("generator"))


def test_words_in_a_picture_are_looked_at(hub, world, pushed):
    words = PngImagePlugin.PngInfo()
    words.add_text("Source", str(world.folder / "raw" / "patient.png"))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(world.weights / "samples.png", pnginfo=words)
    world.record_weights()
    assert "names a path of this machine" in error_of(pushed("generator"))
