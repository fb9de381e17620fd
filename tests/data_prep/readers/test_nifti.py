import gzip
import re
import tracemalloc

import nibabel
import numpy as np
import pytest

from maskloom.data_prep.readers import nifti
from maskloom.data_prep.readers.nifti import (
    AXIAL,
    CORONAL,
    SAGITTAL,
    contrast_range,
    file_version,
    nifti_file,
    read_labels,
    read_volume,
    require_same_grid,
)
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.errors import RejectedSample
from tests.writers.nifti import rewrite, stored, write

SHAPE = (6, 8, 4)  # right, anterior, superior
SPACING = (2.0, 3.0, 5.0)
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "PIR", "SRA", "AIL", "IPL")
SAME = {0: 0, 1: 1, 2: 2, 3: 3}
MEBIBYTE = 2**20


def with_marker(path, orientation):
    """Write a volume whose only bright voxel is at the patient's left (second from the left), front
    (second) and third from the feet.
    """
    voxels, affine = stored(np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.int16), SPACING, orientation)
    world = np.array([-90.0, -126.0, -72.0]) + np.array([1, 6, 2]) * SPACING
    voxels[tuple(np.rint(np.linalg.inv(affine) @ (*world, 1))[:3].astype(int))] = 1000
    return write(path, voxels, affine)


def simple(path, voxels, edit=None):
    return write(path, np.asarray(voxels), np.diag([*SPACING, 1]), edit)


def noise(dtype=np.int16, shape=SHAPE):
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def fields(**values):
    def edit(header):
        for name, value in values.items():
            header[name] = value

    return edit


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_marker_lands_where_a_radiologist_expects_it(tmp_path, orientation):
    volume = read_volume(with_marker(tmp_path / "v.nii.gz", orientation))
    assert volume.values.shape == SHAPE and volume.spacing == pytest.approx(SPACING)
    axial, coronal, sagittal = (volume.picture(*cut) for cut in ((AXIAL, 2), (CORONAL, 6), (SAGITTAL, 1)))
    # Left of the patient is right in the picture, front and head are up; a sagittal picture faces
    # left.
    assert axial.shape == (8, 6) and np.argwhere(axial).tolist() == [[1, 4]]
    assert coronal.shape == (4, 6) and np.argwhere(coronal).tolist() == [[1, 4]]
    assert sagittal.shape == (4, 8) and np.argwhere(sagittal).tolist() == [[1, 1]]
    assert not volume.picture(AXIAL, 1).any()
    assert axial.flags.c_contiguous


def test_pixels_have_the_size_of_their_axes(tmp_path):
    volume = read_volume(with_marker(tmp_path / "v.nii", "PIR"))
    assert volume.pixel_mm(AXIAL) == pytest.approx((3, 2))
    assert volume.pixel_mm(CORONAL) == pytest.approx((5, 2))
    assert volume.pixel_mm(SAGITTAL) == pytest.approx((5, 3))


@pytest.mark.parametrize(("orientation", "axis"), [("LPS", AXIAL), ("PIR", SAGITTAL), ("LSP", CORONAL)])
def test_the_axis_across_a_stack_is_known(tmp_path, orientation, axis):
    assert read_volume(with_marker(tmp_path / "v.nii.gz", orientation)).stack_axis == axis


def test_voxels_stay_as_they_are_when_the_stack_is_oblique(tmp_path):
    turn = np.deg2rad(20)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, :3] = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]] @ affine[:3, :3]
    volume = read_volume(write(tmp_path / "v.nii.gz", noise(), affine))
    np.testing.assert_array_equal(volume.values, noise())
    assert volume.spacing == pytest.approx(SPACING)


def test_spacing_is_pixdim_where_the_sform_has_unit_scales(tmp_path):
    path = simple(tmp_path / "v.nii.gz", noise())
    rewrite(path, edit=fields(srow_x=(-1, 0, 0, 0), srow_y=(0, -1, 0, 0), srow_z=(0, 0, 1, 0)))
    volume = read_volume(path)
    assert volume.spacing == pytest.approx(SPACING)
    np.testing.assert_array_equal(volume.values, noise()[::-1, ::-1])


