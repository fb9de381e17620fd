"""Which raw file gave each sample: kept in the run, beside the dataset, and named in errors about leaks."""

from pathlib import Path

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.leak_list import files_of_leaks
from maskloom.pipeline.runs.sample_files import files_in_words, sample_files, write_sample_files


def test_each_dataset_of_a_run_has_its_list(tmp_path: Path) -> None:
    real, synthetic = tmp_path / "dataset", tmp_path / "synthetic" / "vendor"
    write_sample_files(real, [("a", "one/ä (1).png")])
    write_sample_files(synthetic, [("a", "two.png")])
    assert sample_files(real) == {"a": "one/ä (1).png"} and sample_files(synthetic) == {"a": "two.png"}
    assert files_in_words([(real, "a"), (synthetic, "a"), (real, "a")]) == "files: a is one/ä (1).png, a is two.png"
    write_sample_files(real, [])
    assert sample_files(real) == {}


def test_nothing_is_said_where_no_file_is_known(tmp_path: Path) -> None:
    assert sample_files(tmp_path / "dataset") == {}
    write_sample_files(tmp_path / "dataset", [("a", "a.png")])
    assert files_in_words([(tmp_path / "dataset", "b"), (tmp_path / "elsewhere", "a")]) == ""


def test_the_files_of_the_first_leaks(tmp_path: Path) -> None:
    write_sample_files(
        tmp_path / "dataset", [(f"{name}{number}", f"{name}{number}.png") for name in "ab" for number in range(9)]
    )
    folder = str(tmp_path / "dataset")
    leaks = [
        {"image": f"a{one}", "image_dataset": folder, "shows": f"b{one}", "shows_dataset": folder} for one in range(9)
    ]
    assert (
        files_of_leaks(leaks)
        == f"files: {', '.join(f'{name}{one} is {name}{one}.png' for one in range(3) for name in 'ab')}"
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"sample_id": "a"}', "3"])
def test_a_damaged_list(tmp_path: Path, text: str) -> None:
    write_sample_files(tmp_path / "dataset", [])
    (tmp_path / "logs" / "prepare" / "files.jsonl").write_text(text)
    with pytest.raises(MaskLoomError, match=r"files\.jsonl: damaged .*; delete it"):
        sample_files(tmp_path / "dataset")
