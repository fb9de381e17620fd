import shutil

import numpy as np
import pytest

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets import brats
from maskloom.data_prep.datasets.brats import Adapter, BratsOptions
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.writers.brats import ROOT, SHAPE, SPACING, VALUES_2023, at, drawn, write_case, write_raw
from tests.writers.nifti import rewrite

AREA = SPACING[0] * SPACING[1]  # mm2 of a pixel
EVERY_TUMOUR = {"slices_per_volume": None, "min_tumour_area_mm2": 0}


def adapter(folder, **options):
    return Adapter(folder, BratsOptions(**options))


def cases(folder, **options):
    entries = list(adapter(folder, **options).scan())
    return (
        {e.sample_id: e for e in entries if isinstance(e, RawItem)},
        {e.path: e.reason for e in entries if isinstance(e, Reject)},
    )


def slices(folder, case="BraTS2021_00000", **options):
    """The items of one case by the index of the slice."""
    items = list(adapter(folder, **options).expand(cases(folder, **options)[0][case]))
    return {int(item.sample_id[-3:]): item for item in items}


def loaded(folder, case="BraTS2021_00000", **options):
    return {index: adapter(folder, **options).load(item) for index, item in slices(folder, case, **options).items()}


@pytest.fixture
def one(tmp_path):
    """The folder with one case of 2021."""
    write_case(tmp_path / ROOT, "BraTS2021_00000", 0)
    return tmp_path


def tumour_area(mask):
    return (mask > 0).sum(axis=(1, 2)) * AREA


@pytest.mark.parametrize("modality", ["t1", "t1ce", "t2", "flair"])
@pytest.mark.parametrize("orientation", ["LPS", "RAS", "ASL"])
def test_each_slice_is_what_was_drawn(tmp_path, modality, orientation):
    write_case(tmp_path, "BraTS2021_00007", 7, orientation=orientation)
    images, mask = drawn(7)
    read = loaded(tmp_path, "BraTS2021_00007", modality=modality, **EVERY_TUMOUR)
    assert list(read) == [2, 3, 4, 5, 6]
    for index, raw in read.items():
        np.testing.assert_array_equal(raw.image, images[modality][index])
        np.testing.assert_array_equal(raw.mask, mask[index])
        assert raw.image.dtype == np.int16


RELEASES = {
    "BraTS2021_00003": {},
    "BraTS20_Training_003": {"suffix": ".nii"},
    "BraTS20_Training_004": {},
    "BraTS19_TMC_06290_1": {},
    "Brats18_2013_2_1": {},
    "Brats17_TCIA_101_1": {},
    "BraTS-GLI-00003-000": {"values": VALUES_2023},
    "BraTS-SSA-00003-000": {"values": VALUES_2023},
}


@pytest.mark.parametrize("case", RELEASES)
def test_every_release_gives_the_same_classes(tmp_path, case):
    write_case(tmp_path, case, 3, **RELEASES[case])
    images, mask = drawn(3)
    assert set(np.unique(mask)) == {0, 1, 2, 3}
    assert Adapter.recognises(tmp_path)
    for modality in ("t1", "t1ce", "t2", "flair"):
        for index, raw in loaded(tmp_path, case, modality=modality, **EVERY_TUMOUR).items():
            np.testing.assert_array_equal(raw.image, images[modality][index])
            np.testing.assert_array_equal(raw.mask, mask[index])


@pytest.mark.parametrize(
    ("case", "value", "reason"),
    [
        ("BraTS2021_00000", 3, r"_seg\.nii\.gz holds the unknown label value 3; BraTS 2017-2021 has only 0, 1, 2, 4"),
        ("BraTS20_Training_001", 3, r"unknown label value 3; BraTS 2017-2021 has only"),
        ("BraTS-GLI-00000-000", 4, r"-seg\.nii\.gz holds the unknown label value 4; BraTS 2023 has only 0, 1, 2, 3"),
    ],
)
def test_a_value_of_the_other_scheme_is_rejected(tmp_path, case, value, reason):
    write_case(tmp_path, case, 0, values=np.array([0, 1, 2, value], np.uint8))
    with pytest.raises(RejectedSample, match=reason):
        slices(tmp_path, case)


