import json
import re
import shutil
from collections import defaultdict

import numpy as np
import pytest

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets import acdc
from maskloom.data_prep.datasets.acdc import AcdcOptions, Adapter
from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.dataset.contract import LEDGER_FILE
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.experiment import experiment
from tests.writers.acdc import GROUPS, SHAPE, SPACING, at, drawn, frames_of, patient_folder, write_patient, write_raw
from tests.writers.nifti import rewrite, stored, write

AS_ACQUIRED = {"spacing_mm": None, "include_empty": True}


def adapter(folder, **options):
    return Adapter(folder, AcdcOptions(**options))


def volumes(folder, **options):
    entries = list(adapter(folder, **options).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, {
        e.path: e.reason for e in entries if isinstance(e, Reject)
    }


def slices(folder, volume="patient001-ED", **options):
    entries = list(adapter(folder, **options).expand(volumes(folder, **options)[0][volume]))
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, {
        e.path: e.reason for e in entries if isinstance(e, Reject)
    }


def loaded(folder, volume="patient001-ED", **options):
    return [adapter(folder, **options).load(item) for item in slices(folder, volume, **options)[0].values()]


@pytest.fixture
def one(tmp_path):
    """The folder with patient 1 only."""
    write_patient(tmp_path, 1)
    return tmp_path


def info_of(folder, text):
    (patient_folder(folder, 1) / "Info.cfg").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("patient", [1, 5, 102])
@pytest.mark.parametrize("phase", ["ED", "ES"])
def test_each_slice_is_what_was_drawn(tmp_path, patient, phase):
    write_patient(tmp_path, patient)
    image, mask = drawn(patient, phase)
    read = loaded(tmp_path, f"patient{patient:03d}-{phase}", **AS_ACQUIRED)
    np.testing.assert_array_equal([raw.image for raw in read], image)
    np.testing.assert_array_equal([raw.mask for raw in read], mask)
    assert {raw.value_range for raw in read} == {tuple(np.percentile(image, (1, 99)))}


def test_the_phases_are_those_of_info_cfg(tmp_path):
    write_patient(tmp_path, 5)
    found = volumes(tmp_path)[0]
    assert frames_of(5) == (4, 14)
    assert {name: item.path.rsplit("_", 1)[1] for name, item in found.items()} == {
        "patient005-ED": "frame04.nii.gz",
        "patient005-ES": "frame14.nii.gz",
    }
    assert [item.attributes["phase"] for item in found.values()] == ["end-diastole", "end-systole"]


def test_the_later_frame_can_be_diastole(one):
    info_of(one, "ED: 12\nES: 1\nGroup: NOR\n")
    assert volumes(one)[0]["patient001-ED"].path.endswith("frame12.nii.gz")


def test_patients_groups_labels_and_splits(tmp_path):
    write_raw(tmp_path)
    items, rejects = volumes(tmp_path)
    assert len(items) == 26 and rejects == {}
    for sample_id, item in items.items():
        number = int(sample_id[7:10])
        assert item.group == f"patient{number:03d}" and item.split == ("test" if number > 100 else None)
        assert item.label == GROUPS[number % 5]
        assert item.mask_paths == (item.path.replace(".nii.gz", "_gt.nii.gz"),)
    assert list(items)[:4] == ["patient001-ED", "patient001-ES", "patient002-ED", "patient002-ES"]
    part = slices(tmp_path, "patient101-ES")[0]
    assert list(part) == [f"patient101-ES-{index:02d}" for index in range(1, 6)]
    for item in part.values():
        whole = items["patient101-ES"]
        assert (item.label, item.group, item.split, item.mask_paths) == (
            whole.label,
            whole.group,
            "test",
            whole.mask_paths,
        )
        assert item.path == f"{whole.path}#slice={item.sample_id[-2:]}"


@pytest.mark.parametrize("group", GROUPS)
def test_each_diagnosis_has_words(tmp_path, group):
    write_patient(tmp_path, 1, group)
    words = {
        "NOR": "normal heart",
        "MINF": "previous myocardial infarction",
        "DCM": "dilated cardiomyopathy",
        "HCM": "hypertrophic cardiomyopathy",
        "RV": "abnormal right ventricle",
    }
    item = volumes(tmp_path)[0]["patient001-ED"]
    assert item.label == group and item.attributes["diagnosis"] == words[group]


def test_arv_is_another_name_of_rv(tmp_path):
    write_patient(tmp_path, 1, "ARV")
    assert volumes(tmp_path)[0]["patient001-ED"].label == "RV"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ES: 12\nGroup: NOR\n", r"Info\.cfg: ED is '', expected the number of a frame"),
        ("ED: one\nES: 12\nGroup: NOR\n", r"ED is 'one'"),
        ("ED: 1\nES: -2\nGroup: NOR\n", r"ES is '-2'"),
        ("ED: 1\nES: 1\nGroup: NOR\n", r"ED and ES are both frame 1"),
        ("ED: 1\nES: 12\n", r"Group is '', expected one of NOR, MINF, DCM, HCM, RV"),
        ("", r"ED is ''"),
    ],
)
def test_a_damaged_info_is_told(one, text, reason):
    info_of(one, text)
    items, rejects = volumes(one)
    assert not items and list(rejects) == [str(patient_folder(one, 1))]
    assert re.search(reason, *rejects.values())


