"""What is round is round in the dataset, whatever the distances between rows and columns."""

from dataclasses import replace

import numpy as np
import pytest

from maskloom.data_prep.adapter import RawImage
from maskloom.data_prep.datasets import acdc, brats, dicom_folder
from maskloom.data_prep.processing.resizing import resized, true_proportions
from maskloom.data_prep.readers.dicom import SPACINGS, read_picture
from maskloom.data_prep.sources import Source
from maskloom.data_prep.survey import prepared_sample
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.errors import RejectedSample
from tests.writers import nifti
from tests.writers.brats import write_case
from tests.writers.dicom_folder import dataset, save

SIZES = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (0.3, 0.75), (5.0, 0.8)]


def disc(pixel_size):
    """Return an image and a mask of a disc of 50 mm in a field of 128 x 128 mm."""
    tall, wide = pixel_size
    y, x = np.mgrid[: round(128 / tall), : round(128 / wide)]
    inside = ((y + 0.5) * tall - 60) ** 2 + ((x + 0.5) * wide - 70) ** 2 < 25**2
    return (inside * np.uint8(255)), inside.astype(np.uint8)


def sides(region):
    rows, columns = np.nonzero(region)
    return np.ptp(rows) + 1, np.ptp(columns) + 1


@pytest.mark.parametrize("pixel_size", SIZES)
@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 128)])
def test_a_disc_is_round_in_image_and_mask(pixel_size, mode, size):
    image, mask = disc(pixel_size)
    picture, small, _ = resized(RawImage(image, mask, pixel_size=pixel_size), size, mode, 1)
    for region in (picture > 127, small > 0):
        high, wide = sides(region)
        assert abs(high - wide) <= max(2, 0.08 * high), (high, wide)
    assert ((picture > 127) != (small > 0)).mean() < 0.02


def test_stretching_keeps_no_proportions():
    image, mask = disc((2.0, 1.0))
    _, small, _ = resized(RawImage(image, mask, pixel_size=(2.0, 1.0)), (64, 128), "stretch", 1)
    high, wide = sides(small)
    assert wide == pytest.approx(2 * high, abs=2)


@pytest.mark.parametrize("pixel_size", [None, (0.7, 0.7), (0.7, 0.7005), (3.0, 2.98)])
def test_square_pixels_are_left_alone(pixel_size):
    random = np.random.default_rng(0)
    image, mask = random.integers(0, 256, (50, 71), np.uint8), random.integers(0, 3, (50, 71), np.uint8)
    assert true_proportions(RawImage(image, mask, pixel_size=pixel_size)) == (50, 71)
    for mode in ("pad", "crop", "stretch"):
        expected = resized(RawImage(image, mask), (64, 64), mode, 1)
        got = resized(RawImage(image, mask, pixel_size=pixel_size), (64, 64), mode, 1)
        np.testing.assert_array_equal(got.image, expected.image)
        np.testing.assert_array_equal(got.mask, expected.mask)


def test_proportions_are_in_units_of_the_shorter_side():
    image = np.zeros((10, 30), np.uint8)
    assert true_proportions(RawImage(image, None, pixel_size=(3.0, 1.0))) == (30, 30)
    assert true_proportions(RawImage(image, None, pixel_size=(0.5, 1.0))) == (10, 60)


# DICOM


def picture_of(tmp_path, **tags):
    save(tmp_path / "a.dcm", dataset(**tags))
    return read_picture(tmp_path / "a.dcm", 0, None)


@pytest.mark.parametrize("tag", SPACINGS)
def test_dicom_pixels_have_the_size_that_the_file_tells(tmp_path, tag):
    assert picture_of(tmp_path, **{tag: [4, 3]}).pixel_size == (4.0, 3.0)


def test_the_distance_in_the_patient_counts_before_others(tmp_path):
    tags = {"PixelSpacing": [2.0, 1.0], "ImagerPixelSpacing": [1.0, 1.0], "PixelAspectRatio": [7, 1]}
    assert picture_of(tmp_path, **tags).pixel_size == (2.0, 1.0)
    tags["PixelSpacing"] = [0.0, 0.0]  # not known
    assert picture_of(tmp_path, **tags).pixel_size == (1.0, 1.0)


