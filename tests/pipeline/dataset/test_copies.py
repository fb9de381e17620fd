"""Copies of training images are not handed on, whichever way rows leave a run."""

import json
from pathlib import Path

import pytest

from maskloom.pipeline.dataset.combine import combine
from maskloom.pipeline.dataset.combining.plan import CombineOptions
from maskloom.pipeline.dataset.copies import COPIES_FILE, found_copies, record_copies
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.export import ExportOptions, export
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.hub.uploads import Target, pack
from maskloom.pipeline.results import CopyRow, Evaluation, OnCopies, write_evaluation
from maskloom.pipeline.runs.run import Run
from tests.tiny_datasets import tiny_samples, write_tiny_run

COPIES = {"some-0001": "train-0001", "some-0004": "train-0009"}
NAMED = "2 rows are copies of training images: some-0001 of train-0001 (mirrored up-down)"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tiny_run(tmp_path, {"some": lambda parent, index: parent.image}, {"train": 6, "test": 2})
    return tmp_path


def copy_rows(originals: dict[str, str]) -> list[CopyRow]:
    return [
        CopyRow(
            sample_id=sample,
            original=original,
            transformation="mirrored up-down",
            measure="details",
            similarity=0.9,
            threshold=0.7,
        )
        for sample, original in originals.items()
    ]


def write_answer(run: Path, on_copies: OnCopies, digest: str | None = None, copies: bool = True) -> None:
    """Write the answer that names the copies in `run/synthetic/some`."""
    rows = copy_rows(COPIES)
    folder = OwnedFolder(run / "evaluation")
    folder.claim()
    answer = Evaluation(
        metric="copying",
        version=1,
        question="?",
        verdict="!",
        inputs={"some": digest or MaskPromptDataset.open(run / "synthetic/some").digest},
        copies={"some": rows if copies else []},
        on_copies=on_copies,
    )
    write_evaluation(folder, answer)


def combined(run: Path) -> list[str]:
    combine(run / "dataset", [run / "synthetic/some"], CombineOptions(run / "combined", force=True))
    return [row["sample_id"] for row in MaskPromptDataset.open(run / "combined").rows("train", ["sample_id"])]


def exported(run: Path) -> dict[str, object]:
    return export(run / "synthetic/some", ExportOptions("imagefolder", run / "exported", force=True))