def test_an_info_that_is_no_text_is_told(one):
    (patient_folder(one, 1) / "Info.cfg").write_bytes(b"\xff\xfe\x00")
    assert "Info.cfg cannot be decoded" in next(iter(volumes(one)[1].values()))


def test_a_frame_that_info_does_not_name_is_listed(one):
    for suffix in ("", "_gt"):
        shutil.copy(at(one, suffix=suffix), patient_folder(one, 1) / f"patient001_frame07{suffix}.nii.gz")
    items, rejects = volumes(one)
    assert len(items) == 2
    assert rejects == {
        str(
            patient_folder(one, 1) / f"patient001_frame07{suffix}.nii.gz"
        ): "Info.cfg names frames 1 (ED) and 12 (ES) only"
        for suffix in ("", "_gt")
    }


def test_one_phase_can_be_asked_for(one):
    items, rejects = volumes(one, phases=["ES"])
    assert list(items) == ["patient001-ES"]
    assert rejects == {str(at(one, "ED")): "ED is left out (data.options.phases)"}


def test_slices_without_label_are_kept_if_asked_for(one):
    kept, rejects = slices(one)
    assert list(kept) == [f"patient001-ED-{index:02d}" for index in range(1, 6)]
    assert rejects == {
        f"{at(one)}#slice=00": "no structure is labelled in this slice (data.options.include_empty=false)"
    }
    kept, rejects = slices(one, include_empty=True)
    assert next(iter(kept)) == "patient001-ED-00" and not rejects
    assert not adapter(one).load(kept["patient001-ED-00"]).mask.any()


@pytest.mark.parametrize("upside_down", [False, True])
def test_levels_run_from_the_larger_ventricle_to_the_apex(one, upside_down):
    if upside_down:
        for suffix in ("", "_gt"):
            rewrite(at(one, suffix=suffix), lambda values: values[:, :, ::-1])
    kept = slices(one, include_empty=True)[0]
    # The unlabelled slice lies beyond the apex.
    levels = ["apical", "apical", "apical", "mid-ventricular", "basal", "basal"]
    assert [item.attributes["level"] for item in kept.values()] == (levels[::-1] if upside_down else levels)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PLS", "SRA"])
def test_the_orientation_of_the_file_does_not_matter(one, orientation):
    image, mask = drawn(1, "ED")
    for suffix, seen in (("", image), ("_gt", mask)):
        write(at(one, suffix=suffix), *stored(seen, SPACING, orientation))
    # What is last in the file is the axis across the stack: the front-back axis of SRA.
    read = loaded(one, **AS_ACQUIRED)
    if orientation == "SRA":
        image, mask = (np.swapaxes(seen[::-1, ::-1], 0, 1) for seen in (image, mask))
    np.testing.assert_array_equal([raw.image for raw in read], image)
    np.testing.assert_array_equal([raw.mask for raw in read], mask)


