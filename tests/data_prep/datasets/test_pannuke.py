import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.pannuke import Adapter, PanNukeOptions
from maskloom.data_prep.survey import sample_problem
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.prompts import mask_attributes
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.writers.pannuke import IMAGES, MASKS, TYPES, WORDS, change, drawn, masks_of, paths, write_fold, write_raw

LABELS = (
    "adrenal gland", "bile duct", "bladder", "breast", "cervix", "colon", "esophagus", "head and neck", "kidney", "liver", "lung",
    "ovary", "pancreas", "prostate", "skin", "stomach", "testis", "thyroid", "uterus",
)  # fmt: skip


def adapter(folder, **options):
    return Adapter(folder, PanNukeOptions(**options))


def listed(folder, **options):
    entries = list(adapter(folder, **options).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, [e for e in entries if isinstance(e, Reject)]


def loaded(folder, sample_id, **options):
    return adapter(folder, **options).load(listed(folder, **options)[0][sample_id])


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    write_raw(folder)
    return folder


def one_patch(folder, instances, dtype=np.float64):
    """Write fold 1 with a single patch that has these instances, (H, W, 5)."""
    images, types, masks = paths(folder, 1)
    for path, array in (
        (images, np.full((1, *instances.shape[:2], 3), 128.0)),
        (types, np.array(["Colon"])),
        (masks, masks_of(instances[None].astype(dtype))),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)


def empty():
    return np.zeros((12, 12, 5))


def test_every_patch_is_what_was_drawn(raw):
    items, rejects = listed(raw)
    assert rejects == [] and len(items) == 15
    for fold, split in ((1, "train"), (2, "validation"), (3, "test")):
        content = drawn(fold)
        for patch in range(5):
            item = items[f"fold{fold}-{patch:04d}"]
            sample = adapter(raw).load(item)
            np.testing.assert_array_equal(sample.image, content.images[patch])
            np.testing.assert_array_equal(sample.mask, content.kinds[patch])
            assert sample.image.dtype == sample.mask.dtype == np.uint8
            assert item.label == LABELS[WORDS.index(content.words[patch])]
            assert (item.split, item.group) == (split, None)
            assert item.path == f"{paths(raw, fold)[IMAGES]}#row={patch}" and item.mask_paths == (
                str(paths(raw, fold)[MASKS]),
            )


def test_patches_without_nuclei_are_used(raw):
    assert not drawn(1).kinds[0].any()
    sample = loaded(raw, "fold1-0000")
    assert sample.mask.shape == (24, 24) and not sample.mask.any()


def test_binary_masks(raw):
    for patch in range(5):
        mask = loaded(raw, f"fold2-{patch:04d}", masks="binary").mask
        np.testing.assert_array_equal(mask, drawn(2).kinds[patch] > 0)
    assert adapter(raw, masks="binary").info().mask_classes == ("background", "nuclei")


def test_where_kinds_overlap_the_later_channel_counts(tmp_path):
    instances = empty()
    instances[2:8, 2:8, 3] = 1
    instances[5:10, 5:10, 0] = 2
    one_patch(tmp_path, instances)
    expected = np.zeros((12, 12))
    expected[5:10, 5:10] = 1
    expected[2:8, 2:8] = 4
    np.testing.assert_array_equal(loaded(tmp_path, "fold1-0000").mask, expected)


def test_the_background_channel_is_not_used(tmp_path):
    instances = empty()
    instances[2:8, 2:8, 1] = 1
    one_patch(tmp_path, instances)
    path = paths(tmp_path, 1)[MASKS]
    masks = np.load(path)
    masks[..., 5] = np.nan
    np.save(path, masks)
    np.testing.assert_array_equal(loaded(tmp_path, "fold1-0000").mask, 2 * (instances[..., 1] > 0))


def test_boundaries_are_the_outermost_pixels_of_each_nucleus(tmp_path):
    instances = empty()
    instances[2:8, 1:5, 0] = 7  # two that touch, of one kind
    instances[2:8, 5:9, 0] = 300
    instances[8:12, 1:5, 2] = 7  # of another kind, with the same id, below the first and up to the border
    one_patch(tmp_path, instances)
    expected = np.array(
        [
            "............",
            "............",
            ".22222222...",
            ".21122112...",
            ".21122112...",
            ".21122112...",
            ".21122112...",
            ".22222222...",
            ".2222.......",
            ".2112.......",
            ".2112.......",
            ".2112.......",
        ]
    )
    mask = loaded(tmp_path, "fold1-0000", masks="boundary").mask
    shown = np.array(["".join(".12"[value] for value in row) for row in mask])
    np.testing.assert_array_equal(shown, expected)
    assert adapter(tmp_path, masks="boundary").info().mask_classes == ("background", "nuclei", "nuclear boundaries")


def test_a_boundary_inside_an_overlap_counts(tmp_path):
    instances = empty()
    instances[1:11, 1:11, 0] = 1
    instances[4:8, 4:8, 4] = 2
    one_patch(tmp_path, instances)
    mask = loaded(tmp_path, "fold1-0000", masks="boundary").mask
    assert (
        (mask[4, 4:8] == 2).all()
        and (mask[5:7, 5:7] == 1).all()
        and (mask[2:4, 2:10] == 1).all()
        and (mask[1, 1:11] == 2).all()
    )


@pytest.mark.parametrize("masks", ["semantic", "binary", "boundary"])
def test_each_kind_of_mask_fits_its_description(raw, masks):
    info = adapter(raw, masks=masks).info()
    assert len(info.palette) == len(info.mask_classes) == len(set(info.palette))
    items, _ = listed(raw, masks=masks)
    samples = {name: adapter(raw, masks=masks).load(item) for name, item in items.items()}
    assert all(sample_problem(samples[name], items[name], info) is None for name in items)
    assert max(sample.mask.max() for sample in samples.values()) == len(info.mask_classes) - 1


def test_prompts_read_well(raw):
    info = adapter(raw).info()
    item, sample = listed(raw)[0]["fold2-0002"], loaded(raw, "fold2-0002")
    values = {"modality": info.modality, "label": item.label, **mask_attributes(sample.mask, info.mask_classes)}
    kinds = [info.mask_classes[kind] for kind in np.unique(drawn(2).kinds[2]) if kind]
    written = [template.format_map(values) for template in info.prompt_templates]
    assert written[0] == "H&E histology patch of head and neck tissue" and len(kinds) > 1
    assert (
        written[2].startswith(f"H&E histology patch of head and neck tissue, with {kinds[0]}")
        and kinds[-1] in written[2]
    )


def test_every_tissue_has_a_label(tmp_path):
    words = [*WORDS, "Adrenal Gland", "Head&Neck", "bile_duct"]
    instances = np.zeros((len(words), 4, 4, 5))
    for path, array in zip(
        paths(tmp_path, 1), (np.zeros((len(words), 4, 4, 3)), np.array(words), masks_of(instances)), strict=True
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    items, rejects = listed(tmp_path)
    assert rejects == [] and adapter(tmp_path).info().labels == LABELS
    assert [item.label for item in items.values()] == [*LABELS, "adrenal gland", "head and neck", "bile duct"]


def test_folds_can_be_other_splits(raw):
    items, _ = listed(raw, fold1="test", fold2="train", fold3="validation")
    assert {(name[:5], item.split) for name, item in items.items()} == {
        ("fold1", "test"), ("fold2", "train"), ("fold3", "validation"),
    }  # fmt: skip
    assert Counter(item.split for item in listed(raw, fold2="train")[0].values()) == {"train": 10, "test": 5}
    with pytest.raises(ValidationError, match="fold2"):
        PanNukeOptions(fold2="val")


def flat(folder, name):
    """Write the folds as `fold1/{images,types,masks}.npy`, under another name."""
    for fold in (1, 2, 3):
        inner = folder / name(fold)
        write_fold((inner / "images.npy", inner / "types.npy", inner / "masks.npy"), fold)


@pytest.mark.parametrize(
    "name",
    [
        lambda fold: f"fold{fold}", lambda fold: f"Fold_{fold}", lambda fold: f"FOLD-{fold}", lambda fold: f"fold{fold - 1}",
        lambda fold: f"Fold {fold - 1}",
    ],
)  # fmt: skip
def test_other_names_of_folds(raw, tmp_path, name):
    flat(tmp_path / "flat", name)
    ours, theirs = listed(raw)[0], listed(tmp_path / "flat")[0]
    assert ours.keys() == theirs.keys()
    for sample_id in ours:
        assert (ours[sample_id].label, ours[sample_id].split) == (theirs[sample_id].label, theirs[sample_id].split)
        np.testing.assert_array_equal(loaded(raw, sample_id).mask, loaded(tmp_path / "flat", sample_id).mask)


@pytest.mark.parametrize(
    ("layout", "fold_of"),
    [
        ("Fold {}/images/fold{}/images.npy Fold {}/images/fold{}/types.npy Fold {}/masks/fold{}/masks.npy", lambda fold: fold - 1),
        ("fold{}/images/images.npy fold{}/images/types.npy fold{}/masks/masks.npy", lambda fold: fold),
        ("fold_{}/Fold {}/images/fold{}/images.npy fold_{}/Fold {}/images/fold{}/types.npy fold_{}/Fold {}/masks/fold{}/masks.npy",
         lambda fold: fold),
        ("images/fold{}/images.npy images/fold{}/types.npy masks/fold{}/masks.npy", lambda fold: fold),
    ],
)  # fmt: skip
def test_other_layouts(tmp_path, layout, fold_of):
    for fold in (1, 2, 3):
        places = [
            tmp_path / "raw" / place
            for place in layout.replace("{}", str(fold_of(fold))).replace("npy ", "npy|").split("|")
        ]
        write_fold(tuple(places), fold)
    for folder in (tmp_path / "raw", tmp_path):
        assert Adapter.recognises(folder)
        items, rejects = listed(folder)
        assert len(items) == 15 and rejects == []
        np.testing.assert_array_equal(adapter(folder).load(items["fold3-0004"]).mask, drawn(3).kinds[4])


def test_one_fold_is_enough_and_may_be_the_raw_folder(raw, tmp_path):
    shutil.rmtree(raw / "Fold 1")
    assert Counter(item.split for item in listed(raw)[0].values()) == {"validation": 5, "test": 5}
    items, _ = listed(raw / "Fold 3")
    assert list(items) == [f"fold3-{patch:04d}" for patch in range(5)]
    flat(tmp_path / "flat", lambda fold: f"fold{fold}")
    assert list(listed(tmp_path / "flat" / "fold2")[0]) == [f"fold2-{patch:04d}" for patch in range(5)]


def test_a_folder_above_that_is_named_as_a_fold_says_nothing(tmp_path):
    folder = tmp_path / "fold3" / "raw"
    for name in ("images", "masks", "types"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        np.save(folder / "images" / f"{name}.npy", np.zeros(3))
    assert not Adapter.recognises(folder)
    with pytest.raises(MaskLoomError, match="not PanNuke"):
        listed(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.uint16, np.int64])
def test_numbers_of_any_type(tmp_path, dtype):
    instances = empty()
    instances[2:8, 2:8, 1] = 1
    one_patch(tmp_path, instances, dtype)
    path = paths(tmp_path, 1)[IMAGES]
    np.save(path, np.load(path).astype(dtype))
    sample = loaded(tmp_path, "fold1-0000")
    assert (sample.image == 128).all() and sample.image.dtype == np.uint8 and sample.mask.sum() == 72


def test_large_instance_ids_are_kept_apart(tmp_path):
    instances = empty()
    instances[2:8, 1:5, 0], instances[2:8, 5:9, 0] = 2**31 - 1, 2**31 - 2
    one_patch(tmp_path, instances)
    assert (loaded(tmp_path, "fold1-0000", masks="boundary").mask[3:7, 4:6] == 2).all()


def test_fractions_of_colours_are_rounded(raw):
    change(raw, IMAGES, lambda images: images - 0.4)
    np.testing.assert_array_equal(loaded(raw, "fold1-0003").image, drawn(1).images[3])


@pytest.mark.parametrize(
    ("which", "value", "reason"),
    [
        (MASKS, -3, "the mask holds -3, expected instance ids: 0 and whole numbers above"),
        (MASKS, 1.5, r"the mask holds 1\.5"),
        (MASKS, np.nan, "the mask holds nan"),
        (MASKS, np.inf, "the mask holds inf"),
        (MASKS, 2.0**31, "the mask holds 2.14748e\\+09"),
        (IMAGES, np.nan, "the image holds NaN or infinite values"),
        (IMAGES, np.inf, "the image holds NaN or infinite values"),
        (IMAGES, 256, r"the image holds values \d+\.\.256, expected 0\.\.255"),
        (IMAGES, -1, r"the image holds values -1\.\.\d+"),
    ],
)
def test_a_patch_with_an_impossible_value_is_rejected_alone(raw, which, value, reason):
    def edit(array):
        array[2, 5, 5, 1] = value

    change(raw, which, edit)
    items, rejects = listed(raw)
    assert len(items) == 15 and rejects == []
    for sample_id, item in items.items():
        if sample_id == "fold1-0002":
            with pytest.raises(RejectedSample, match=reason):
                adapter(raw).load(item)
        else:
            adapter(raw).load(item)


def test_scaled_images_are_rejected(raw):
    change(raw, IMAGES, lambda images: images / 255)
    with pytest.raises(RejectedSample, match=r"holds fractions .*, expected 0\.\.255; multiply images\.npy by 255"):
        loaded(raw, "fold1-0001")


def test_an_unknown_tissue_is_rejected_alone(raw):
    def edit(words):
        words[3] = "Spleen"

    change(raw, TYPES, edit)
    items, rejects = listed(raw)
    assert len(items) == 14 and "fold1-0003" not in items
    assert rejects[0].path == f"{paths(raw, 1)[IMAGES]}#row=3"
    assert rejects[0].reason.startswith(
        "unknown tissue 'Spleen' in row 3 of types.npy; known: adrenal gland, bile duct, "
    )


@pytest.mark.parametrize(
    ("which", "edit", "reason"),
    [
        (MASKS, lambda a: a[:4], r"images\.npy has shape \(5, 24, 24, 3\), .*fold1/masks\.npy \(4, 24, 24, 6\): they must agree"),
        (MASKS, lambda a: a[:, :12], r"\(5, 12, 24, 6\): they must agree in number, height and width"),
        (MASKS, lambda a: a[..., :5], r"it has shape \(5, 24, 24, 5\), expected \(N, height, width, 6\)"),
        (IMAGES, lambda a: a[..., :1], r"it has shape \(5, 24, 24, 1\), expected \(N, height, width, 3\)"),
        (IMAGES, lambda a: a[..., 0], r"images\.npy holds float64 of shape \(5, 24, 24\), expected 4 axes"),
        (MASKS, lambda a: a.astype(object), r"masks\.npy cannot be decoded \(.*Python objects"),
        (MASKS, lambda a: a > 0, r"masks\.npy holds bool"),
        (MASKS, lambda a: a[:0], r"masks\.npy holds float64 of shape \(0, 24, 24, 6\)"),
        (TYPES, lambda a: a[:2], r"types\.npy has 2 tissues, .*images\.npy 5 patches \(shape \(5, 24, 24, 3\)\)"),
        (TYPES, lambda a: a[:, None], r"it holds <U\d+ of shape \(5, 1\), expected one word per patch"),
        (TYPES, lambda a: a.astype("S"), r"it holds \|S\d+ of shape \(5,\), expected one word per patch"),
        (TYPES, lambda a: a.astype("U1000000"), r"it holds <U1000000 of shape \(5,\)"),
        (TYPES, lambda a: a.astype(object), r"it is pickled \(dtype object\).*t = numpy\.load\('types\.npy', allow_pickle=True\)"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_end_the_work(raw, which, edit, reason):
    change(raw, which, edit)
    with pytest.raises(MaskLoomError, match=rf"^{re.escape(str(raw))}.*{reason}.*unpack the fold again"):
        listed(raw)


def test_the_advice_for_pickled_tissues_works(raw, monkeypatch):
    change(raw, TYPES, lambda words: words.astype(object))
    monkeypatch.chdir(paths(raw, 1)[TYPES].parent)
    words = np.load("types.npy", allow_pickle=True)
    np.save("types.npy", words.astype(str))
    assert len(listed(raw)[0]) == 15


@pytest.mark.parametrize("which", [IMAGES, TYPES, MASKS])
def test_a_damaged_or_missing_array_ends_the_work(raw, which):
    path = paths(raw, 2)[which]
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:20], b"", b"not an array", b"\x93NUMPY\x03\x00" + whole[8:40]):
        path.write_bytes(data)
        with pytest.raises(
            MaskLoomError, match=rf"^{re.escape(str(path))}: {path.name} cannot be decoded .*; unpack the fold again"
        ):
            listed(raw)
    path.unlink()
    with pytest.raises(MaskLoomError, match=rf"fold 2 has no {path.name} \(it has .*; unpack the whole fold again"):
        listed(raw)


@pytest.mark.parametrize("order", ["<", ">"])
def test_characters_that_do_not_exist(raw, order):
    path = paths(raw, 1)[TYPES]
    np.save(path, np.load(path).astype(f"{order}U13"))
    assert len(listed(raw)[0]) == 15
    data = path.read_bytes()
    path.write_bytes(data[:-100] + b"\xff\xff\xff\xff" + data[-96:])
    with pytest.raises(
        MaskLoomError, match=r"types\.npy: it holds characters that do not exist; unpack the fold again"
    ):
        listed(raw)


def test_a_fold_that_is_there_twice(raw):
    write_fold(tuple(raw / "fold1" / path.name for path in paths(raw, 1)), 1)
    with pytest.raises(MaskLoomError, match=r"fold1/images\.npy: fold 1 has this file twice \(also .*Fold 1"):
        listed(raw)


def test_too_many_folds(raw, tmp_path):
    flat(tmp_path / "flat", lambda fold: f"fold{fold}")
    inner = tmp_path / "flat" / "fold4"
    write_fold((inner / "images.npy", inner / "types.npy", inner / "masks.npy"), 1)
    with pytest.raises(MaskLoomError, match=r"folds 1, 2, 3, 4: expected three, numbered 1\.\.3 or 0\.\.2"):
        listed(tmp_path / "flat")


def test_a_file_that_changes_after_listing_is_rejected(raw):
    items, _ = listed(raw)
    change(raw, IMAGES, lambda images: images[:2])
    with pytest.raises(RejectedSample, match=r"images\.npy cannot be decoded \(index 4 is out of bounds"):
        adapter(raw).load(items["fold1-0004"])
    paths(raw, 2)[MASKS].unlink()
    with pytest.raises(RejectedSample, match=r"masks\.npy cannot be decoded \(no such file\)"):
        adapter(raw).load(items["fold2-0004"])


def test_another_folder(tmp_path):
    (tmp_path / "Fold 1" / "images" / "fold1").mkdir(parents=True)
    assert not Adapter.recognises(tmp_path)
    with pytest.raises(
        MaskLoomError, match=r"data\.raw_dir=.*: not PanNuke: no images\.npy and masks\.npy in folders named as folds"
    ):
        listed(tmp_path)


def test_it_can_be_pickled(raw):
    pannuke = adapter(raw)
    items = list(pannuke.scan())
    copy = pickle.loads(pickle.dumps(pannuke))
    np.testing.assert_array_equal(copy.load(pickle.loads(pickle.dumps(items[4]))).mask, drawn(1).kinds[4])


def test_the_configuration_asks_for_what_there_is():
    config = load_experiment(Path(__file__).parents[3] / "configs" / "pannuke.yaml", [])
    assert PanNukeOptions(**config.data.options).masks == "semantic" and config.data.conditioning == "mask"