@pytest.mark.parametrize("value", [None, "", [0, 0], [1.0], [-1, 1]])
def test_what_tells_no_size_leaves_pixels_square(tmp_path, value):
    assert picture_of(tmp_path, PixelSpacing=value).pixel_size is None


def test_impossible_sizes_are_rejected(tmp_path):
    with pytest.raises(RejectedSample, match=r"its PixelSpacing says that a pixel's sides are as 40 to 1"):
        picture_of(tmp_path, PixelSpacing=[40, 1])


def test_frames_have_the_size_of_their_functional_group(tmp_path):
    from pydicom.dataset import Dataset

    measures, group = Dataset(), Dataset()
    measures.PixelSpacing = [3.0, 1.5]
    group.PixelMeasuresSequence = [measures]
    assert picture_of(tmp_path, SharedFunctionalGroupsSequence=[group]).pixel_size == (3.0, 1.5)


def prepared(adapter, item, **data):
    info = adapter.info()
    source = Source("name", adapter, info, info.labels, "none")
    config = DataConfig(dataset="dicom_folder", image_size=64, **data)
    return prepared_sample(source, config, 1, info.palette, None, item)


def test_dicom_slices_are_prepared_round_and_in_the_bucket_of_their_shape(tmp_path):
    image, _ = disc((2.0, 1.0))  # 64 x 128 pixels of a square
    save(tmp_path / "a.dcm", dataset(pixels=image.astype(np.uint16) * 9, PixelSpacing=[2.0, 1.0]))
    adapter = dicom_folder.Adapter(tmp_path, dicom_folder.Adapter.Options())
    (item,) = adapter.scan()
    sample = prepared(adapter, item, buckets=[[32, 64]], conditioning="edges")
    assert sample.image.shape == (64, 64)
    high, wide = sides(sample.image > 127)
    assert high == pytest.approx(wide, abs=2)


def test_the_paired_picture_has_the_geometry_of_its_image(tmp_path):
    image, _ = disc((2.0, 1.0))

    class Paired(dicom_folder.Adapter):
        def load(self, item):
            return RawImage(image, None, condition=np.stack([image] * 3, axis=-1), pixel_size=(2.0, 1.0))

        def info(self):
            return replace(super().info(), paired_image="the same")

    save(tmp_path / "a.dcm", dataset())
    adapter = Paired(tmp_path, dicom_folder.Adapter.Options())
    (item,) = adapter.scan()
    sample = prepared(adapter, item, conditioning="image")
    np.testing.assert_array_equal(sample.conditioning_image[..., 0], sample.image)


# NIfTI


def test_brats_slices_have_the_size_of_the_voxels(tmp_path):
    write_case(tmp_path, "BraTS2021_00000", 0)
    for path in (tmp_path / "BraTS2021_00000").glob("*.nii.gz"):
        nifti.rewrite(path, edit=lambda header: header["pixdim"].__setitem__(slice(1, 4), (1.0, 2.5, 1.0)))
    for modality in (["flair"], ["t1", "t2", "flair"]):
        adapter = brats.Adapter(tmp_path, brats.Adapter.Options(modality=modality, min_tumour_area_mm2=0))
        (item,) = adapter.scan()
        raw = adapter.load(next(iter(adapter.expand(item))))
        assert raw.pixel_size == (2.5, 1.0)


def test_acdc_slices_that_are_not_resampled_have_the_size_of_the_voxels(tmp_path):
    from tests.writers.acdc import write_patient

    write_patient(tmp_path, 1)
    for spacing, known in ((None, True), (1.5, False)):
        adapter = acdc.Adapter(tmp_path, acdc.Adapter.Options(spacing_mm=spacing))
        item = next(iter(adapter.scan()))
        raw = adapter.load(next(e for e in adapter.expand(item) if hasattr(e, "sample_id")))
        assert (raw.pixel_size is not None) is known