def test_a_mask_that_is_stored_in_another_order_is_cut_like_its_image(one):
    image, mask = drawn(1, "ED")
    write(at(one), *stored(image, SPACING, "LPS"))
    write(at(one, suffix="_gt"), *stored(mask, SPACING, "SRA"))
    assert list(slices(one)[0]) == [f"patient001-ED-{index:02d}" for index in range(1, 6)]
    read = loaded(one, **AS_ACQUIRED)
    np.testing.assert_array_equal([raw.image for raw in read], image)
    np.testing.assert_array_equal([raw.mask for raw in read], mask)


def centre_mm(mask, label, spacing):
    """Centre of a structure from the middle of the picture, in mm."""
    return [
        (float(np.mean(c)) - (n - 1) / 2) * s
        for c, n, s in zip(np.nonzero(mask == label), mask.shape, spacing, strict=True)
    ]


def test_a_structure_of_one_voxel_is_still_there_at_a_coarse_spacing(one):
    def dotted(voxels):
        voxels = np.zeros_like(voxels)
        voxels[5, 6] = 2
        return voxels

    rewrite(at(one, suffix="_gt"), dotted)
    masks = [raw.mask for raw in loaded(one, spacing_mm=10)]
    assert len(masks) >= 5 and all((mask == 2).sum() == 1 for mask in masks)


@pytest.mark.parametrize("spacing", [1.5625, 1.0, 2.5])
def test_resampling_keeps_sizes_in_mm(one, spacing):
    (right, anterior, _), (_, mask) = SPACING, drawn(1, "ED")
    read = loaded(one, spacing_mm=spacing)
    assert len(read) == 5
    for raw, seen in zip(read, mask[1:], strict=True):
        assert raw.image.shape == raw.mask.shape == (int(28 * anterior / spacing), int(24 * right / spacing))
        assert set(np.unique(raw.mask)) == set(np.unique(seen))
        for label in np.unique(seen):
            assert np.sum(raw.mask == label) * spacing**2 == pytest.approx(
                np.sum(seen == label) * right * anterior, rel=0.12
            )
            assert centre_mm(raw.mask, label, (spacing, spacing)) == pytest.approx(
                centre_mm(seen, label, (anterior, right)), abs=0.6 * spacing
            )


def test_image_and_mask_are_resampled_alike(one):
    mask = drawn(1, "ED")[1]
    seen = (mask > 0).astype(np.uint16) * 1000
    write(at(one), *stored(seen, SPACING), edit=lambda header: header.__setitem__("sform_code", 1))
    write(at(one, suffix="_gt"), *stored(mask, SPACING))
    for raw in loaded(one, spacing_mm=1.0):
        different = (raw.image > 500) != (raw.mask > 0)
        # Cubic interpolation rounds the corners of 6 x 5 mm voxels; a shift of half a voxel would
        # change far more.
        assert different.sum() < 0.12 * (raw.mask > 0).sum()


def test_reducing_does_not_alias(one):
    lines = np.zeros(SHAPE, np.uint16)
    lines[:, ::2] = 1000
    write(at(one), *stored(lines, SPACING))
    write(at(one, suffix="_gt"), *stored(drawn(1, "ED")[1], SPACING))
    for raw in loaded(one, spacing_mm=10):
        assert np.all(np.abs(raw.image[1:-1] - 500) < 160)


def test_the_field_of_view_is_cut_around_the_centre(one):
    image, mask = drawn(1, "ED")
    for raw, seen, labels in zip(loaded(one, **AS_ACQUIRED, field_mm=60), image, mask, strict=True):
        np.testing.assert_array_equal(raw.image, seen[8:20, 7:17])  # 12 rows of 5 mm, 10 columns of 6 mm
        np.testing.assert_array_equal(raw.mask, labels[8:20, 7:17])


