"""Runs over every dataset adapter found in `data_prep/datasets`; a new one is tested by existing.

An adapter that needs a raw folder also needs a writer of tiny raw files, `tests/writers/NAME.py`;
see `tests/writers/__init__.py`.
"""

import importlib
import json
import pickle
import re
import string
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from maskloom.data_prep.adapter import DatasetAdapter, RawImage, RawItem, Reject
from maskloom.data_prep.parts import without_taken_ids
from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.sources import PACKAGE, open_adapter
from maskloom.data_prep.survey import SAFE_ID, id_problem, sample_problem
from maskloom.pipeline.dataset.contract import LEDGER_FILE, SPLITS
from maskloom.pipeline.dataset.prompts import template_keys
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from maskloom.pipeline.plugins import load_plugin, plugin_names
from tests.data_prep.experiment import dataset_bytes, experiment

pytestmark = pytest.mark.parametrize("name", plugin_names(PACKAGE))
LOADED = 24  # samples decoded one by one
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
MASK_WORDS = {"size", "place", "shape", "mask_classes"}


def needs_raw_dir(name):
    return load_plugin(PACKAGE, name, "dataset").Adapter.needs_raw_dir


def writer_of(name):
    return importlib.import_module(f"tests.writers.{name}")


def options_of(name):
    if not needs_raw_dir(name):
        # Few phantoms are as good as many, and quicker; an adapter without a knob for it is taken
        # whole.
        return {"patients": 20, "views": 2, "height": 64} if name == "phantom_bus" else {}
    return getattr(writer_of(name), "OPTIONS", {})


@pytest.fixture
def raw_dir(name, tmp_path):
    """A tiny raw dataset, or None where the adapter needs none."""
    if not needs_raw_dir(name):
        return None
    folder = tmp_path / "raw"
    folder.mkdir()
    writer_of(name).write_raw(folder)
    return folder


def opened(name, raw_dir):
    return open_adapter(experiment(Path("unused"), dataset=name, raw_dir=raw_dir, options=options_of(name)).data)


@pytest.fixture
def adapter(name, raw_dir):
    return opened(name, raw_dir)


def entries_of(adapter: DatasetAdapter) -> list[RawItem | Reject]:
    """Every sample, and every reject of scanning and of expanding."""
    entries = []
    for scanned in adapter.scan():
        try:
            entries += [scanned] if isinstance(scanned, Reject) else list(adapter.expand(scanned))
        except RejectedSample as error:
            entries.append(Reject(scanned.path, str(error)))
    return entries


def items_of(adapter: DatasetAdapter) -> list[RawItem]:
    return [entry for entry in entries_of(adapter) if isinstance(entry, RawItem)]


def decoded(adapter: DatasetAdapter) -> tuple[dict[str, RawImage], list[str]]:
    """Every usable sample by id, and the reasons of all rejects, those of the survey's checks
    included.
    """
    usable, reasons = {}, []
    info = adapter.info()
    entries = entries_of(adapter)
    items, taken = without_taken_ids([entry for entry in entries if isinstance(entry, RawItem)])
    reasons += [entry.reason for entry in (*entries, *taken) if isinstance(entry, Reject)]
    for item in items:
        try:
            raw = adapter.load(item)
        except RejectedSample as error:
            reasons.append(str(error))
            continue
        problem = id_problem(item) or sample_problem(raw, item, info)
        if problem is None:
            usable[item.sample_id] = raw
        else:
            reasons.append(problem)
    return usable, reasons


