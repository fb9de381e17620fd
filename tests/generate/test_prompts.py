"""Prompts that the text encoder does not read whole are told before the first image, those of
warped masks at the latest after the last.
"""

from pathlib import Path

import pytest

from maskloom.generate.generate import generate
from tests.generate.conftest import MakeBench
from tests.generate.workbench import content
from tests.tiny_datasets import tiny_description

WORDS = (
    "a long report comes to its point at its very end and reads "  # 46 letters: all that the tiny text encoder reads
)
ALONE = {"text_only": {}}


def long_bench(make_bench: MakeBench, template: str):
    return make_bench(description=tiny_description().model_copy(update={"prompt_templates": (template,)}))


def test_planned_prompts_are_told_before_the_first_image(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = long_bench(make_bench, WORDS + "{label}")
    generate(bench.config(generators=ALONE, mask_source=["train"]), force=False)
    said = capsys.readouterr().err
    assert said.count("different prompts are longer") == 1
    assert "generate: 2 of 3 different prompts are longer" in said  # and the negative one, which is empty
    assert "generate: WARNING: 2 different prompts become only 1" in said
    assert said.index("different prompts") < said.index("generating text_only")


def test_prompts_with_the_words_of_a_mask_are_told_when_they_are_known(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = long_bench(make_bench, WORDS + "{size}")  # the tiny rows keep no such word, so nothing can be told before
    generate(bench.config(generators=ALONE, mask_source=["warped"]), force=False)
    said = capsys.readouterr().err
    assert said.count("different prompts are longer") == 1
    assert said.index("generating text_only") < said.index("different prompts are longer")


def test_a_negative_prompt_is_told_and_prompts_that_fit_are_not(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = make_bench()
    generate(bench.config(generators=ALONE), force=False)
    assert "different prompts" not in capsys.readouterr().err
    generate(bench.config(generators={"text_only": {"negative_prompt": WORDS * 2}}), force=False)
    assert "generate: 1 of 3 different prompts are longer" in capsys.readouterr().err


def test_generators_without_prompts_have_nothing_to_tell(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = long_bench(make_bench, WORDS + "{label}")
    bench.train_architecture("pix2pix")
    generate(bench.config(generators={"pix2pix": {}}), force=False)
    assert "different prompts" not in capsys.readouterr().err


def test_pieces_make_other_images_of_prompts_that_differ_at_their_end(
    make_bench: MakeBench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = long_bench(make_bench, WORDS + "{label}")
    generate(bench.config(generators=ALONE), force=False)
    cut = content(bench.run.synthetic / "text_only")
    capsys.readouterr()
    generate(bench.config(["train.prompt_chunks=2"], generators=ALONE), force=False)
    said = capsys.readouterr().err
    assert "up to date" not in said
    assert "different prompts" not in said
    assert content(bench.run.synthetic / "text_only") != cut