def test_the_qform_and_else_the_spacing_alone_orient_a_volume(tmp_path):
    path = simple(tmp_path / "v.nii.gz", noise())
    rewrite(path, edit=fields(sform_code=0, qform_code=1, quatern_b=0, quatern_c=0, quatern_d=1))  # half a turn about z
    np.testing.assert_array_equal(read_volume(path).values, noise()[::-1, ::-1])
    rewrite(path, edit=fields(sform_code=0, qform_code=0))  # NIfTI: x then runs to the left in nibabel
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.values, noise()[::-1])
    assert volume.spacing == pytest.approx(SPACING)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize(
    ("written", "read"),
    [("int16", "int16"), ("uint16", "uint16"), ("uint8", "uint8"), ("int32", "float32"), ("float32", "float32"),
     ("float64", "float32"), (">int16", "int16"), (">float32", "float32")],
)  # fmt: skip
def test_no_value_is_lost_and_no_double_is_kept(tmp_path, name, written, read):
    path = simple(tmp_path / name, noise(written.removeprefix(">")))
    if written.startswith(">"):
        header = nibabel.load(path).header
        header["vox_offset"], header["scl_slope"], header["scl_inter"] = 352, 1, 0
        data = (
            header.as_byteswapped(">").binaryblock
            + bytes(4)
            + noise().astype(np.dtype(written[1:]).newbyteorder(">")).tobytes(order="F")
        )
        assert data[:4] == b"\x00\x00\x01\x5c"
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    values = read_volume(tmp_path / name).values
    assert values.dtype == np.dtype(read)
    np.testing.assert_array_equal(values, noise())


@pytest.mark.parametrize(
    ("slope", "inter", "factor", "offset", "dtype"),
    [(2.5, -7, 2.5, -7, "float32"), (1, 5, 1, 5, "float32"), (1, 0, 1, 0, "int16"), (0, 9, 1, 0, "int16"),
     (np.nan, 9, 1, 0, "int16")],
)  # fmt: skip
def test_the_headers_scaling_is_applied(tmp_path, slope, inter, factor, offset, dtype):
    path = simple(tmp_path / "v.nii.gz", noise(), fields(scl_slope=slope, scl_inter=inter))
    values = read_volume(path).values
    assert values.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(values, noise() * factor + offset)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64", "float32", "float64"])
def test_labels_become_class_indices(tmp_path, dtype):
    voxels = noise() % 3
    voxels[voxels == 2] = 4
    labels = read_labels(simple(tmp_path / "v.nii.gz", voxels.astype(dtype)), {0: 0, 1: 1, 4: 2}, "it")
    assert labels.values.dtype == np.uint8
    np.testing.assert_array_equal(labels.values, noise() % 3)


def test_labels_are_scaled_as_well(tmp_path):
    path = simple(tmp_path / "v.nii.gz", (noise() % 3 * 10).astype(np.uint8), fields(scl_slope=0.1, scl_inter=0))
    np.testing.assert_array_equal(read_labels(path, SAME, "it").values, noise() % 3)


@pytest.mark.parametrize("value", [4, -1, 255, 256, 257, 1e9, -256])
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
def test_an_unknown_label_is_told(tmp_path, value, dtype):
    if dtype == "int16" and value == 1e9:
        value = 30000
    voxels = np.zeros(SHAPE, dtype)
    voxels[2, 3, 1] = value
    with pytest.raises(
        RejectedSample, match=re.escape(f"unknown label value {value:g}; the release has only 0, 1, 2, 3")
    ):
        read_labels(simple(tmp_path / "v.nii.gz", voxels), SAME, "the release")


@pytest.mark.parametrize("value", [0.5, 1.01, -0.3])
def test_a_label_that_is_no_whole_number_is_told(tmp_path, value):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[2, 3, 1] = value
    with pytest.raises(RejectedSample, match="not whole numbers"):
        read_labels(simple(tmp_path / "v.nii.gz", voxels), SAME, "it")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_no_numbers_are_told(tmp_path, value):
    voxels = noise(np.float64)
    voxels[1, 1, 1] = value
    path = simple(tmp_path / "v.nii.gz", voxels)
    with pytest.raises(RejectedSample, match=r"v\.nii\.gz holds NaN or infinite values"):
        read_volume(path)
    with pytest.raises(RejectedSample, match=r"NaN or infinite|unknown label value"):
        read_labels(path, SAME, "it")


