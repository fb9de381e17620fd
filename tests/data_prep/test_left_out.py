"""What was left out is summed up: one line per reason, names and numbers aside."""

from pathlib import Path

import pytest

from maskloom.data_prep.__main__ import main
from maskloom.data_prep.adapter import Reject
from maskloom.data_prep.left_out import group_by_reason, left_out_summary
from tests.data_prep.test_prepare import command_line
from tests.writers import busi


def run_main(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0


def test_reasons_that_differ_in_names_and_numbers_only_are_one():
    entries = group_by_reason(
        [
            Reject("a/c1.png", "mask c1.png is 30x20, the image 48x40 (width x height)"),
            Reject("a/c2.png", "mask c2.png is 31x20, the image 48x41 (width x height)"),
            Reject("a/c3.png", "c3.png cannot be decoded (no such file)"),
            Reject("a/c4.png", "no mask file fits data.options.masks='masks/{stem}.png'"),
            Reject("b/ISIC_1.jpg", "ISIC_1 lies in several classes: melanoma, nevus"),
            Reject("b/ISIC_2.jpg", "ISIC_2 lies in several classes: melanoma, nevus"),
            Reject("c/x.png", "unknown Pathology 'b' in bus_data.csv; known: benign, malignant"),
            Reject("c/y.png", "unknown Pathology 'm' in bus_data.csv; known: benign, malignant"),
            Reject("c/z.png", "near-duplicates with different labels (benign, malignant): benign-8, malignant-8"),
            Reject(
                "c/w.png", "near-duplicates with different labels (benign, malignant): benign-1, malignant-2, benign-3"
            ),
        ]
    )
    assert [(entry.reason, entry.paths) for entry in entries] == [
        ("mask FILE is …, the image … (width x height)", ["a/c1.png", "a/c2.png"]),
        ("FILE lies in several classes: melanoma, nevus", ["b/ISIC_1.jpg", "b/ISIC_2.jpg"]),
        ("unknown Pathology … in FILE; known: benign, malignant", ["c/x.png", "c/y.png"]),
        ("near-duplicates with different labels (benign, malignant): …", ["c/z.png", "c/w.png"]),
        ("c3.png cannot be decoded (no such file)", ["a/c3.png"]),
        ("no mask file fits data.options.masks='masks/{stem}.png'", ["a/c4.png"]),
    ]


def test_the_commonest_reasons_are_told_and_the_others_counted():
    rejects = [Reject(f"{word}{n}.png", f"it is {word}") for word in "abcde" for n in range(6 - "abcde".index(word))]
    assert left_out_summary(rejects, 10, Path("run/rejected.jsonl")).splitlines() == [
        "20 of 30 inputs were left out; run/rejected.jsonl lists each with its reason",
        "  6: it is a (such as a0.png)",
        "  5: it is b (such as b0.png)",
        "  4: it is c (such as c0.png)",
        "  5: 2 other reasons",
    ]
    assert left_out_summary([], 10, Path("run/rejected.jsonl")) == ""


def test_prepare_and_merge_end_by_saying_it(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    busi.write_raw(raw)
    for number in (1, 2):
        (raw / busi.ROOT / "normal" / f"normal ({number})_mask.png").unlink()
    for words in ([["--shard", "1/1"], None], [[]]):
        run = tmp_path / f"run{len(words)}"
        for more in words:
            command = command_line(run, raw, *(more or []))
            run_main(["merge", *command] if more is None else command)
        said = capsys.readouterr().err.splitlines()
        assert said[-3:] == [
            f"2 of 20 inputs were left out; {run}/dataset/rejected.jsonl lists each with its reason",
            f"  2: no mask file belongs to this image (such as {busi.ROOT}/normal/normal (1).png)",
            f"prepare: wrote {run}/dataset (train 12, validation 3, test 3 rows)",
        ]


def test_where_nothing_is_left_out_nothing_is_said(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    busi.write_raw(raw)
    run_main(command_line(tmp_path / "run", raw))
    assert "left out" not in capsys.readouterr().err
