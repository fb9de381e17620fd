"""Without an extra, what needs it ends in one line that names it, and everything else works."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskloom.data_prep.__main__ import main as data_prep
from maskloom.data_prep.datasets import mni152
from maskloom.data_prep.inspect.raw_tree import tables_of, tree_of
from maskloom.data_prep.processing.stains import stain_normaliser
from maskloom.data_prep.readers import slides
from maskloom.data_prep.readers.common import decoded_image, xml_root
from maskloom.data_prep.readers.dicom import read_header, read_picture
from maskloom.data_prep.readers.nifti import read_volume
from maskloom.data_prep.readers.spreadsheets import xlsx_rows
from maskloom.doctor import OPTIONAL
from maskloom.pipeline.config.data import StainConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import install_command, require
from tests.data_prep.readers.test_spreadsheets import write_table
from tests.writers import acdc, busi, camelyon, dicom_folder, udiat

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
READERS = ("codecs", "dicom", "nifti", "slides", "xlsx")
MODULES = ("imagecodecs", "pydicom", "nibabel", "openslide", "torchstain", "defusedxml", "openpyxl")


def hide(monkeypatch, *modules: str) -> None:
    """Make modules unimportable, as if they were not installed."""
    for module in modules:
        for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)


def refused(what: str, module: str, extra: str):
    return pytest.raises(MaskLoomError, match=rf"^{what} needs {module}: pip install 'maskloom\[{extra}\]'")


def test_a_module_that_is_there_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    require("colorsys", "none", "x")
    assert "colorsys" in sys.modules


def test_the_line_names_an_alternative(monkeypatch):
    hide(monkeypatch, "torch_fidelity")
    with pytest.raises(MaskLoomError) as caught:
        require("torch_fidelity", "fid", "extractor=inception", "use another")
    assert str(caught.value) == "extractor=inception needs torch-fidelity: pip install 'maskloom[fid]', or use another"


@pytest.mark.parametrize("failure", ["raise OSError('libopenslide.so.1: no such file')", "import no_such_dependency"])
def test_a_module_that_is_there_and_cannot_be_imported_says_why(tmp_path, monkeypatch, failure):
    (tmp_path / "broken_reader.py").write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MaskLoomError, match=r"x needs broken-reader, which cannot be imported \(.*no.such.*\): pip"):
        require("broken_reader", "slides", "x")


def test_all_holds_every_reader_and_dev_holds_all():
    assert EXTRAS["all"] == [f"maskloom[{','.join(READERS)}]"]
    assert "maskloom[all]" in EXTRAS["dev"]
    assert install_command("all") == "pip install 'maskloom[all]'"


def test_the_doctor_names_an_extra_that_holds_the_package():
    named = {package: extra for package, (extra, _) in OPTIONAL.items() if extra}
    assert set(named.values()) | {"all", "dev"} == set(EXTRAS)
    packages = {"openslide": "openslide-python", "torch_fidelity": "torch-fidelity"}
    for package, extra in named.items():
        assert packages.get(package, package) in {re.split(r"[>=]", entry)[0] for entry in EXTRAS[extra]}


def test_nifti(monkeypatch, tmp_path):
    hide(monkeypatch, "nibabel")
    with refused(r"a\.nii\.gz", "nibabel", "nifti"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("module", ["pydicom", "imagecodecs"])
def test_dicom(monkeypatch, tmp_path, module):
    path = tmp_path / "a.dcm"
    path.write_bytes(bytes(128) + b"DICM")
    hide(monkeypatch, module)
    for read in (read_header, lambda path: read_picture(path, 0, None)):
        with refused("DICOM", module, "dicom"):
            read(path)


def test_slides(monkeypatch, tmp_path):
    (tmp_path / "a.tif").write_bytes(b"")
    hide(monkeypatch, "openslide")
    with refused(r"a\.tif", "openslide", "slides"):
        slides.opened_slide(tmp_path / "a.tif")


def test_annotations(monkeypatch, tmp_path):
    hide(monkeypatch, "defusedxml")
    with refused(r"a\.xml", "defusedxml", "slides"):
        xml_root(tmp_path / "a.xml")


def test_stains(monkeypatch, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    hide(monkeypatch, "torchstain")
    for config in (StainConfig(method="macenko"), StainConfig(method="reinhard", reference=tmp_path / "a.png")):
        with refused(f"data.stain.method={config.method}", "torchstain", "slides"):
            stain_normaliser(config)


@pytest.mark.parametrize("module", ["openpyxl", "defusedxml"])
def test_spreadsheets(monkeypatch, tmp_path, module):
    path = tmp_path / "a.xlsx"
    write_table(path, [["a"], [1]])
    hide(monkeypatch, module)
    with refused(r".*a\.xlsx", module, "xlsx") as caught:
        xlsx_rows(path)
    assert str(caught.value).endswith(", or save it as CSV")
    tables, unreadable = tables_of(tmp_path, tree_of(tmp_path))  # `inspect` goes on with the other files
    assert not tables and unreadable[0][0] == "a.xlsx" and "maskloom[xlsx]" in unreadable[0][1]


def test_deep_images(monkeypatch, tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "packed.tif", deep, compression="zlib")
    tifffile.imwrite(tmp_path / "plain.tif", deep)
    Image.fromarray(deep.astype(np.uint8)).save(tmp_path / "b.png")
    hide(monkeypatch, "imagecodecs")
    for name, kind in (("a.png", "a PNG"), ("packed.tif", "a compressed TIFF")):
        with refused(rf"{name} \({kind}.*\)", "imagecodecs", "codecs"):
            decoded_image(tmp_path / name)
    assert (decoded_image(tmp_path / "plain.tif").pixels == deep).all()
    assert (decoded_image(tmp_path / "b.png").pixels == deep.astype(np.uint8)).all()


@pytest.mark.parametrize(
    ("writer", "module", "extra"),
    [
        (acdc, "nibabel", "nifti"),
        (camelyon, "openslide", "slides"),
        (camelyon, "defusedxml", "slides"),
        (dicom_folder, "pydicom", "dicom"),
        (udiat, "openpyxl", "xlsx"),
    ],
)
def test_preparing_a_dataset_without_its_extra_ends_in_one_line(monkeypatch, tmp_path, capsys, writer, module, extra):
    (tmp_path / "raw").mkdir()
    writer.write_raw(tmp_path / "raw")
    slides._opened.cache_clear()
    hide(monkeypatch, module)
    name = writer.__name__.rpartition(".")[2]
    config = ["--config", str(ROOT / "configs" / f"{name}.yaml"), f"data.raw_dir={tmp_path / 'raw'}"]
    with pytest.raises(SystemExit) as stopped:
        data_prep([*config, f"run_dir={tmp_path / 'run'}", "data.num_workers=1"])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert lines[-1].startswith("error: ") and f" needs {module}: pip install 'maskloom[{extra}]'" in lines[-1]


def test_the_demo_needs_no_extra(monkeypatch, tmp_path):
    hide(monkeypatch, *MODULES, "nilearn")
    mni152._volumes.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        data_prep(["--config", str(ROOT / "configs" / "demo.yaml"), f"run_dir={tmp_path}", "data.image_size=32"])
    assert stopped.value.code == 0
    assert (tmp_path / "dataset" / "contract.json").is_file()


def test_busi_needs_no_extra(monkeypatch, tmp_path):
    (tmp_path / "raw").mkdir()
    busi.write_raw(tmp_path / "raw")
    hide(monkeypatch, *MODULES)
    config = ["--config", str(ROOT / "configs" / "busi.yaml"), f"data.raw_dir={tmp_path / 'raw'}"]
    with pytest.raises(SystemExit) as stopped:
        data_prep([*config, f"run_dir={tmp_path / 'run'}", "data.image_size=32", "data.num_workers=1"])
    assert stopped.value.code == 0
    assert (tmp_path / "run" / "dataset" / "contract.json").is_file()
