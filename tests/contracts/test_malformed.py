"""Malformed configurations and command lines, for every command: exit code 2, a line, no traceback,
no hang, and no file written.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import maskloom.data_prep.__main__ as preparing
import maskloom.evaluate.__main__ as evaluating
import maskloom.generate.__main__ as generating
import maskloom.pipeline.__main__ as whole
import maskloom.train_baselines.__main__ as baselines
import maskloom.train_controlnet.__main__ as training
from maskloom.pipeline.config.loading import MOST_PROBLEMS, load_experiment, validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.sweep.sweep import SweepConfig
from maskloom.train_backbone.__main__ import main as backbone

ROOT = Path(__file__).parents[2]
Command = Callable[[list[str]], object]
SECONDS = 60  # far more than a refusal takes, on a busy machine too

CONFIGURED: dict[str, Command] = {
    "data_prep": preparing.main,
    "data_prep merge": lambda words: preparing.main(["merge", *words]),
    "train_controlnet": training.main,
    "plan": lambda words: training.main(["plan", *words]),
    "find-lr": lambda words: training.main(["find-lr", *words]),
    "backbone": backbone,
    "train_baselines": lambda words: run_command(lambda: baselines.app(args=words)),
    "generate": lambda words: run_command(lambda: generating.app(args=words)),
    "evaluate": evaluating.main,
    **{
        name: lambda words, name=name: run_command(lambda: whole.app(args=[name, *words]))
        for name in ("run", "status", "report", "push", "sweep")
    },
}
MINIMAL = "experiment: x\ndata: {dataset: phantom_bus}\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, str | bytes] = {
    "empty": "",
    "comment": "# nothing",
    "word": "word",
    "number": "5",
    "list": "- 1\n- 2",
    "null": "null",
    "tab": "\texperiment: x",
    "half": "experiment: [1",
    "colons": "a: b: c",
    "two documents": f"{MINIMAL}---\n{MINIMAL}",
    "key twice": f"{MINIMAL}experiment: y\n",
    "key twice, deep": "experiment: x\ndata: {dataset: busi, dataset: busi}\n",
    "unknown key": f"{MINIMAL}nothing: 1\n",
    "number for a key": f"{MINIMAL}5: 1\n",
    "null for a key": f"{MINIMAL}null: 1\n",
    "list for a key": f"{MINIMAL}? [1, 2]\n: 3\n",
    "not UTF-8": b"experiment: \xff\xfe\n",
    "UTF-16": MINIMAL.encode("utf-16"),
    "zero bytes": b"\0" * 100,
    "zero byte in a text": f'{MINIMAL}run_dir: "a\\0b"\n',
    "half a character": f'{MINIMAL}run_dir: "\\ud800"\n',
    "a program": b"\x7fELF" + bytes(range(256)),
    "brackets": "[" * 100_000,
    "closed brackets": "[" * 5000 + "]" * 5000,
    "braces": "{a: " * 5000,
    "dashes": "- " * 5000,
    "questions": "? " * 5000,
    "laughs": LAUGHS,
    "itself": "a: &a [*a]",
    "unknown anchor": "a: *nothing",
    "object": "a: !!python/object/apply:os.system ['touch made']",
    "module": "a: !!python/name:os.system",
    "binary": "a: !!binary aGk=",
    "set": "a: !!set {x, y}",
    "own tag": "a: !x y",
    "directive": "%YAML 9.9\n---\na: 1",
    "huge number": f"{MINIMAL}seed: {'9' * 5000}\n",
    "huge hexadecimal": f"{MINIMAL}seed: 0x{'f' * 5000}\n",
    "NaN": f"{MINIMAL}seed: .nan\n",
    "infinity": f"{MINIMAL}seed: .inf\n",
    "overflow": f"{MINIMAL}seed: 1e999\n",
    "flag for a number": f"{MINIMAL}seed: yes\n",
    "variable": f"{MINIMAL}run_dir: ${{oc.env:HOME}}\n",
    "nested variables": f"{MINIMAL}run_dir: ${{${{a}}}}\n",
    "extends a number": f"{MINIMAL}extends: 5\n",
    "extends a flag": f"{MINIMAL}extends: true\n",
    "extends a list": f"{MINIMAL}extends: [a.yaml, b.yaml]\n",
    "extends a mapping": f"{MINIMAL}extends: {{a: b}}\n",
    "extends nothing": f'{MINIMAL}extends: ""\n',
    "extends a zero byte": f'{MINIMAL}extends: "a\\0b"\n',
    "extends a variable": f'{MINIMAL}extends: "${{oc.env:NONE}}"\n',
    "extends a folder": f"{MINIMAL}extends: .\n",
    "extends a device": f"{MINIMAL}extends: /dev/zero\n",
    "extends a missing file": f"{MINIMAL}extends: none.yaml\n",
    "extends itself": f"{MINIMAL}extends: config.yaml\n",
    "extends a long name": f"{MINIMAL}extends: {'x' * 5000}\n",
    "section is a number": "experiment: x\ndata: 5\n",
    "section is a list": "experiment: x\ndata: [1, 2]\n",
    "section is null": "experiment: x\ndata:\n",
    "name leads out": "experiment: ../x\ndata: {dataset: busi}\n",
    "name is too long": f"experiment: {'x' * 300}\ndata: {{dataset: busi}}\n",
    "much": "#" * (2 << 20),
}
OVERRIDES = (
    "=x", "a", "a..b=1", ".=1", "=", "seed", "seed=", "seed=x", "seed=[1]", "seed={}", "seed=-1", "seed=1e999", "seed=.nan", "seed=yes",
    f"seed={'9' * 5000}", "seed=${a}", "run_dir=${oc.env:HOME}", "run_dir=a\0b", "run_dir=\udcff", "run_dir=[1]", "data=1", "data=[1]",
    "data=null", "data.x=1", "data.dataset=[1]", "data.dataset.x=1", "data.image_size=1000000000", "data.image_size=-8", "data.image_size=[]",
    "data.image_size=[8,8,8]", "data.image_size=.inf", "data.splits.train=.nan", "data.splits={train: 1e999}", "data.num_workers=99999999",
    "data.rows_per_shard=0", "data.external=5", "data.external={busi: false}", "data.intensity={method: window, center: .nan, width: .inf}",
    "train.learning_rate=1", "train={}", "generate.generators=5", "generate.generators.none=false", "generate.generators=[controlnet]",
    "generate.warp.scale=[.nan, 1]", "evaluate.metrics.none=false", "evaluate.metrics=x", "baselines=[pix2pix]", "experiment=..", "experiment=a/b",
    "x" * 3000 + "=1", "generate.images_per_class={a: 99999999999}", "generate.num_images=1e30",
)  # fmt: skip
LINES: dict[str, tuple[Command, list[list[str]]]] = {
    "data_prep": (
        preparing.main,
        [[], ["--config"], ["--nothing"], ["inspect"], ["inspect", "none"], ["inspect", "a\0b"], ["inspect", "x" * 5000],
         ["inspect", ".", "--samples", "0"], ["inspect", ".", "--samples", "9" * 5000], ["verify"], ["verify", "none"], ["verify", "."],
         ["verify", "a\0b"], ["verify", ".", "--against", "none"], ["verify", ".", "--images-per-class", "x"], ["merge"],
         ["--config", "GOOD", "--shard", "0/3"], ["--config", "GOOD", "--shard", "9" * 5000 + "/" + "9" * 5000], ["--config", "GOOD", "--shard", "a"],
         ["--config", "GOOD", "--shard", "4/3"], ["--config", "."], ["--config", "/dev/zero"], ["--config", ""], ["--config", "a\0b"]],
    ),
    "train_controlnet": (
        training.main,
        [["plan"], ["plan", "--config", "GOOD"], ["plan", "--config", "GOOD", "--processes", "0"], ["plan", "--config", "GOOD", "--processes", "9" * 30],
         ["find-lr", "--config", "GOOD", "--steps", "1"], ["find-lr", "--config", "GOOD", "--min-lr", "nan"],
         ["find-lr", "--config", "GOOD", "--max-lr", "inf"], ["find-lr", "--config", "GOOD", "--max-lr", "1e999"],
         ["find-lr", "--config", "GOOD", "--min-lr", "-1"], ["find-lr", "--config", "GOOD", "--min-lr", "x"],
         ["--config", "GOOD", "train.pretrained_model_name_or_path=none"]],
    ),
    "train_baselines": (CONFIGURED["train_baselines"], [[], ["--config", "GOOD", "--architecture", "none", "baselines={pix2pix: {}}"], ["--architecture"]]),
    "generate": (CONFIGURED["generate"], [[], ["--config", "GOOD"], ["--config", "GOOD", "generate.generators={none: {}}"]]),
    "evaluate": (CONFIGURED["evaluate"], [[], ["--config", "GOOD"], ["--config", "GOOD", "evaluate.metrics={none: {}}"],
                                          ["--config", "GOOD", "evaluate.metrics={quality: {pairs: .inf}}"]]),
    "pipeline": (
        lambda words: run_command(lambda: whole.app(args=words)),
        [["nothing"], ["run"], ["run", "--config", "GOOD", "--from", "none"], ["run", "--config", "GOOD", "--from", "report", "--to", "prepare"],
         ["run", "--config", "GOOD", "--accelerate-config", "none.yaml"], ["run", "--config", "GOOD", "--accelerate-config", "BAD"],
         ["run", "--config", "GOOD", "--accelerate-config", "."], ["sweep", "--config", "GOOD", "--accelerate-config", "BAD"], ["status"], ["report"],
         ["push"], ["push", "--config", "GOOD", "nothing"], ["push", "--config", "GOOD", "dataset", "--dry-run"],
         ["push", "--config", "GOOD", "synthetic:../..", "--dry-run"], ["push", "--config", "GOOD", "baseline:", "--dry-run"],
         ["push", "--config", "GOOD", "generator:none", "--dry-run"], ["push", "--config", "GOOD", "dataset", "--repo-id", "a/b/c", "--dry-run"],
         ["verify"], ["verify", "none"], ["export"], ["export", "none", "--format", "coco", "--output", "out"],
         ["export", "none", "--format", "none", "--output", "out"], ["export", ".", "--format", "nnunet", "--output", "out", "dataset_id=x"],
         ["export", ".", "--format", "nnunet", "--output", "out", "dataset_id"], ["export", ".", "--format", "nnunet", "--output", "out", "dataset_id=.nan"],
         ["combine"], ["combine", "--real", "none", "--synthetic", "none", "--output", "out"],
         ["combine", "--real", ".", "--synthetic", ".", "--output", "out", "--ratio", "nan"],
         ["combine", "--real", ".", "--synthetic", ".", "--output", "out", "--ratio", "inf"],
         ["combine", "--real", ".", "--synthetic", ".", "--output", "out", "--ratio", "1e300"],
         ["combine", "--real", ".", "--synthetic", ".", "--output", "out", "--schedule", "1000000000"],
         ["combine", "--real", ".", "--synthetic", ".", "--output", "out", "--schedule", "1"],
         ["combine", "--real", ".", "--synthetic", ".", "--output", "out", "--seed", "x"]],
    ),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder in which nothing may appear but the folder of runs."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml", "good.yaml", "bad.yaml", "runs"}


def refused(command: Command, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command that must refuse its words, with a line of its own per mistake or with its usage."""
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        command(words)
    said = capsys.readouterr()
    assert end.value.code == 2, (words, said)
    assert "Traceback" not in said.err + said.out
    own = [line for line in said.err.splitlines() if line.startswith("error: ")]
    one = len(own) == 1 and len(own[0]) < 2000
    # A configuration may have several invalid values: one line each.
    place = f"error: {words[1] if len(words) > 1 else ''}: "
    several = 1 < len(own) <= MOST_PROBLEMS + 1 and all(line.startswith(place) and len(line) < 2000 for line in own)
    assert (("Usage: " in said.err or "─ Error ─" in said.err) and not own) or one or several, said.err
    assert time.monotonic() - start < SECONDS


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_configuration(place, capsys, name):
    """Each is given to some of the commands: all of them read configurations in one place."""
    path = write(place / "config.yaml", FILES[name])
    first = list(FILES).index(name)
    commands = list(CONFIGURED.values())
    for offset in range(4):
        refused(commands[(first + 4 * offset) % len(commands)], ["--config", str(path)], capsys)


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: ascii(override[:40]))
def test_a_malformed_override(place, capsys, override):
    path = write(place / "config.yaml", MINIMAL)
    first = OVERRIDES.index(override)
    commands = [command for name, command in CONFIGURED.items() if name not in ("push", "backbone")]
    for offset in range(2):
        words = ["--config", str(path), "--", override]
        refused(commands[(first + 5 * offset) % len(commands)], words, capsys)