def test_the_misnamed_segmentation_of_case_355_is_found(tmp_path):
    for case in ("BraTS20_Training_355", "BraTS20_Training_354"):
        folder = write_case(tmp_path, case, 3, suffix=".nii")
        (folder / f"{case}_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    items, rejects = cases(tmp_path)
    assert list(items) == ["BraTS20_Training_355"]
    assert list(rejects.values()) == ["no segmentation BraTS20_Training_354_seg.nii.gz: a case of the validation set?"]
    mask = drawn(3)[1]
    for index, raw in loaded(tmp_path, "BraTS20_Training_355").items():
        np.testing.assert_array_equal(raw.mask, mask[index])


def test_time_points_of_a_patient_are_one_group(tmp_path):
    for number, case in enumerate(("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00001-000")):
        write_case(tmp_path, case, number, values=VALUES_2023)
    assert {name: item.group for name, item in cases(tmp_path)[0].items()} == {
        "BraTS-GLI-00000-000": "BraTS-GLI-00000",
        "BraTS-GLI-00000-001": "BraTS-GLI-00000",
        "BraTS-GLI-00001-000": "BraTS-GLI-00001",
    }
    item = slices(tmp_path, "BraTS-GLI-00000-001")[4]
    assert item.group == "BraTS-GLI-00000" and item.sample_id == "BraTS-GLI-00000-001-004"


def test_cases_of_other_releases_are_groups_of_their_own(tmp_path):
    write_raw(tmp_path)
    items = cases(tmp_path)[0]
    assert list(items) == [f"BraTS2021_{number:05d}" for number in range(12)]
    assert all(item.group == name and item.split is None and item.label is None for name, item in items.items())


def test_the_grade_is_told_by_the_folder(tmp_path):
    write_case(tmp_path / "MICCAI_BraTS_2019_Data_Training" / "HGG", "BraTS19_CBICA_AAB_1", 0)
    write_case(tmp_path / "MICCAI_BraTS_2019_Data_Training" / "LGG", "BraTS19_TCIA09_177_1", 1)
    assert {name: item.attributes["tumour"] for name, item in cases(tmp_path)[0].items()} == {
        "BraTS19_CBICA_AAB_1": "high-grade glioma",
        "BraTS19_TCIA09_177_1": "low-grade glioma",
    }
    assert slices(tmp_path, "BraTS19_TCIA09_177_1")[4].attributes["finding"] == "low-grade glioma"


def test_cases_are_found_in_nested_folders(tmp_path):
    write_case(tmp_path / "BraTS2020_TrainingData" / "MICCAI_BraTS2020_TrainingData", "BraTS20_Training_001", 0)
    (tmp_path / "BraTS2020_TrainingData" / "MICCAI_BraTS2020_TrainingData" / "name_mapping.csv").write_text("x")
    below = tmp_path
    for name in (None, "BraTS2020_TrainingData", "MICCAI_BraTS2020_TrainingData", "BraTS20_Training_001"):
        below = below / name if name else below
        assert list(cases(below)[0]) == ["BraTS20_Training_001"]


@pytest.mark.parametrize(
    "name",
    ["BraTS2021_Training_Data", "BraTS2020_TrainingData", "BraTS-MEN-00000-000", "MICCAI_BraTS2020_TrainingData"],
)
def test_other_folders_are_no_cases(tmp_path, name):
    (tmp_path / name).mkdir()
    assert not Adapter.recognises(tmp_path)
    with pytest.raises(MaskLoomError, match=r"not BraTS: no folder such as BraTS20_Training_001"):
        list(adapter(tmp_path).scan())


def test_releases_are_not_mixed(one):
    write_case(one, "BraTS-GLI-00000-000", 1, values=VALUES_2023)
    with pytest.raises(
        MaskLoomError,
        match=r"cases of several releases \(BraTS2021_00000 and BraTS-GLI-00000-000\), which share patients",
    ):
        list(adapter(one).scan())


def test_a_case_that_is_there_twice_is_read_once(one):
    shutil.copytree(one / ROOT / "BraTS2021_00000", one / "again" / "BraTS2021_00000")
    items, rejects = cases(one)
    assert list(items) == ["BraTS2021_00000"]
    assert rejects == {str(one / "again" / "BraTS2021_00000"): f"BraTS2021_00000 is already read from {ROOT}"} or (
        rejects == {str(one / ROOT / "BraTS2021_00000"): "BraTS2021_00000 is already read from again"}
    )


@pytest.mark.parametrize("modality", ["t1", "t1ce", "t2", "flair"])
def test_a_missing_sequence_is_named(one, modality):
    at(one, modality).unlink()
    case = str(one / ROOT / "BraTS2021_00000")
    assert cases(one, modality=modality) == ({}, {case: f"no BraTS2021_00000_{modality}.nii.gz"})
    others = [name for name in ("t1", "t1ce", "t2", "flair") if name != modality]
    assert cases(one, modality=others)[1] == {}  # what is not asked for need not be there


def test_a_missing_sequence_is_named_as_2023_names_it(tmp_path):
    folder = write_case(tmp_path, "BraTS-GLI-00000-000", 0, values=VALUES_2023)
    (folder / "BraTS-GLI-00000-000-t2f.nii.gz").unlink()
    assert list(cases(tmp_path)[1].values()) == ["no BraTS-GLI-00000-000-t2f.nii.gz"]


def test_cases_without_segmentation_are_listed(one):
    at(one, "seg").unlink()
    assert cases(one) == (
        {},
        {
            str(
                one / ROOT / "BraTS2021_00000"
            ): "no segmentation BraTS2021_00000_seg.nii.gz: a case of the validation set?"
        },
    )


def test_three_sequences_become_channels_each_with_its_window(one):
    images, mask = drawn(0)
    chosen = ("t2", "t1ce", "flair")
    a = adapter(one, modality=list(chosen))
    assert a.info().channels == 3
    for index, raw in loaded(one, modality=list(chosen)).items():
        assert raw.value_range == (0.0, 1.0) and raw.image.dtype == np.float32
        np.testing.assert_array_equal(raw.mask, mask[index])
        for channel, name in enumerate(chosen):
            brain = images[name][images[name] != 0]
            black, white = np.percentile(brain, (1, 99))
            expected = np.clip((images[name][index] - black) / (white - black), 0, 1)
            np.testing.assert_allclose(raw.image[..., channel], expected, atol=1e-6)


def test_the_window_is_taken_over_the_voxels_that_are_not_zero(one):
    image = drawn(0)[0]["flair"]
    brain = image[image != 0]
    assert {raw.value_range for raw in loaded(one).values()} == {tuple(np.percentile(brain, (1, 99)))}
    window = {"lower": 10, "upper": 80}
    assert {raw.value_range for raw in loaded(one, window=window).values()} == {tuple(np.percentile(brain, (10, 80)))}
    mean, deviation = brain.mean(), brain.std()
    (found,) = {raw.value_range for raw in loaded(one, window={"method": "zscore", "deviations": 2}).values()}
    assert found == pytest.approx((mean - 2 * deviation, mean + 2 * deviation))


def test_slices_with_little_tumour_are_left_out(one):
    areas = tumour_area(drawn(0)[1])
    assert areas[[0, 1, 7]].max() == 0 and sorted(set(areas[2:7]))[0] < areas[4] == areas.max()
    for least in (0, 1, areas[3], areas[3] + 1, areas[4]):
        found = slices(one, min_tumour_area_mm2=least, slices_per_volume=None)
        assert list(found) == [index for index in range(SHAPE[0]) if areas[index] and areas[index] >= least]
    with pytest.raises(
        RejectedSample, match=rf"no slice of .* holds {areas[4] + 1:g} mm2 of tumour .* the most is {areas[4]:.0f}"
    ):
        slices(one, min_tumour_area_mm2=areas[4] + 1)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [4]), (2, [3, 5]), (3, [2, 4, 6]), (4, [2, 3, 5, 6]), (5, [2, 3, 4, 5, 6]), (99, [2, 3, 4, 5, 6])],
)
def test_slices_are_spread_evenly(one, count, expected):
    assert list(slices(one, slices_per_volume=count, min_tumour_area_mm2=0)) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_largest_slices_can_be_asked_for(one, count):
    areas = tumour_area(drawn(0)[1])
    found = list(slices(one, slices_per_volume=count, selection="largest", min_tumour_area_mm2=0))
    assert found == sorted(found) and len(found) == min(count, 5)
    assert sorted(areas[found], reverse=True) == sorted(areas, reverse=True)[: len(found)]


