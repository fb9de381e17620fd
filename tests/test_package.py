"""The wheel holds all of the project's packages with their data files, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "maskloom"
ROOMS = sorted(link.name for link in SOURCE.iterdir() if link.is_symlink())
JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")

# Not by `find_spec`: looking for pip switches off the distutils that setuptools brings, which
# torch.compile needs.
pytestmark = pytest.mark.skipif(
    not {"setuptools", "pip"} <= {one.name.lower() for one in distributions()},
    reason="building needs setuptools and pip",
)


def build_wheel(source: Path, folder: Path) -> dict[str, bytes]:
    """The content of a wheel by file name, without its metadata."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, for building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*ROOMS, "src", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=JUNK)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> dict[str, bytes]:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(checkout, wheel):
    rooms = {
        f"maskloom/{path.relative_to(checkout)}"
        for room in ROOMS
        for path in (checkout / room).rglob("*")
        if path.is_file()
    }
    own = {f"maskloom/{path.name}" for path in SOURCE.iterdir() if path.is_file()}
    assert set(wheel) == rooms | own


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "assets/nano-sd/.maskloom.json",
        "assets/nano-sd/unet/diffusion_pytorch_model.safetensors",
        "configs/demo.yaml",
        "configs/accelerate/ddp.yaml",
        "configs/experiments/generators.yaml",
        "configs/slurm/train.sh",
        "models/stable_diffusion/settings/sd1/model_index.json",
        "pipeline/report/templates/page.html.j2",
    ],
)
def test_the_wheel_holds_what_an_installed_command_needs(wheel, name):
    assert f"maskloom/{name}" in wheel


def test_the_source_distribution_builds_the_same_wheel(checkout, wheel, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert not [name for name in file.getnames() if name.split("/")[1:2] in (["tests"], ["benchmarks"])]
        file.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "wheel").mkdir()
    assert build_wheel(source, tmp_path / "wheel") == wheel