def test_axes_of_one_are_no_axes(tmp_path):
    voxels = noise()[..., None, None]
    np.testing.assert_array_equal(read_volume(simple(tmp_path / "v.nii.gz", voxels)).values, noise())


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 4, 2), (6, 0, 4)])
def test_another_number_of_axes_is_told(tmp_path, shape):
    path = simple(tmp_path / "v.nii.gz", np.ones(shape, np.int16) if 0 not in shape else noise())
    if 0 in shape:
        rewrite(path, edit=lambda header: header["dim"].__setitem__(2, 0))
    with pytest.raises(RejectedSample, match=f"has the shape {'x'.join(map(str, shape))}, expected 3 axes"):
        read_volume(path)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (fields(magic=b"ni1"), "not a single-file NIfTI-1"),
        (fields(datatype=2000), "cannot be decoded"),
        (fields(datatype=0), "cannot be decoded|expected integers or floats"),
        (fields(vox_offset=0), "begin at byte 0, expected 352"),
        (fields(vox_offset=2**24), "begin at byte"),
        (fields(vox_offset=np.nan), "begin at byte nan"),
        (fields(vox_offset=352.5), "begin at byte 352.5"),
        (fields(pixdim=[1, 0, 3, 5, 1, 1, 1, 1]), "states voxels of 0 x 3 x 5 mm"),
        (fields(pixdim=[1, -2, 3, 5, 1, 1, 1, 1]), "states voxels of -2 x 3 x 5 mm"),
        (fields(pixdim=[1, np.nan, 3, 5, 1, 1, 1, 1]), "states voxels of nan x 3 x 5 mm"),
        (fields(pixdim=[1, 2, 3, 5e4, 1, 1, 1, 1]), "states voxels of 2 x 3 x 50000 mm"),
        (fields(xyzt_units=3), "gives its voxel size in micron"),
        (fields(xyzt_units=7), "cannot be decoded"),
        (fields(srow_x=(0, 0, 0, 0)), "no usable orientation"),
        (fields(srow_x=(0, 3, 0, 0)), "no usable orientation"),
        (fields(srow_x=(np.nan, 0, 0, 0)), "no usable orientation"),
        (fields(srow_x=(2, 0, 0, np.inf)), "no usable orientation"),
        (fields(sform_code=0, qform_code=1, quatern_b=3), "cannot be decoded"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_told(tmp_path, edit, reason):
    path = simple(tmp_path / "v.nii.gz", noise(), edit)
    for read in (read_volume, lambda path: read_labels(path, dict.fromkeys(range(100), 0), "it")):
        with pytest.raises(RejectedSample, match=rf"v\.nii\.gz.*({reason})"):
            read(path)


def test_colours_and_complex_numbers_are_told(tmp_path):
    for dtype in (np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]):
        with pytest.raises(RejectedSample, match="expected integers or floats"):
            read_volume(simple(tmp_path / "v.nii.gz", np.zeros(SHAPE, dtype)))


def test_extensions_between_header_and_voxels_are_passed_over(tmp_path):
    data = gzip.decompress(simple(tmp_path / "v.nii.gz", noise(), fields(vox_offset=1000)).read_bytes())
    (tmp_path / "w.nii").write_bytes(data[:352] + bytes(648) + data[352:])
    np.testing.assert_array_equal(read_volume(tmp_path / "w.nii").values, noise())


def test_compression_is_told_from_the_content(tmp_path):
    packed = simple(tmp_path / "v.nii.gz", noise()).read_bytes()
    (tmp_path / "packed.nii").write_bytes(packed)
    (tmp_path / "plain.nii.gz").write_bytes(gzip.decompress(packed))
    for name in ("packed.nii", "plain.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).values, noise())


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 348, 360, 500, -1])
def test_a_file_that_is_cut_short_is_told(tmp_path, keep):
    for name in ("v.nii", "v.nii.gz"):
        path = simple(tmp_path / name, noise())
        data = path.read_bytes()
        if 0 <= keep < len(data) or keep < 0:
            path.write_bytes(data[:keep])
            with pytest.raises(RejectedSample, match=r"cut short|cannot be decoded"):
                read_volume(path)


def test_a_wrong_checksum_is_told(tmp_path):
    path = simple(tmp_path / "v.nii.gz", noise())
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(RejectedSample, match="CRC"):
        read_volume(path)


def test_a_missing_file_is_told(tmp_path):
    for read in (read_volume, file_version, lambda path: read_labels(path, SAME, "it")):
        with pytest.raises(RejectedSample, match=r"v\.nii cannot be decoded \(no such file\)"):
            read(tmp_path / "v.nii")