def spread(items):
    """Some items from all over the list."""
    return list(islice(items, 0, None, max(1, len(items) // LOADED)))


def test_the_description_is_complete(adapter):
    info = adapter.info()
    assert info.duplicates in ("near", "identical")  # identical pixels are looked for in every dataset
    assert info.channels in (1, 3) and info.modality
    assert info.mask_classes[0] == "background" and len(info.palette) == len(info.mask_classes) == len(
        set(info.palette)
    )
    assert all(len(colour) == 3 and all(0 <= value <= 255 for value in colour) for colour in info.palette)
    assert len(set(info.labels)) == len(info.labels)
    assert info.licence and info.citation and len(info.prompt_templates) > 1
    assert all(
        isinstance(part, tuple) for template in info.prompt_templates for part in string.Formatter().parse(template)
    )


def test_the_listing_is_stable_and_names_each_input_once(adapter):
    assert list(adapter.scan()) == list(adapter.scan())
    entries = entries_of(adapter)
    assert entries == entries_of(adapter)
    items = [entry for entry in entries if isinstance(entry, RawItem)]
    assert items
    assert max(Counter(item.sample_id for item in items).values()) == 1
    assert max(Counter(entry.path for entry in entries).values()) == 1
    labels = adapter.info().labels
    for item in items:
        assert SAFE_ID.fullmatch(item.sample_id) and item.path
        assert item.label in labels if labels else item.label is None
        assert item.split in (*SPLITS, None)
        assert all(isinstance(value, str) for value in item.attributes.values())
    assert all(entry.path and entry.reason for entry in entries if isinstance(entry, Reject))


def test_samples_fit_the_description(adapter):
    info = adapter.info()
    usable = 0
    for item in spread(items_of(adapter)):
        try:
            raw = adapter.load(item)
        except RejectedSample:
            continue
        usable += 1
        assert sample_problem(raw, item, info) is None
        assert raw.mask is None or raw.mask.dtype == np.uint8
        again = adapter.load(item)
        np.testing.assert_array_equal(raw.image, again.image)
        if raw.mask is not None:
            np.testing.assert_array_equal(raw.mask, again.mask)
    assert usable


def test_transparent_pixels_are_counted(name, raw_dir):
    """Whatever reads picture files hands on how much of them transparency has made black."""
    if raw_dir is None:
        return  # what comes with a package has no transparency
    adapter = opened(name, raw_dir)
    pictures = [file for item in items_of(adapter) if (file := Path(item.path)).suffix.lower() in PICTURES]
    for file in {file for file in pictures if file.is_file()}:
        make_half_transparent(file)
    for item in items_of(adapter):
        if Path(item.path) in pictures:
            assert 0.2 < adapter.load(item).darkened <= 0.5, item.path


def make_half_transparent(file):
    """Give a picture an alpha channel that hides its left half."""
    with Image.open(file) as stored:
        image = stored.convert("LA" if stored.mode in ("1", "L") else "RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, image.width // 2, image.height))
    image.putalpha(alpha)
    image.save(file, format="PNG")


def test_every_prompt_word_is_known_and_one_template_needs_no_mask(adapter):
    info = adapter.info()
    for item in items_of(adapter):
        known = {"modality", *item.attributes} | ({"label"} if item.label is not None else set())
        assert any(template_keys(template) <= known for template in info.prompt_templates)
        assert all(template_keys(template) <= known | MASK_WORDS for template in info.prompt_templates)


def test_the_fingerprint_follows_the_raw_files(adapter, raw_dir):
    before = adapter.fingerprint()
    assert before == adapter.fingerprint()
    if raw_dir is not None:
        (raw_dir / "another.file").write_bytes(b"1")
        assert adapter.fingerprint() != before


def test_it_says_what_raw_folder_it_needs(name, tmp_path):
    adapter = load_plugin(PACKAGE, name, "dataset").Adapter
    if not adapter.needs_raw_dir:
        adapter(None, adapter.Options())
        return
    options = adapter.Options(**options_of(name))
    with pytest.raises(MaskLoomError, match=r"data\.raw_dir is not set"):
        adapter(None, options)
    with pytest.raises(MaskLoomError, match="no such folder"):
        adapter(tmp_path / "nowhere", options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MaskLoomError):
        prepare(
            experiment(tmp_path / "run", dataset=name, raw_dir=tmp_path / "empty", options=options_of(name)),
            force=False,
        )


def test_prepared_it_loads_verifies_and_repeats(name, adapter, raw_dir, tmp_path):
    info = adapter.info()
    section = {
        "dataset": name,
        "raw_dir": raw_dir,
        "options": options_of(name),
        "conditioning": "image" if info.paired_image else "mask" if len(info.mask_classes) > 1 else "edges",
        "rows_per_shard": 100,
    }
    for run in ("one", "two"):
        config = experiment(tmp_path / run, **section)
        prepare(config, force=False)
    assert dataset_bytes(tmp_path / "one" / "dataset") == dataset_bytes(tmp_path / "two" / "dataset")

    contract = verify_fully(tmp_path / "one" / "dataset").contract
    assert {"train", "validation", "test"} == set(contract.splits)
    rows = load_dataset(str(tmp_path / "one" / "dataset"))
    entries = entries_of(open_adapter(config.data))
    ledger = (tmp_path / "one" / "dataset" / LEDGER_FILE).read_text(encoding="utf-8").splitlines()
    left_out = {json.loads(line)["path"] for line in ledger}
    ids = {sample_id for split in rows.values() for sample_id in split["sample_id"]}
    shown = [str(Path(e.path).relative_to(raw_dir)) if raw_dir else e.path for e in entries]
    for entry, path in zip(entries, shown, strict=True):
        assert (isinstance(entry, RawItem) and entry.sample_id in ids) != (path in left_out)
    groups = [set(split["group_id"]) for split in rows.values()]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]


def test_it_works_in_another_process(adapter):
    copy = pickle.loads(pickle.dumps(adapter))
    item = items_of(adapter)[0]
    np.testing.assert_array_equal(copy.load(pickle.loads(pickle.dumps(item))).image, adapter.load(item).image)


def test_it_recognises_its_own_layout_only(name, raw_dir, tmp_path):
    adapter = load_plugin(PACKAGE, name, "dataset").Adapter
    (tmp_path / "empty").mkdir()
    assert not adapter.recognises(tmp_path / "empty")
    if raw_dir is not None and not options_of(name):
        known = [
            other
            for other in plugin_names(PACKAGE)
            if load_plugin(PACKAGE, other, "dataset").Adapter.recognises(raw_dir)
        ]
        assert known == [name]


def test_damage_is_told_and_never_gives_a_wrong_mask(name, raw_dir, tmp_path):
    if raw_dir is None:
        return
    flaws = writer_of(name).FLAWS
    assert len(flaws) >= 8
    intact, before = decoded(opened(name, raw_dir))
    for title, flaw in flaws.items():
        damaged = tmp_path / f"{title} damaged"
        damaged.mkdir()
        writer_of(name).write_raw(damaged)
        flaw.damage(damaged)
        try:
            usable, reasons = decoded(opened(name, damaged))
        except MaskLoomError as error:
            usable, reasons = {}, [str(error)]
        if flaw.says is None:
            assert len(usable) >= len(intact) and len(reasons) <= len(before), f"{title}: {set(reasons) - set(before)}"
        else:
            assert any(re.search(flaw.says, reason) for reason in reasons), f"{title}: {reasons}"
        assert all("\n" not in reason for reason in reasons)
        for sample_id in usable.keys() & intact.keys():
            np.testing.assert_array_equal(usable[sample_id].mask, intact[sample_id].mask, err_msg=title)
            np.testing.assert_array_equal(usable[sample_id].image, intact[sample_id].image, err_msg=title)


CASES = {
    "busi": [("benign", "Benign"), ("malignant", "MALIGNANT")],
    "udiat": [("original", "Original"), ("GT", "gt"), ("DatasetB.xlsx", "datasetb.XLSX")],
    "busbra": [("Images", "images"), ("Masks", "MASKS"), ("bus_data.csv", "BUS_data.CSV")],
    "isic9": [("Train", "train"), ("Test", "TEST"), ("melanoma", "Melanoma ")],
    "bci": [("HE", "he"), ("train", "Train"), ("test", "TEST")],
    "acdc": [("training", "Training"), ("Info.cfg", "info.CFG")],
    "lidc": [("train", "Train"), ("clean", "Clean")],
    "pannuke": [("images.npy", "Images.npy"), ("masks", "Masks")],
    "medmnist": [("bloodmnist.npz", "BloodMNIST.npz")],
    "folder": [("images", "Images"), ("masks", "MASKS")],
}


def _renamed(folder, pairs):
    """Rename every file and folder below a folder that a pair names."""
    found = 0
    for old, new in pairs:
        for path in sorted(folder.rglob(old), key=lambda path: -len(path.parts)):
            path.rename(path.with_name(new))
            found += 1
    return found


def test_upper_and_lower_case_of_folders_and_tables_is_one(name, raw_dir):
    if name not in CASES:
        pytest.skip("its folders are named by the user, or by number")
    before, _ = decoded(opened(name, raw_dir))
    assert _renamed(raw_dir, CASES[name]) >= 1
    after, reasons = decoded(opened(name, raw_dir))
    after = {
        sample_id.replace("Images", "images"): raw for sample_id, raw in after.items()
    }  # an id of `folder` is a path
    assert after.keys() == before.keys(), reasons
    for sample_id in spread(list(before)):
        np.testing.assert_array_equal(after[sample_id].image, before[sample_id].image)


def test_what_file_managers_leave_behind_changes_nothing(name, adapter, raw_dir):
    if raw_dir is None:
        return
    before, fingerprint = entries_of(adapter), adapter.fingerprint()
    for path in sorted(p for p in raw_dir.rglob("*") if p.is_file()):
        fork = raw_dir / "__MACOSX" / path.relative_to(raw_dir).with_name(f"._{path.name}")
        fork.parent.mkdir(parents=True, exist_ok=True)
        fork.write_bytes(b"\0\5\x16\7")
        for clutter in (path.with_name(f"._{path.name}"), path.with_name(".DS_Store"), path.with_name("Thumbs.db")):
            clutter.write_bytes(b"\0\5\x16\7")
    again = opened(name, raw_dir)
    assert entries_of(again) == before and again.fingerprint() == fingerprint
