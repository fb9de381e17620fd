"""Judge again: after a refusal or a kill, into odd places, from folders with odd names."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from maskloom.evaluate.judge.judge import Request, judge
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.runs import small_options
from tests.evaluate.test_judge import METRICS, SIDE, scan, write_classes

pytestmark = pytest.mark.timeout(900)  # several runs of judge each

MARKUP = ("<img src=x onerror=alert(1)>", "a&b | `c` [d](e) \"f\" 'g'")
"""Names of class folders that HTML or Markdown would take for markup."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real and synthetic images, and a configuration with one quick question."""
    folder = tmp_path_factory.mktemp("judge")
    write_classes(folder / "real", 1, 24)
    write_classes(folder / "vendor", 2, 12)
    metrics = {name: small_options(name) if name == "quality" else False for name in METRICS}
    values = {"extends": "judge.yaml", "data": {"image_size": SIDE}, "evaluate": {"metrics": metrics}}
    (folder / "quick.yaml").write_text(yaml.safe_dump(values))
    return folder


def judged(folders: Path, out: Path, real: Path | None = None, synthetic: Path | None = None) -> None:
    request = Request(real or folders / "real", synthetic or folders / "vendor", out, folders / "quick.yaml")
    judge(request, force=False)


def bytes_in(out: Path) -> dict[str, bytes]:
    """Return what judge has found, without times and the place of the run."""
    files = (file for part in ("dataset", "synthetic", "evaluation") for file in (out / part).rglob("*"))
    return {str(file.relative_to(out)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(folders: Path) -> dict[str, bytes]:
    judged(folders, folders / "whole")
    return bytes_in(folders / "whole")


MOMENTS = {
    "while real images are read": "logs/prepare",
    "before synthetic images are read": "dataset/contract.json",
    "before the first answer": "synthetic/synthetic/contract.json",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_judge_continues_to_the_same_bytes(
    moment: str, folders: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["judge", "--real", folders / "real", "--synthetic", folders / "vendor", "--out", out]
    command = [sys.executable, "-m", "maskloom.evaluate", *map(str, words), "--config", str(folders / "quick.yaml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True) as one:
        while not (out / MOMENTS[moment]).exists() and one.poll() is None:
            time.sleep(0.02)
        assert one.poll() is None
        os.killpg(one.pid, signal.SIGKILL)
    judged(folders, out)
    assert bytes_in(out) == uninterrupted
    assert (out / "report.html").is_file()


def test_a_refusal_leaves_the_prepared_real_images_for_the_next_try(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, synthetic, out = tmp_path / "real", tmp_path / "vendor", tmp_path / "out"
    shutil.copytree(folders / "real", real)
    shutil.copytree(folders / "vendor", synthetic)
    (synthetic / "benign").rename(synthetic / "unknown")
    with pytest.raises(MaskLoomError, match="'unknown' is none of the real classes"):
        judged(folders, out, real, synthetic)
    assert f"the real images stay in {out / 'dataset'}, prepared; the same command uses them" in capsys.readouterr().err
    prepared = (out / "dataset" / "contract.json").stat().st_mtime_ns
    (synthetic / "unknown").rename(synthetic / "benign")
    judged(folders, out, real, synthetic)
    assert (out / "dataset" / "contract.json").stat().st_mtime_ns == prepared
    assert "stay" not in capsys.readouterr().err
    digest = MaskPromptDataset.open(out / "dataset").digest
    Image.fromarray(scan(7, 0)[0]).save(real / "benign" / "scan_0.png")
    judged(folders, out, real, synthetic)
    assert MaskPromptDataset.open(out / "dataset").digest != digest


def as_file(out: Path) -> None:
    out.write_text("mine")


def with_files_of_others(out: Path) -> None:
    (out / "dataset").mkdir(parents=True)
    (out / "dataset" / "mine.txt").write_text("mine")


@pytest.mark.parametrize("make", [as_file, with_files_of_others])
def test_files_of_others_in_out_are_kept(make: Callable[[Path], None], folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    with pytest.raises(MaskLoomError, match=r"out: (not a folder|holds dataset, which MaskLoom did not write)"):
        judged(folders, out)
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file.read_text() for file in kept] == ["mine"]


@pytest.mark.parametrize("place", ["real", "real/benign/out", "vendor/out", ""])
def test_out_among_the_images_is_refused(place: str, folders: Path) -> None:
    before = sorted(folders.rglob("*"))
    with pytest.raises(MaskLoomError, match=r"^--(real|synthetic)=.*which is written to"):
        judged(folders, folders / place)
    assert sorted(folders.rglob("*")) == before


def test_out_where_nothing_can_be_written_is_one_line(folders: Path) -> None:
    words = ["judge", "--real", folders / "real", "--synthetic", folders / "vendor", "--out", "/proc/judged"]
    command = [sys.executable, "-m", "maskloom.evaluate", *map(str, words), "--config", str(folders / "quick.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "/proc/judged" in done.stderr and "Traceback" not in done.stderr


def test_names_that_look_like_markup_are_text_on_the_page(folders: Path, tmp_path: Path) -> None:
    for name, seed, count in (("real", 1, 24), ("vendor", 2, 12)):
        for number in range(count):
            place = tmp_path / name / MARKUP[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            image, mask = scan(seed, number)
            Image.fromarray(image).save(place / f"<b>{number}.png")
            Image.fromarray(mask * np.uint8(255)).save(place / f"<b>{number}_mask.png")
    (tmp_path / "vendor" / MARKUP[0] / "<script>alert(2)<.png").write_text("no image")
    judged(folders, tmp_path / "out", tmp_path / "real", tmp_path / "vendor")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not any(text in page for text in ("<img src=x", "<script>alert", "<b>1"))
    assert MaskPromptDataset.open(tmp_path / "out" / "synthetic" / "synthetic").num_rows == 12