@pytest.mark.parametrize("command", LINES)
def test_a_malformed_command_line(place, capsys, command):
    good, bad = write(place / "good.yaml", MINIMAL), write(place / "bad.yaml", "- 1\n")
    run, lines = LINES[command]
    for words in lines:
        refused(run, [{"GOOD": str(good), "BAD": str(bad)}.get(word, word) for word in words], capsys)


WEIRD = (None, True, -1, 0, 10**12, -(10**30), float("nan"), float("inf"), 1e300, "", "x" * 5000, "../..", [], [[]], {}, {"a": None}, [1, "a"])  # fmt: skip


def leaves(values: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield keys
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, (*keys, key))


def changed(values: Any, keys: tuple[str, ...], value: Any) -> Any:
    if not keys:
        return value
    inner = values if isinstance(values, dict) else {}
    return {**inner, keys[0]: changed(inner.get(keys[0]), keys[1:], value)}


def test_there_are_many():
    assert 4 * len(FILES) + 2 * len(OVERRIDES) + sum(len(lines) for _, lines in LINES.values()) >= 400


def test_any_value_at_any_key_is_taken_or_refused_in_a_line():
    """Every key of the demo's configuration, one after the other, holds one odd value after the
    other.
    """
    config = load_experiment(ROOT / "configs/demo.yaml", []).model_dump(mode="json")
    said, tried = [], 0
    for keys in leaves(config):
        for value in WEIRD:
            tried += 1
            try:
                validated(changed(config, keys, value), SweepConfig, "here")
            except MaskLoomError as error:
                said.append(str(error))
    assert tried > 1000
    assert tried > len(said) > tried / 2
    assert not [line for line in said if "\n" in line or len(line) > 1000]
