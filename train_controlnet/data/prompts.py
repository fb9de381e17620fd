"""The table of unique prompts, and each view's number in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompts:
    """The table of prompts.

    Attributes:
        unique: all prompts; number 0 is the empty prompt.
        numbers: by split, the number of each view's prompt.
    """

    unique: list[str]
    numbers: dict[str, list[int]]


def numbered_prompts(texts: Mapping[str, Sequence[str]]) -> Prompts:
    """Return the table of the prompts of all views.

    Args:
        texts: by split, the prompt of each view.
    """
    unique = ["", *sorted({text for some in texts.values() for text in some} - {""})]
    number = {text: i for i, text in enumerate(unique)}
    return Prompts(unique, {split: [number[text] for text in some] for split, some in texts.items()})
