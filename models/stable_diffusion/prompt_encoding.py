"""How the text encoder reads prompts, in every stage: truncated, or encoded in chunks.

A text encoder reads a fixed number of tokens (77 in Stable Diffusion, with start and end token).
With `train.prompt_chunks=N` a prompt is split into N chunks of at most that many tokens, each with
its own start and end token, and the states of the chunks are concatenated, as in ComfyUI,
AUTOMATIC1111 and compel. Every prompt gets N chunks, of which those beyond a short prompt are
empty: training and sampling see the same length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.text import load_text_settings, load_tokenizer
from maskloom.pipeline.config.train import MOST_PROMPT_CHUNKS, TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import say

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextConfig, CLIPTokenizer

MARKS = 2  # start and end token of each chunk
SHOWN = 60  # characters of an example


@dataclass(frozen=True)
class PromptEncoder:
    """Tokenizes prompts, for training and sampling.

    Attributes:
        tokenizer: the backbone's, or `train.tokenizer_name`.
        length: number of tokens of a chunk, with start and end token.
        chunks: number of chunks of a prompt.
    """

    tokenizer: CLIPTokenizer
    length: int
    chunks: int = 1

    @classmethod
    def of(cls, tokenizer: CLIPTokenizer, text_settings: CLIPTextConfig, chunks: int | None) -> PromptEncoder:
        """Return the encoder for a tokenizer and the settings of a text encoder.

        Args:
            tokenizer: the tokenizer.
            text_settings: the settings of the text encoder.
            chunks: the value of `train.prompt_chunks`.

        Raises:
            MaskLoomError: the tokenizer has no vocabulary (transformers builds one even from an
                empty folder), does not fit the text encoder, or lacks a special token.
        """
        words, known = len(tokenizer), text_settings.vocab_size
        if words <= len(set(tokenizer.all_special_ids)) or words > known:
            raise MaskLoomError(
                f"{tokenizer.name_or_path}: a tokenizer of {words} tokens does not fit a text encoder that knows {known}; "
                "give the backbone's own tokenizer (train.tokenizer_name=null), whole"
            )
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            raise MaskLoomError(
                f"{tokenizer.name_or_path}: the tokenizer lacks a special token (bos_token, eos_token or pad_token); "
                "download the tokenizer again"
            )
        length = min(tokenizer.model_max_length, text_settings.max_position_embeddings)
        return cls(tokenizer, length, chunks or 1)

    @property
    def room(self) -> int:
        """Number of tokens of a prompt that are read."""
        return self.chunks * (self.length - MARKS)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids (B, chunks, length) int64.

        A single chunk equals the tokenizer's own truncation and padding.
        """
        import torch

        most = self.length - MARKS
        starts = range(0, self.chunks * most, most)
        return torch.tensor(
            [[self._chunk(ids[start : start + most]) for start in starts] for ids in self._ids(prompts)]
        )

    def truncation(self, prompts: Iterable[str]) -> Truncation:
        """Return what the prompts lose; each different prompt counts once."""
        unique = list(dict.fromkeys(prompts))
        ids = self._ids(unique)
        cut = {text: numbers for text, numbers in zip(unique, ids, strict=True) if len(numbers) > self.room}
        alike: dict[tuple[int, ...], list[str]] = {}
        for text, numbers in zip(unique, ids, strict=True):
            alike.setdefault(tuple(numbers[: self.room]), []).append(text)
        merged = [texts for texts in alike.values() if len(texts) > 1 and any(text in cut for text in texts)]
        return Truncation(
            prompts=len(unique),
            room=self.room,
            longest=max(map(len, ids), default=0),
            lost={text: self.tokenizer.decode(numbers[self.room :]) for text, numbers in cut.items()},
            merged=merged,
            chunks_needed=-(-max(map(len, ids), default=0) // (self.length - MARKS)),
        )

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if not prompts:
            return []
        return self.tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids

    def _chunk(self, ids: Sequence[int]) -> list[int]:
        """Return token ids between start and end token, padded to the length of a chunk."""
        marked = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
        return marked + [self.tokenizer.pad_token_id] * (self.length - len(marked))


@dataclass(frozen=True)
class Truncation:
    """What a set of prompts loses.

    Attributes:
        prompts: number of different prompts.
        room: number of tokens that are read of each.
        longest: number of tokens of the longest.
        lost: the lost part of each truncated prompt.
        merged: groups of different prompts that are the same after truncation.
        chunks_needed: the value of `train.prompt_chunks` with which nothing is lost.
    """

    prompts: int
    room: int
    longest: int
    lost: dict[str, str]
    merged: list[list[str]]
    chunks_needed: int

    def lines(self, remedy: str | None = None) -> list[str]:
        """Return the lines to print; empty if no prompt is truncated.

        Args:
            remedy: what helps besides shorter prompts; None: `train.prompt_chunks`, if it can be
                high enough.
        """
        if not self.lost:
            return []
        text, lost = next(iter(self.lost.items()))
        if remedy is None and self.chunks_needed <= MOST_PROMPT_CHUNKS:
            remedy = f"set train.prompt_chunks={self.chunks_needed}"
        end = lost if len(lost) <= SHOWN else f"…{lost[-SHOWN:].lstrip()}"
        lines = [
            f"{len(self.lost)} of {self.prompts} different prompts are longer than the text encoder reads "
            f"({self.room} tokens; the longest has {self.longest}) and are truncated: of {_start(text)!r} it never sees "
            f"{end!r}. Shorten the prompts{f', or {remedy}' if remedy else ''}"
        ]
        if self.merged:
            one, other = self.merged[0][:2]
            lines.append(
                f"WARNING: {sum(map(len, self.merged))} different prompts become only {len(self.merged)} when they are "
                f"truncated, so the model cannot tell them apart: {_differing(one, other)!r} and "
                f"{_differing(other, one)!r} are the same text to it"
            )
        return lines


def text_states(text_encoder: Any, tokens: Tensor) -> Tensor:
    """Return the text encoder's last hidden states, (B, chunks * length, D).

    Args:
        text_encoder: a `CLIPTextModel`.
        tokens: (B, chunks, length) int64.
    """
    return text_encoder(tokens.flatten(0, 1))[0].unflatten(0, tokens.shape[:2]).flatten(1, 2)


def load_prompt_encoder(train: TrainConfig) -> PromptEncoder:
    """Return the prompt encoder of a configuration; reads no weights and imports no torch.

    Raises:
        MaskLoomError: the tokenizer or the text encoder's settings cannot be loaded.
    """
    source = BackboneSource.of(train)
    return PromptEncoder.of(load_tokenizer(source), load_text_settings(source), train.prompt_chunks)


def training_prompts(dataset: MaskPromptDataset, most: int | None = None) -> list[str]:
    """Return the prompts of the train and validation rows, one per row.

    Args:
        dataset: the real dataset.
        most: number of train rows to use, as `train.max_train_samples`; None: all.
    """
    train, validation = ([row["text"] for row in dataset.rows(name, ["text"])] for name in ("train", "validation"))
    return train[:most] + validation


def report_truncation(stage: str, encoder: PromptEncoder, prompts: Iterable[str], remedy: str | None = None) -> bool:
    """Print what the prompts lose, and return whether they lose anything.

    Args:
        stage: the name of the stage, for the messages.
        encoder: the prompt encoder.
        prompts: the prompts.
        remedy: see `Truncation.lines`.
    """
    lines = encoder.truncation(prompts).lines(remedy)
    for line in lines:
        say(f"{stage}: {line}")
    return bool(lines)


def _start(text: str) -> str:
    """Return at most `SHOWN` characters from the start of a text."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}…"


def _differing(text: str, other: str) -> str:
    """Return a text from shortly before the first place where it differs from another."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, text.rfind(" ", 0, max(0, same - SHOWN // 3)) + 1)
    return ("…" if start else "") + _start(text[start:])