def test_copies_are_left_out_with_a_ledger(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_answer(run, "drop")
    assert [name for name in combined(run) if name.startswith("some")] == [f"some-000{i}" for i in (0, 2, 3, 5)]
    ledger = [json.loads(line) for line in (run / "combined/rejected.jsonl").read_text().splitlines()]
    assert {row["path"]: row["reason"].rpartition(" ")[2] for row in ledger} == COPIES
    assert "2 rows are copies of training images, and were left out" in (run / "combined/README.md").read_text()
    provenance = exported(run)
    assert provenance["copies_left_out"] == COPIES
    assert provenance["splits"] == {"train": 4}
    assert len(list((run / "exported").rglob("some-*_mask.png"))) == 4
    assert f"{NAMED}; some-0004 of train-0009 (mirrored up-down); left out" in capsys.readouterr().err


def test_a_push_of_copies_is_refused(run: Path) -> None:
    write_answer(run, "drop")
    with pytest.raises(MaskLoomError, match=r"2 rows are copies of training images, and a push sends whole files"):
        pack(Run(run), Target("synthetic", "some"), "a/b")


def test_copies_stop_every_way_out(run: Path) -> None:
    write_answer(run, "stop")
    for way_out in (combined, exported, lambda one: pack(Run(one), Target("synthetic", "some"), "a/b")):
        with pytest.raises(MaskLoomError, match=rf"{NAMED[:50]}.*evaluate\.on_copies=drop"):
            way_out(run)


def test_held_out_images_stop_every_way_out(tmp_path: Path) -> None:
    """Turned upside down, so that identical pixels alone do not tell."""
    shown = [sample.image for sample in tiny_samples("test", 2)]
    write_tiny_run(tmp_path, {"some": lambda parent, index: shown[index % 2][::-1]}, {"train": 6, "test": 2})
    for way_out in (combined, exported, lambda one: pack(Run(one), Target("synthetic", "some"), "a/b")):
        with pytest.raises(
            MaskLoomError, match=r"6 synthetic image\(s\) are copies of its held-out images: some-0000 "
        ):
            way_out(tmp_path)
    assert not (tmp_path / "combined").exists() and not (tmp_path / "exported").exists()


def test_kept_copies_are_stated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_answer(run, "keep")
    assert set(COPIES) <= set(combined(run))
    assert "2 rows are copies of training images, and were **kept**" in (run / "combined/README.md").read_text()
    stated = MaskPromptDataset.open(run / "combined").description.preprocessing["combination"]["synthetic"][0]
    assert stated["copies_kept"] == COPIES and "copies_left_out" not in stated
    assert "copies_left_out" not in exported(run)
    assert "kept (evaluate.on_copies=keep)" in capsys.readouterr().err
    pack(Run(run), Target("synthetic", "some"), "a/b")


def test_only_kept_copies_that_were_taken_are_stated(run: Path) -> None:
    write_answer(run, "keep")
    combine(run / "dataset", [run / "synthetic/some"], CombineOptions(run / "stages", ratio=0.5, schedule=2))
    for stage in (1, 2):
        dataset = MaskPromptDataset.open(run / f"stages/stage-{stage}")
        there = {row["sample_id"] for row in dataset.rows("train", ["sample_id"])} & COPIES.keys()
        stated = dataset.description.preprocessing["combination"]["synthetic"][0].get("copies_kept", {})
        card = (dataset.folder / "README.md").read_text()
        assert stated == {sample: COPIES[sample] for sample in there}
        assert all((f"{sample} of {original}" in card) == (sample in there) for sample, original in COPIES.items())
        assert ("**kept**" in card) == bool(there) and (stage == 2 or not there)


def test_copies_found_since_make_it_another_combination(run: Path) -> None:
    combine(run / "dataset", [run / "synthetic/some"], CombineOptions(run / "combined"))
    write_answer(run, "keep")
    with pytest.raises(MaskLoomError, match="holds another combination"):
        combine(run / "dataset", [run / "synthetic/some"], CombineOptions(run / "combined"))


def test_without_an_answer_about_this_version_it_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_answer(run, "drop", digest="0" * 64)
    assert found_copies(MaskPromptDataset.open(run / "synthetic/some")) is None
    assert set(COPIES) <= set(combined(run))
    assert "not searched for copies of training images" in capsys.readouterr().err


def test_without_copies_nothing_changes(run: Path) -> None:
    combined(run)
    before = {path.name: path.read_bytes() for path in (run / "combined").iterdir() if path.is_file()}
    write_answer(run, "drop", copies=False)
    combined(run)
    assert before == {path.name: path.read_bytes() for path in (run / "combined").iterdir() if path.is_file()}


def test_nothing_but_copies_cannot_be_exported(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"some": lambda parent, index: parent.image}, {"train": 2, "test": 2})
    of_all = {f"some-000{index}": f"train-000{index}" for index in range(2)}
    rows = [
        CopyRow(sample_id=s, original=o, transformation="", measure="", similarity=1, threshold=0.5)
        for s, o in of_all.items()
    ]
    folder = OwnedFolder(tmp_path / "evaluation")
    folder.claim()
    digest = MaskPromptDataset.open(tmp_path / "synthetic/some").digest
    write_evaluation(
        folder,
        Evaluation(metric="m", version=1, question="?", verdict="!", inputs={"some": digest}, copies={"some": rows}),
    )
    with pytest.raises(MaskLoomError, match="every row is a copy of a training image"):
        exported(tmp_path)


def test_kept_copies_are_stated_in_every_export(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a combined dataset too, which says nothing of them itself."""
    write_answer(run, "keep")
    assert exported(run)["copies_kept"] == COPIES
    combined(run)
    provenance = export(run / "combined", ExportOptions("imagefolder", run / "of-both"))
    assert provenance["copies_kept"] == COPIES
    assert "combined: 2 rows are copies of training images" in capsys.readouterr().err


def test_copies_found_after_combining_are_not_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    combined(run)
    options = ExportOptions("imagefolder", run / "of-both", force=True)
    export(run / "combined", options)
    assert f"{run / 'combined'}: not searched for copies" in capsys.readouterr().err
    write_answer(run, "drop")
    assert export(run / "combined", options)["copies_left_out"] == COPIES
    assert not list((run / "of-both").rglob("some-0001*"))
    write_answer(run, "stop")
    with pytest.raises(MaskLoomError, match="combined: 2 rows are copies of training images"):
        export(run / "combined", options)


def test_the_list_keeps_sets_that_were_searched_earlier(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, (row, *_) = OwnedFolder(run / "evaluation"), copy_rows(COPIES)
    folder.claim()
    dataset = MaskPromptDataset.open(run / "synthetic/some")
    record_copies(folder, {dataset.digest: [row]}, [dataset.digest], "stop")
    record_copies(folder, {"0" * 64: []}, ["0" * 64], "keep")  # another set
    found = found_copies(dataset)
    assert found is not None and (found.rows, found.on_copies) == ([row], "stop")
    record_copies(folder, {}, [dataset.digest], "drop")
    assert list(exported(run)["copies_left_out"]) == [row.sample_id]  # type: ignore[call-overload]
    (run / "evaluation" / COPIES_FILE).write_text("{}\n")
    with pytest.raises(MaskLoomError, match=rf"{COPIES_FILE}:1: .*run evaluate again with --force"):
        exported(run)
    record_copies(folder, {}, [dataset.digest], "drop")
    assert "changed since it was written; its list of copies is dropped" in capsys.readouterr().err
    assert found_copies(dataset) is None