def test_the_field_of_view_is_padded_with_black(one):
    image, mask = drawn(1, "ED")
    for raw, seen, labels in zip(loaded(one, **AS_ACQUIRED, field_mm=180), image, mask, strict=True):
        padded = np.pad(seen.astype(np.float32), ((4, 4), (3, 3)), constant_values=np.float32(raw.value_range[0]))
        np.testing.assert_array_equal(raw.image, padded)
        np.testing.assert_array_equal(raw.mask, np.pad(labels, ((4, 4), (3, 3))))


def test_every_slice_has_the_size_of_the_field_of_view(one):
    for raw in loaded(one, spacing_mm=2, field_mm=100):
        assert raw.image.shape == raw.mask.shape == (50, 50)
    whole, part = loaded(one, spacing_mm=2), loaded(one, spacing_mm=2, field_mm=100)
    for one_raw, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(one_raw.mask[10:60, 11:61], other.mask)  # 70 x 72 pixels: cut by 10 and 11


def test_a_slice_that_would_be_huge_is_rejected(one):
    for suffix in ("", "_gt"):
        rewrite(at(one, suffix=suffix), edit=lambda header: header["pixdim"].__setitem__(slice(1, 3), 90))
    with pytest.raises(RejectedSample, match=r"data\.options\.spacing_mm=0\.5, the slice would be 4320x5040"):
        loaded(one, spacing_mm=0.5)


def test_the_window_is_an_option(one):
    image, _ = drawn(1, "ED")
    percentile = loaded(one, window=IntensityWindow(lower=5, upper=95))
    assert {raw.value_range for raw in percentile} == {tuple(np.percentile(image, (5, 95)))}
    fixed = loaded(one, window={"method": "window", "center": 200, "width": 100})
    assert {raw.value_range for raw in fixed} == {(150.0, 250.0)}


def test_a_volume_is_read_once_for_all_its_slices(one, monkeypatch):
    reads = []
    for name in ("read_volume", "read_labels"):
        real = getattr(acdc, name)
        monkeypatch.setattr(acdc, name, lambda path, *rest, real=real: reads.append(path.name) or real(path, *rest))
    assert len(loaded(one)) == 5 and len(loaded(one, "patient001-ES")) == 5
    assert reads == [f"patient001_frame{frame}{suffix}.nii.gz" for frame in ("01", "12") for suffix in ("", "_gt")]


def test_a_replaced_volume_is_read_again(one):
    before = loaded(one, **AS_ACQUIRED)[3].image
    rewrite(at(one), lambda values: values + 1)
    np.testing.assert_array_equal(loaded(one, **AS_ACQUIRED)[3].image, before + 1)


def test_the_folder_may_be_above_or_inside(tmp_path):
    raw = tmp_path / "ACDC"
    for patient in (1, 101):
        write_patient(raw, patient)
    database = raw / "database"
    for folder in (tmp_path, raw, database):
        assert {name: item.split for name, item in volumes(folder)[0].items()} == {
            "patient001-ED": None,
            "patient001-ES": None,
            "patient101-ED": "test",
            "patient101-ES": "test",
        }
        assert Adapter.recognises(folder)
    assert {item.split for item in volumes(database / "testing")[0].values()} == {"test"}
    assert {item.split for item in volumes(database / "training")[0].values()} == {None}


def test_a_patient_of_both_sets_is_read_once(one):
    shutil.copytree(patient_folder(one, 1), one / "database" / "testing" / "patient001")
    items, rejects = volumes(one)
    assert all("training" in item.path for item in items.values()) and len(items) == 2
    assert rejects == {str(one / "database" / "testing" / "patient001"): "patient001 is already read from training"}


def test_plain_nii_files_are_read(one):
    from nibabel import load, save

    for path in sorted(patient_folder(one, 1).glob("*frame*.nii.gz")):
        save(load(path), path.with_suffix(""))
        path.unlink()
    assert [item.path.endswith("frame01.nii") for item in volumes(one)[0].values()] == [True, False]


