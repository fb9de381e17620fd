"""Configuration: every file in configs/, inheritance, overrides, and what a mistake is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_config, load_experiment, validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.sweep.sweep import SweepConfig, planned_variants

CONFIGS = Path(__file__).parents[3] / "configs"
# Files of other programs, or of other models; their own tests load them.
OTHERS = ("accelerate", "slurm")
EXPERIMENTS = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.relative_to(CONFIGS).parts[0] not in OTHERS and not path.name.startswith("backbone")
)
SWEEPS = [path for path in EXPERIMENTS if path.parent.name == "experiments" or path.stem == "sweep"]
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))
MINIMAL = {
    "experiment": "tiny",
    "data": {"dataset": "phantom_bus"},
    "train": {"pretrained_model_name_or_path": "nowhere"},
}


def _write(folder: Path, values: object, name: str = "one.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def _problem(path: Path, *overrides: str) -> str:
    with pytest.raises(MaskLoomError) as error:
        load_experiment(path, list(overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_experiment_in_configs_loads(path):
    config = load_config(path, [], SweepConfig if path in SWEEPS else ExperimentConfig)
    assert config.run_folder == Path("runs") / config.experiment


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_variant_of_a_sweep_in_configs_loads(path):
    config = load_config(path, [], SweepConfig)
    variants = planned_variants(path, [], config)
    assert [one.name for one in variants] == (list(config.sweep.variants) or [""])
    assert len({one.config.run_folder for one in variants}) == len(variants)


def test_there_are_experiments():
    assert CONFIGS / "demo.yaml" in EXPERIMENTS


def test_every_accelerate_file_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in ACCELERATE:
        assert load_config_from_file(str(path)).num_processes >= 1, path


def test_defaults_and_the_run_folder(tmp_path):
    config = load_experiment(_write(tmp_path, MINIMAL), [])
    assert config.data.image_size == (512, 512)
    assert config.run_folder == Path("runs/tiny")
    assert load_experiment(_write(tmp_path, MINIMAL), [f"run_dir={tmp_path}"]).run_folder == tmp_path


def test_one_number_is_a_square(tmp_path):
    assert load_experiment(_write(tmp_path, MINIMAL), ["data.image_size=64"]).data.image_size == (64, 64)
    assert load_experiment(_write(tmp_path, MINIMAL), ["data.image_size=[64,128]"]).data.image_size == (64, 128)


def test_overrides_come_last(tmp_path):
    _write(tmp_path, {**MINIMAL, "seed": 1, "report": {"images_per_class": 9}}, "parent.yaml")
    child = _write(tmp_path, {"extends": "parent.yaml", "seed": 2})
    assert load_experiment(child, []).seed == 2
    assert load_experiment(child, []).report.images_per_class == 9
    assert load_experiment(child, ["seed=3", "train.learning_rate=1e-5"]).seed == 3
    assert load_experiment(child, ["train.learning_rate=1e-5"]).train.learning_rate == 1e-5


def test_extends_is_relative_to_the_file_and_goes_on_upwards(tmp_path):
    (tmp_path / "deep").mkdir()
    _write(tmp_path, MINIMAL, "base.yaml")
    _write(tmp_path / "deep", {"extends": "../base.yaml", "seed": 4}, "middle.yaml")
    assert load_experiment(_write(tmp_path / "deep", {"extends": "middle.yaml"}, "leaf.yaml"), []).seed == 4


def test_extends_over_too_many_files(tmp_path):
    for number in range(52):
        _write(tmp_path, {"extends": f"{number + 1}.yaml"}, f"{number}.yaml")
    assert "0.yaml: `extends` chains more than 50 files" in _problem(tmp_path / "0.yaml")


def test_extends_in_a_circle(tmp_path):
    _write(tmp_path, {"extends": "two.yaml"}, "one.yaml")
    _write(tmp_path, {"extends": "one.yaml"}, "two.yaml")
    assert "`extends` forms a cycle: one.yaml -> two.yaml -> one.yaml" in _problem(tmp_path / "one.yaml")


def test_a_missing_file(tmp_path):
    assert "none.yaml: no such configuration file" in _problem(tmp_path / "none.yaml")
    child = _write(tmp_path, {"extends": "gone.yaml"})
    assert "gone.yaml: no such configuration file" in _problem(child)


def test_a_mistyped_name_is_answered_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = _problem(Path("configs/bsui.yaml"))
    assert "bsui.yaml: no such configuration file; did you mean configs/busi.yaml? Otherwise give a path" in told
    _write(tmp_path, MINIMAL, "bsui_mine.yaml")  # the user's own come first
    assert f"did you mean {tmp_path}/bsui_mine.yaml?" in _problem(tmp_path / "bsui_mien.yaml")
    assert "did you mean" not in _problem(Path("configs/quite_another.yaml"))


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\ta: 1"])
def test_a_file_that_is_not_yaml(tmp_path, text):
    assert "one.yaml: not valid YAML" in _problem(_write(tmp_path, text))


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert "one.yaml: not valid YAML: not UTF-8 text (byte 0); save it as UTF-8" in _problem(path)


def test_a_file_that_is_not_a_mapping(tmp_path):
    assert "must contain a mapping of keys to values" in _problem(_write(tmp_path, ["a", "b"]))


@pytest.mark.parametrize("text", ["${sed}", "${oc.env:HOME}", "${oc.decode:1}"])
def test_a_variable_is_not_looked_up(tmp_path, text):
    problem = _problem(_write(tmp_path, {**MINIMAL, "run_dir": text}))
    assert f"one.yaml: not valid YAML: '{text}': variables are not substituted" in problem
    problem = _problem(_write(tmp_path, MINIMAL), f"run_dir={text}")
    assert f"override run_dir={text}: '{text}': variables are not substituted" in problem


@pytest.mark.parametrize(
    ("extends", "problem"),
    [
        (5, "extends=5: give the name of one file"),
        (True, "extends=True: give the name of one file"),
        (["a.yaml"], "extends=['a.yaml']: give the name of one file"),
        ({"a": "b"}, "extends={'a': 'b'}: give the name of one file"),
        ("", "extends='': give the name of one file"),
        ("a\0b", "contains a zero byte"),
        ("${oc.env:NONE}", "variables are not substituted"),
        (".", "no such configuration file"),
        ("x" * 5000, "no such configuration file"),
        ("one.yaml", "forms a cycle"),
        ("list.yaml", "data: a mapping cannot replace a list ([1, 2]); give a list"),
    ],
)
def test_extends_may_be_anything_and_ends_in_one_line(tmp_path, extends, problem):
    _write(tmp_path, {"data": [1, 2]}, "list.yaml")
    assert problem in _problem(_write(tmp_path, {**MINIMAL, "extends": extends}))


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["run_dir=~/run", "data.raw_dir=~/raw"]
    config = load_experiment(CONFIGS / "demo.yaml", overrides)
    assert (config.run_folder, config.data.raw_dir) == (tmp_path / "run", tmp_path / "raw")
    assert load_experiment(CONFIGS / "demo.yaml", ["run_dir=~no-such-user/run"]).run_folder == Path("~no-such-user/run")


def _drops(tmp_path: Path, *overrides: str) -> ExperimentConfig:
    parent = {
        **MINIMAL,
        "baselines": {"pix2pix": {}, "class_gan": {"latent_dim": 5}},
        "generate": {"generators": {"controlnet": {}, "pix2pix": {}}},
        "data": {"dataset": "phantom_bus", "external": {"busi": {}, "udiat": {}}},
    }
    _write(tmp_path, parent, "parent.yaml")
    child = {"baselines": {"pix2pix": False}, "generate": {"generators": {"pix2pix": False, "class_gan": {}}}}
    path = _write(tmp_path, {"extends": "parent.yaml", **child, "data": {"external": {"udiat": False}}})
    return load_experiment(path, list(overrides))


def test_false_takes_an_inherited_entry_out(tmp_path):
    config = _drops(tmp_path, "generate.generators.controlnet=false")
    assert config.baselines == {"class_gan": {"latent_dim": 5}}
    assert list(config.generate.generators) == ["class_gan"]
    assert list(config.data.external) == ["busi"]


def test_false_takes_an_entry_of_the_default_out(tmp_path):
    path = _write(tmp_path, MINIMAL)
    config = load_experiment(path, ["generate.generators.text_only=false", "evaluate.metrics={quality: false}"])
    assert list(config.generate.generators) == ["controlnet"]
    assert "quality" not in config.evaluate.metrics and len(config.evaluate.metrics) == 5


def test_one_entry_takes_the_place_of_another_whatever_the_file_says(tmp_path):
    overrides = ["generate.generators.controlnet=false", "generate.generators.lora={}"]
    for generators in (None, {"controlnet": {}}, {"controlnet": {"empty_prompt": True}, "pix2pix": {}}):
        path = _write(tmp_path, {**MINIMAL, **({"generate": {"generators": generators}} if generators else {})})
        left = [name for name in generators or {} if name != "controlnet"]
        assert list(load_experiment(path, overrides).generate.generators) == [*left, "lora"]


def test_the_last_inherited_entry_can_go(tmp_path):
    assert _drops(tmp_path, "baselines.class_gan=false").baselines == {}


@pytest.mark.parametrize("key", ["generate.generators.text_onyl", "baselines.lora", "data.external.bus"])
def test_false_where_nothing_is_inherited(tmp_path, key):
    name = key.rpartition(".")[2]
    with pytest.raises(MaskLoomError, match=f"{name}=false removes an inherited entry, but no entry of this name is"):
        _drops(tmp_path, f"{key}=false")


def test_an_entry_without_options_has_the_default_ones(tmp_path):
    config = load_experiment(_write(tmp_path, MINIMAL), ["generate.generators={controlnet}"])
    assert config.generate.generators == {"controlnet": {}}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("*/images/*.png", "*/images/*.png"),
        ("{grandparent}/masks/{stem}.png", "{grandparent}/masks/{stem}.png"),
        ("a #b", "a #b"),
        ("|", "|"),
        ("%a", "%a"),
        ("!a", "!a"),
        ("'a #b'", "a #b"),
        ('"{stem}"', "{stem}"),
    ],
)
def test_an_override_that_yaml_cannot_read_is_text(tmp_path, value, text):
    config = load_experiment(_write(tmp_path, MINIMAL), [f"data.options.images={value}"])
    assert config.data.options == {"images": text}


def test_a_mapping_where_text_belongs_says_that_quotes_are_missing(tmp_path):
    assert "train.revision={'stem': None}: Input should be a valid string; in quotes a value is text" in _problem(
        _write(tmp_path, MINIMAL), "train.revision={stem}"
    )


@pytest.mark.parametrize("override", ["seed", "--seed=1", "-x", "=1", "a..b=1", ".=1", "data.=1"])
def test_an_override_that_is_no_assignment(tmp_path, override):
    assert f"override {override!r}: write key=value" in _problem(_write(tmp_path, MINIMAL), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "unknown key 'sede': did you mean 'seed'?"),
        ("train.learning_rat=1", "unknown key 'train.learning_rat': did you mean 'learning_rate'?"),
        ("data.splits.trayn=1", "unknown key 'data.splits.trayn': did you mean 'train'?"),
        ("generate.warp.scal=1", "unknown key 'generate.warp.scal': did you mean 'scale'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path, override, message):
    problem = _problem(_write(tmp_path, MINIMAL), override)
    assert message in problem
    assert problem.count(", ") < 6  # not every key that there is


def test_a_missing_key_is_named(tmp_path):
    assert "experiment: this key is required (and 1 more)" in _problem(_write(tmp_path, {"seed": 1}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed=-1: "),
        ("experiment=../up", "experiment='../up': "),
        ("train.max_train_steps=-1", "train.max_train_steps=-1: "),
        ("train.mixed_precision=fp8", "train.mixed_precision='fp8': "),
        ("train.learning_rate=fast", "train.learning_rate='fast': "),
        ("data.image_size=100", "both sides must be positive multiples of 8"),
        ("data.image_size=0", "both sides must be positive multiples of 8"),
        ("data.splits.train=0.5", "data.splits: the shares must sum to 1, not 0.8"),
        ("data.resize_mode=zoom", "data.resize_mode='zoom': "),
        ("data=none", "data='none': "),
        ("generate.warp.scal.e=1", "unknown key 'generate.warp.scal'"),
        ("train.learning_rate=.nan", "train.learning_rate=nan: Input should be a finite number"),
        ("train.learning_rate=1e999", "train.learning_rate=inf: Input should be a finite number"),
        ("train.noise_offset=1e300", "train: noise_offset: 1e+300 is larger than the largest supported number"),
        ("generate.warp.scale=[.nan, 1]", "generate.warp.scale.0=nan: Input should be a finite number"),
        ("data.intensity={method: window, center: .nan, width: 1}", "data.intensity.center=nan"),
        ("data.intensity={method: window, center: 0, width: .inf}", "data.intensity.width=inf"),
        ("data.image_size=1000000000", "at most 8192: a single image of that size fills the memory"),
        ("data.buckets=[[64, 1000000000]]", "data.buckets.0.1=1000000000: at most 8192"),
        ("train.train_batch_size=1000000", "train.train_batch_size=1000000: at most 16384"),
        ("train.train_batch_size=yes", "train: train_batch_size=True: give a number, not true or false"),
        ("train.num_train_epochs=on", "train: num_train_epochs=True: give a number, not true or false"),
        ("seed=yes", "one.yaml: seed=True: give a number, not true or false"),
        (f"seed={'9' * 5000}", "Unable to parse input string as an integer"),
        ("generate.images_per_class={a: 99999999999}", "generate.images_per_class.a=99999999999: at most 10000000"),
        ("train.tracker_project_name=../../up", "train.tracker_project_name='../../up': "),
        (f"experiment={'x' * 200}", "at most 128 characters"),
        ("data.dataset.x=1", "data.dataset: a mapping cannot replace one value ('phantom_bus')"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_key(tmp_path, override, message):
    assert message in _problem(_write(tmp_path, MINIMAL), override)


def test_values_do_not_change_after_loading(tmp_path):
    config = load_experiment(_write(tmp_path, MINIMAL), [])
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_the_resolved_configuration_loads_to_itself(tmp_path):
    config = load_experiment(_write(tmp_path, MINIMAL), ["seed=5"])
    again = load_config(_write(tmp_path, config.model_dump(mode="json"), "two.yaml"), [], ExperimentConfig)
    assert again == config


def test_options_of_a_plug_in_are_checked_in_the_same_words():
    from maskloom.pipeline.config.generate import WarpConfig

    with pytest.raises(MaskLoomError, match=r"here: unknown key 'attemptz': did you mean 'attempts'\?"):
        validated({"attemptz": 1}, WarpConfig, "here")


@pytest.mark.parametrize(
    "override", ["data=[1]", "data.options=[{", "data.0.x=1", "seed=[1]", "train.mixed_precision=yes"]
)
def test_an_override_that_does_not_fit_is_told_in_one_line(tmp_path, override):
    assert override.split("=")[0].removesuffix(".x") in _problem(_write(tmp_path, MINIMAL), override)


def test_no_means_no_mixed_precision(tmp_path):
    """YAML reads an unquoted `no` as false."""
    path = _write(tmp_path, MINIMAL)
    assert load_experiment(path, ["train.mixed_precision=no"]).train.mixed_precision == "no"
    assert load_experiment(path, ["generate.mixed_precision=no"]).generate.mixed_precision == "no"


@pytest.mark.parametrize("name", ["../x", "/abs", "x/y", ".hidden", "", "a" * 200, "x\\y", "a b"])
@pytest.mark.parametrize(
    "place", ["generate.generators", "evaluate.metrics", "baselines", "data.external", "data.dataset"]
)
def test_names_of_plugins_cannot_lead_out_of_the_run(place: str, name: str) -> None:
    section, _, key = place.partition(".")
    value = name if place == "data.dataset" else {name: {}}
    values: dict[str, Any] = {"experiment": "a", "data": {"dataset": "tiny"}}
    if key:
        values[section] = {**values.get(section, {}), key: value}
    else:
        values[section] = value
    with pytest.raises(MaskLoomError, match=place.replace(".", r"\.")):
        validated(values, ExperimentConfig, "c.yaml")


@pytest.mark.parametrize("name", ["../../x", "/abs", "..", ".x", "a\nb", "a\n", "a" * 200, "x/y", ""])
def test_names_of_folders_cannot_lead_out_of_the_run(name: str) -> None:
    train = {"pretrained_model_name_or_path": "a/b"}
    with pytest.raises(MaskLoomError, match="experiment"):
        validated({"experiment": name, "data": {"dataset": "tiny"}}, ExperimentConfig, "c.yaml")
    with pytest.raises(MaskLoomError, match=r"train\.tracker_project_name"):
        validated(
            {"experiment": "a", "data": {"dataset": "tiny"}, "train": {**train, "tracker_project_name": name}},
            ExperimentConfig,
            "c.yaml",
        )


def test_code_that_fine_tunes_names_the_missing_section():
    config = ExperimentConfig(experiment="x", data={"dataset": "phantom_bus"})
    with pytest.raises(MaskLoomError, match=r"no section `train`, .*; set train\.pretrained_model_name_or_path$"):
        _ = config.fine_tuning