def test_slices_without_tumour_can_be_asked_for(one):
    images, mask = drawn(0)
    brain = (images["flair"] > 0).sum(axis=(1, 2))
    healthy = [i for i in range(SHAPE[0]) if not mask[i].any() and brain[i] * 2 >= brain.max()]
    assert healthy  # among them none that is nearly empty
    assert set(slices(one)) & set(healthy) == set()
    items = slices(one, healthy_slices_per_volume=5)
    assert sorted(items) == sorted([*slices(one), *healthy])
    for index in healthy:
        assert items[index].attributes["finding"] == "no visible tumour"
        assert not adapter(one).load(items[index]).mask.any()
    assert items[4].attributes["finding"] == "glioma"


def test_levels_are_thirds_of_the_brain(one):
    found = slices(one, **EVERY_TUMOUR, healthy_slices_per_volume=5)
    brain = [index for index, plane in enumerate(drawn(0)[0]["flair"]) if plane.any()]
    assert (brain[0], brain[-1]) == (1, 7)
    expected = dict(zip(range(1, 8), ["inferior"] * 2 + ["middle"] * 3 + ["superior"] * 2, strict=True))
    assert {index: item.attributes["level"] for index, item in found.items()} == {i: expected[i] for i in found}


def test_a_case_is_read_once_for_all_its_slices(one, monkeypatch):
    reads = []
    for name in ("read_volume", "read_labels"):
        real = getattr(brats, name)
        monkeypatch.setattr(brats, name, lambda path, *rest, real=real: reads.append(path.name) or real(path, *rest))
    assert len(loaded(one, modality=["t1", "t2", "flair"])) > 3
    assert sorted(reads) == sorted(f"BraTS2021_00000_{name}.nii.gz" for name in ("t1", "t2", "flair", "seg"))


