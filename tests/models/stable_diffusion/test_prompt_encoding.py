"""Prompts beyond the text encoder's limit are told, or read in pieces.

Within it nothing changes.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from maskloom.models.stable_diffusion.prompt_encoding import (
    PromptEncoder,
    load_prompt_encoder,
    report_truncation,
    text_states,
    training_prompts,
)
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from tests.tiny_backbone import MAX_TOKENS, build_tiny_backbone
from tests.tiny_datasets import write_tiny_run

LONG = "abcdef " * 8  # 48 tokens: the tiny tokenizer's tokens are letters, and 46 of them are read
DISC, SQUARE = LONG + "disc", LONG + "square"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def settings(backbone: Path, **more: object) -> TrainConfig:
    return TrainConfig.model_validate({"pretrained_model_name_or_path": str(backbone), **more})


def encoder(backbone: Path, chunks: int | None = None) -> PromptEncoder:
    return load_prompt_encoder(settings(backbone, prompt_chunks=chunks))


@pytest.mark.parametrize("prompts", [["", "a disc"], [LONG, "é ß 肺", "x" * 46, "x" * 47], ["<|endoftext|> disc"]])
def test_without_chunks_the_tokens_are_the_tokenizers_own(backbone: Path, prompts: list[str]) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(backbone, subfolder="tokenizer")
    expected = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    assert torch.equal(encoder(backbone).tokens(prompts).squeeze(1), expected.input_ids)


@torch.no_grad()
def test_pieces_are_read_one_by_one_and_joined(backbone: Path) -> None:
    model = CLIPTextModel.from_pretrained(backbone, subfolder="text_encoder").eval()
    plain, chunked = encoder(backbone), encoder(backbone, 2)
    tokens = chunked.tokens([DISC, "disc"])
    assert tokens.shape == (2, 2, MAX_TOKENS)
    states = text_states(model, tokens)
    assert states.shape == (2, 2 * MAX_TOKENS, 32)
    ids = [
        number for piece in chunked.tokens([DISC])[0].tolist() for number in piece if number < model.config.bos_token_id
    ]
    assert ids == plain._ids([DISC])[0]  # nothing is lost, nothing comes twice
    joined = torch.cat([model(tokens[:, piece])[0] for piece in range(2)], dim=1)
    torch.testing.assert_close(states, joined)
    short = torch.cat([text_states(model, plain.tokens([text])) for text in ("disc", "")], dim=1)
    torch.testing.assert_close(states[1:], short)  # the pieces that a short prompt leaves empty are empty prompts


def test_cut_prompts_are_counted_with_an_example_and_what_becomes_the_same(backbone: Path) -> None:
    cuts = encoder(backbone).truncation([DISC, SQUARE, "a disc", DISC])
    assert (cuts.prompts, cuts.room, cuts.longest, cuts.chunks_needed) == (3, 46, 54, 2)
    assert cuts.lost == {DISC: "ef disc", SQUARE: "ef square"}
    assert cuts.merged == [[DISC, SQUARE]]
    count, warning = cuts.lines()
    assert "2 of 3 different prompts are longer than the text encoder reads (46 tokens; the longest has 54)" in count
    assert "never sees 'ef disc'. Shorten the prompts, or set train.prompt_chunks=2" in count
    assert warning.startswith("WARNING: 2 different prompts become only 1")
    assert "disc' and '" in warning
    assert "square' are the same text" in warning


def test_one_cut_prompt_alone_is_no_warning_and_equal_words_no_cut(backbone: Path) -> None:
    assert len(encoder(backbone).truncation([DISC, "a disc"]).lines()) == 1
    assert encoder(backbone).truncation(["A Disc", "a disc"]).lines() == []  # CLIP reads small letters; nothing is lost
    assert encoder(backbone).truncation([]).lines() == []
    whole, longer = "x " * 46, "x " * 47
    assert encoder(backbone).truncation([whole, longer]).merged == [[whole, longer]]  # the shorter one is read whole


def test_chunks_that_suffice_leave_nothing_to_tell(backbone: Path) -> None:
    assert encoder(backbone, 2).truncation([DISC, SQUARE]).lines() == []
    assert not encoder(backbone, 2).truncation(["x" * 92]).lost
    assert encoder(backbone, 2).truncation(["x" * 93]).lost
    (line,) = encoder(backbone).truncation(["x" * 46 * 9]).lines()
    assert line.endswith("Shorten the prompts")  # no setting would do


def test_the_limit_is_the_lower_one_of_tokenizer_and_text_encoder(backbone: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(backbone, subfolder="tokenizer")
    assert PromptEncoder.of(tokenizer, CLIPTextConfig(vocab_size=190, max_position_embeddings=20), None).length == 20
    assert (
        PromptEncoder.of(tokenizer, CLIPTextConfig(vocab_size=190, max_position_embeddings=99), None).length
        == MAX_TOKENS
    )


def test_a_tokenizer_that_is_not_there_is_named(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(MaskLoomError, match=r"train\.tokenizer_name=.*cannot be read as CLIPTokenizer"):
        load_prompt_encoder(settings(backbone, tokenizer_name=str(tmp_path)))
    with pytest.raises(
        MaskLoomError,
        match=r"train\.pretrained_model_name_or_path=.*config\.json cannot be read as CLIPTextConfig: .*no such file",
    ):
        load_prompt_encoder(settings(tmp_path, tokenizer_name=str(backbone / "tokenizer")))


def test_a_tokenizer_of_other_words_than_the_text_encoders_is_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match="a tokenizer of 2 tokens does not fit a text encoder that knows 190"):
        load_prompt_encoder(settings(backbone, tokenizer_name=str(tmp_path)))  # an empty folder
    tokenizer = CLIPTokenizer.from_pretrained(backbone, subfolder="tokenizer")
    tokenizer.add_tokens(["<lesion>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(MaskLoomError, match="a tokenizer of 191 tokens does not fit a text encoder that knows 190"):
        load_prompt_encoder(settings(backbone, tokenizer_name=str(tmp_path)))


def test_another_tokenizer_counts(backbone: Path) -> None:
    found = load_prompt_encoder(settings(backbone, tokenizer_name=str(backbone / "tokenizer")))
    assert found.length == MAX_TOKENS


def test_the_prompts_of_a_dataset_are_those_that_training_reads(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 5, "validation": 3, "test": 2})
    dataset = MaskPromptDataset.open(tmp_path / "dataset")
    assert len(training_prompts(dataset)) == 8
    assert len(training_prompts(dataset, 2)) == 5
    assert set(training_prompts(dataset)) == {"toy imaging of a disc", "toy imaging of a square"}


@pytest.mark.parametrize(("prompts", "told"), [([DISC], True), (["a disc"], False)])
def test_telling_says_whether_it_did(
    backbone: Path, capsys: pytest.CaptureFixture[str], prompts: Sequence[str], told: bool
) -> None:
    assert report_truncation("train", encoder(backbone), prompts) is told
    assert ("train: 1 of 1 different prompts" in capsys.readouterr().err) is told