def peak_of(read, path):
    tracemalloc.start()
    try:
        with pytest.raises(RejectedSample) as error:
            read(path)
        return tracemalloc.get_traced_memory()[1], str(error.value)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize(
    ("sides", "reason"),
    [((32000, 32000, 32000), "more than the limit"), ((700, 700, 700), r"cut short: it states 686000000 bytes"),
     ((6, 8, 5), "cut short: it states 480 bytes of voxels and holds 384")],
)  # fmt: skip
def test_a_header_that_claims_too_much_costs_no_memory(tmp_path, name, sides, reason):
    path = simple(tmp_path / name, noise())
    read_volume(path)  # so that imports do not count
    rewrite(path, edit=lambda header: header["dim"].__setitem__(slice(1, 4), sides))
    peak, error = peak_of(read_volume, path)
    assert peak < MEBIBYTE and re.search(reason, error)


def test_a_gzip_bomb_costs_no_memory(tmp_path):
    path = simple(tmp_path / "v.nii.gz", noise())
    read_volume(path)
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data + bytes(64 * MEBIBYTE), compresslevel=9))
    assert path.stat().st_size < MEBIBYTE / 8
    peak, error = peak_of(read_volume, path)
    assert peak < MEBIBYTE and "holds more than the 384 bytes" in error


def test_zeros_that_fit_the_header_but_not_the_limit_are_told(tmp_path, monkeypatch):
    path = simple(tmp_path / "v.nii.gz", np.zeros((64, 64, 64), np.uint8))
    assert not read_volume(path).values.any()
    monkeypatch.setattr(nifti, "MAX_VOXEL_BYTES", 64**3 - 1)
    with pytest.raises(RejectedSample, match="states 262144 bytes of voxels, more than the limit of 262143"):
        read_volume(path)


def test_volumes_of_one_grid_pass_however_they_are_stored(tmp_path):
    seen = noise(shape=(4, 8, 6))
    first, *others = (
        read_volume(write(tmp_path / f"{code}.nii.gz", *stored(seen, SPACING, code))) for code in ORIENTATIONS
    )
    for other in others:
        require_same_grid(other, first)
        np.testing.assert_array_equal(other.values, first.values)


def test_another_grid_is_told(tmp_path):
    def volume(name, shape=SHAPE, spacing=SPACING, shift=0.0, turn=0.0):
        affine = np.diag([*spacing, 1.0])
        cos, sin = np.cos(turn), np.sin(turn)
        affine[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ affine[:3, :3]
        affine[2, 3] += shift
        return read_volume(write(tmp_path / name, noise(shape=shape), affine))

    image = volume("image.nii")
    require_same_grid(volume("mask.nii", shift=0.9), image)
    for other, apart in (
        (volume("mask.nii", shift=1.1), "1.1"),
        (volume("mask.nii", spacing=(2, 3, 6)), "3"),
        (volume("mask.nii", turn=0.1), r"2\.3"),
    ):
        with pytest.raises(RejectedSample, match=rf"mask\.nii lies on another grid than image\.nii: .*up to {apart}"):
            require_same_grid(other, image)
    with pytest.raises(RejectedSample, match=r"mask\.nii has 6x8x5 voxels, image\.nii 6x8x4"):
        require_same_grid(volume("mask.nii", shape=(6, 8, 5)), image)


def test_a_window_without_contrast_is_told():
    values = np.arange(101)
    assert contrast_range("v.nii", values, IntensityWindow(lower=5, upper=90)) == (5, 90)
    assert contrast_range("v.nii", values, IntensityWindow(method="window", center=40, width=80)) == (0, 80)
    for method in ("percentile", "zscore"):
        with pytest.raises(RejectedSample, match=r"v\.nii has no contrast: .* both 7"):
            contrast_range("v.nii", np.full(9, 7), IntensityWindow(method=method))


def test_the_compressed_file_comes_first(tmp_path):
    assert nifti_file(tmp_path, "a") is None
    (tmp_path / "a.nii").touch()
    assert nifti_file(tmp_path, "a") == tmp_path / "a.nii"
    (tmp_path / "a.nii.gz").touch()
    assert nifti_file(tmp_path, "a") == tmp_path / "a.nii.gz"


def test_a_replaced_file_has_another_version(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    before = file_version(path)
    path.write_bytes(b"12")
    assert file_version(path) != before