def test_a_replaced_volume_is_read_again(one):
    before = loaded(one)[4].image
    rewrite(at(one, "flair"), lambda values: values + 1)
    np.testing.assert_array_equal(loaded(one)[4].image, before + 1)


def test_paths_name_the_sequence_and_the_slice(one):
    item = slices(one, modality=["t2", "t1", "flair"])[4]
    assert item.path == f"{at(one, 't2')}#slice=004" and item.mask_paths == (str(at(one, "seg")),)


def test_a_case_whose_files_do_not_fit_is_rejected(one):
    rewrite(at(one, "t2"), lambda values: values[:, :-1])
    assert slices(one)  # flair fits
    with pytest.raises(RejectedSample, match=r"_seg\.nii\.gz has 24x28x8 voxels, BraTS2021_00000_t2\.nii\.gz 24x27x8"):
        slices(one, modality=["flair", "t2", "t1"])


@pytest.mark.parametrize(
    ("modality", "words"),
    [
        ("flair", "FLAIR brain MRI"),
        ("t1ce", "contrast-enhanced T1 brain MRI"),
        (
            ["flair", "t1ce", "t2"],
            "multi-sequence brain MRI (FLAIR, contrast-enhanced T1 and T2 in red, green and blue)",
        ),
    ],
)
def test_the_modality_is_said_in_words(one, modality, words):
    assert adapter(one, modality=modality).info().modality == words


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modality": "t1c"}, "modality.*t1c.*'t1', 't1ce', 't2' or 'flair'"),
        ({"modality": ["t1", "t2"]}, "modality.*give one sequence, or a list of three"),
        ({"slices_per_volume": 0}, "slices_per_volume"),
        ({"selection": "best"}, "selection"),
        ({"min_tumor_area": 3}, "min_tumor_area"),
    ],
)
def test_wrong_options_are_told(options, reason):
    with pytest.raises(MaskLoomError, match=reason):
        validated(options, BratsOptions, "data.options")
