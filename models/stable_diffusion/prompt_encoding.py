"""Prompts as the text encoder reads them, in every stage: cut at its limit or encoded in chunks, and what a cut loses.

A text encoder reads a fixed number of tokens (77 in Stable Diffusion, the marks of start and end included). With `train.prompt_chunks=N` a prompt
is read in N pieces of at most that many tokens, each with its own marks, and the states of the pieces are concatenated, as ComfyUI, AUTOMATIC1111 and
compel do. Every prompt gets N pieces, the empty ones of a short prompt included: training and sampling then see the same length.
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

MARKS = 2  # start and end of each piece
SHOWN = 60  # characters of an example


@dataclass(frozen=True)
class PromptEncoder:
    """Reads prompts as training and sampling do.

    Attributes:
        tokenizer: of the backbone, or `train.tokenizer_name`.
        length: tokens of a piece, its marks included.
        chunks: pieces of a prompt.
    """

    tokenizer: CLIPTokenizer
    length: int
    chunks: int = 1

    @classmethod
    def of(cls, tokenizer: CLIPTokenizer, text_settings: CLIPTextConfig, chunks: int | None) -> PromptEncoder:
        """Return the encoder of a tokenizer and a text encoder's settings; `chunks` as in `train.prompt_chunks`.

        Raises:
            MaskLoomError: the tokenizer has no vocabulary (transformers makes one of an empty folder), another one than the text encoder, or
                lacks a mark.
        """
        words, known = len(tokenizer), text_settings.vocab_size
        if words <= len(set(tokenizer.all_special_ids)) or words > known:
            raise MaskLoomError(
                f"{tokenizer.name_or_path}: a tokenizer of {words} tokens does not fit a text encoder that knows {known}; "
                "give the backbone's own tokenizer (train.tokenizer_name=null), whole"
            )
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            raise MaskLoomError(
                f"{tokenizer.name_or_path}: the tokenizer lacks the mark of a prompt's start or end, or of what fills it up (bos_token, eos_token, "
                "pad_token); download the tokenizer again"
            )
        length = min(tokenizer.model_max_length, text_settings.max_position_embeddings)
        return cls(tokenizer, length, chunks or 1)

    @property
    def room(self) -> int:
        """Tokens of a prompt that are read."""
        return self.chunks * (self.length - MARKS)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return (B, chunks, length) int64 token numbers; one chunk equals the tokenizer's own truncation and padding."""
        import torch

        return torch.tensor([[self._piece(piece) for piece in self._pieces(ids)] for ids in self._ids(prompts)])

    def is_cut(self, prompt: str) -> bool:
        """Whether a prompt has more tokens than are read."""
        return len(self._ids([prompt])[0]) > self.room

    def cuts(self, prompts: Iterable[str]) -> Cuts:
        """Return what of the prompts is not read; each different prompt counts once."""
        unique = list(dict.fromkeys(prompts))
        ids = self._ids(unique)
        cut = {text: numbers for text, numbers in zip(unique, ids, strict=True) if len(numbers) > self.room}
        alike: dict[tuple[int, ...], list[str]] = {}
        for text, numbers in zip(unique, ids, strict=True):
            alike.setdefault(tuple(numbers[: self.room]), []).append(text)
        merged = [texts for texts in alike.values() if len(texts) > 1 and any(text in cut for text in texts)]
        return Cuts(
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

    def _pieces(self, ids: Sequence[int]) -> list[Sequence[int]]:
        most = self.length - MARKS
        return [ids[start : start + most] for start in range(0, self.chunks * most, most)]

    def _piece(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens of a piece between its marks, padded to its length."""
        marked = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
        return marked + [self.tokenizer.pad_token_id] * (self.length - len(marked))


@dataclass(frozen=True)
class Cuts:
    """What of some prompts is not read.

    Attributes:
        prompts: how many different ones there are.
        room: tokens that are read of each.
        longest: tokens of the longest.
        lost: by prompt that is cut, the part that is lost.
        merged: groups of different prompts that are the same after the cut.
        chunks_needed: the `train.prompt_chunks` with which nothing is lost.
    """

    prompts: int
    room: int
    longest: int
    lost: dict[str, str]
    merged: list[list[str]]
    chunks_needed: int

    def lines(self, remedy: str | None = None) -> list[str]:
        """Return what to tell the user; nothing where no prompt is cut.

        Args:
            remedy: besides shorter prompts; None: `train.prompt_chunks`, if it goes so far.
        """
        if not self.lost:
            return []
        text, lost = next(iter(self.lost.items()))
        if remedy is None and self.chunks_needed <= MOST_PROMPT_CHUNKS:
            remedy = f"set train.prompt_chunks={self.chunks_needed}"
        told = [
            f"{len(self.lost)} of {self.prompts} different prompts are longer than the text encoder reads ({self.room} tokens; the longest has "
            f"{self.longest}) and are cut: of {_start(text)!r} it never sees {_end(lost)!r}. Shorten the prompts{f', or {remedy}' if remedy else ''}"
        ]
        if self.merged:
            one, other = self.merged[0][:2]
            told.append(
                f"WARNING: {sum(map(len, self.merged))} different prompts become only {len(self.merged)} when they are cut, so the model cannot tell them "
                f"apart: {_differing(one, other)!r} and {_differing(other, one)!r} are the same text to it"
            )
        return told


def text_states(text_encoder: Any, tokens: Tensor) -> Tensor:
    """Return the text encoder's last hidden states, (B, chunks * length, D), of (B, chunks, length) tokens."""
    return text_encoder(tokens.flatten(0, 1))[0].unflatten(0, tokens.shape[:2]).flatten(1, 2)


def load_prompt_encoder(train: TrainConfig) -> PromptEncoder:
    """Return the prompts' encoder of a configuration; reads tokenizer and settings, no weights, and imports no torch.

    Raises:
        MaskLoomError: they cannot be loaded.
    """
    source = BackboneSource.of(train)
    return PromptEncoder.of(load_tokenizer(source), load_text_settings(source), train.prompt_chunks)


def training_prompts(dataset: MaskPromptDataset, most: int | None = None) -> list[str]:
    """Return the prompts of the train and validation rows as they are written, one per row.

    Args:
        dataset: what is learnt.
        most: train rows that count, as `train.max_train_samples`; None: all.
    """
    train, validation = ([row["text"] for row in dataset.rows(name, ["text"])] for name in ("train", "validation"))
    return train[:most] + validation


def tell_cuts(stage: str, encoder: PromptEncoder, prompts: Iterable[str], remedy: str | None = None) -> bool:
    """Say what of the prompts is not read; return whether there was anything to say. `remedy` as in `Cuts.lines`."""
    lines = encoder.cuts(prompts).lines(remedy)
    for line in lines:
        say(f"{stage}: {line}")
    return bool(lines)


def _start(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}…"


def _end(text: str) -> str:
    return text if len(text) <= SHOWN else f"…{text[-SHOWN:].lstrip()}"


def _differing(text: str, other: str) -> str:
    """Return a text from shortly before the first place where it differs from another."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, text.rfind(" ", 0, max(0, same - SHOWN // 3)) + 1)
    return ("…" if start else "") + _start(text[start:])