def test_missing_files_are_listed(tmp_path):
    for patient in (1, 2):
        write_patient(tmp_path, patient)
    at(tmp_path, "ED").unlink()
    at(tmp_path, "ES", "_gt").unlink()
    (patient_folder(tmp_path, 2) / "Info.cfg").unlink()
    items, rejects = volumes(tmp_path)
    assert items == {}
    assert rejects == {
        str(at(tmp_path, "ED")).removesuffix(".nii.gz"): "no patient001_frame01.nii.gz, though Info.cfg says ED: 1",
        str(at(tmp_path, "ES")): "no ground truth patient001_frame12_gt.nii.gz belongs to this volume",
        str(patient_folder(tmp_path, 2)): "Info.cfg cannot be decoded (no such file)",
    }


def test_an_unreadable_volume_is_one_reject_and_not_one_a_slice(one):
    at(one).write_bytes(b"x")
    with pytest.raises(RejectedSample, match=r"patient001_frame01\.nii\.gz is cut short"):
        slices(one)


def test_a_volume_that_vanishes_is_rejected(one):
    item = slices(one)[0]["patient001-ED-03"]
    at(one).unlink()
    with pytest.raises(RejectedSample, match="no such file"):
        adapter(one).load(item)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "cats").mkdir()
    assert not Adapter.recognises(tmp_path)
    with pytest.raises(MaskLoomError, match=r"not ACDC: no folder training/patient001"):
        list(adapter(tmp_path).scan())
    (tmp_path / "training" / "patient001").mkdir(parents=True)
    assert not Adapter.recognises(tmp_path)


@pytest.mark.parametrize(
    "options", [{"phases": []}, {"phases": ["EX"]}, {"spacing_mm": 0}, {"field_mm": -1}, {"spacing": 1}]
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AcdcOptions(**options)


# Patients that the release holds under two names


def test_the_releases_patients_with_two_names_are_one_group_each(tmp_path):
    raw = tmp_path / "raw"
    for patient in (1, 2, 3, 55, 74, 76, 101, 118):
        write_patient(raw, patient, "DCM")
    run = tmp_path / "run"
    prepare(experiment(run, "acdc", raw, options={"field_mm": 32, "include_empty": True}), force=False)
    splits = defaultdict(set)
    for split, ids in _ids(run):
        for sample, group in ids:
            splits[sample[:10]].add((split, group))
    assert splits["patient118"] == {("test", "patient055")} and "patient055" not in splits
    assert splits["patient074"] == splits["patient076"] and len(splits["patient074"]) == 1
    reasons = [json.loads(line)["reason"] for line in (run / "dataset" / LEDGER_FILE).read_text().splitlines()]
    assert len(reasons) == 12
    assert all(r.startswith("group patient055 also lies in the dataset's test split: patient118-E") for r in reasons)


def test_patients_with_equal_voxels_that_no_list_names_are_found(tmp_path, capsys):
    raw = tmp_path / "raw"
    for patient in (1, 2, 3, 4, 101):
        write_patient(raw, patient, "DCM")
    for twin in (5, 102):
        source = patient_folder(raw, twin - 1)
        for file in source.iterdir():
            target = patient_folder(raw, twin) / file.name.replace(source.name, f"patient{twin:03d}")
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)
    shutil.copytree(patient_folder(raw, 1), twin := patient_folder(raw, 103))
    for file in twin.iterdir():
        file.rename(file.with_name(file.name.replace("patient001", "patient103")))
    run = tmp_path / "run"
    prepare(experiment(run, "acdc", raw, options={"field_mm": 32}), force=False)
    groups = {sample[:10]: (split, group) for split, ids in _ids(run) for sample, group in ids}
    assert "patient001" not in groups
    assert groups["patient103"] == ("test", "patient001")
    assert groups["patient004"] == groups["patient005"]
    assert groups["patient101"] == groups["patient102"] == ("test", "patient101")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "united, each now lies in one split: patient001 = patient103; patient004 = patient005; patient101 = patient102"
        in said
    )


def _ids(run):
    return MaskPromptDataset.open(run / "dataset").ids().items()
