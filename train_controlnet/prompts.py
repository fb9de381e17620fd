"""The unique prompts of all views, and which view has which."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from pipeline.errors import told_when_unwritable
from pipeline.files import read_json, write_json
from train_controlnet.rows import Views


@dataclass(frozen=True)
class Prompts:
    """Prompts by number.

    Attributes:
        unique: all of them; number 0 is the empty prompt.
        numbers: by split, the number of each view's prompt.
    """

    unique: list[str]
    numbers: dict[str, list[int]]


def view_prompts(path: Path, views: Mapping[str, Views], accelerator: Accelerator) -> Prompts:
    """Return the prompts of all views; those of changed copies need their masks and are kept in a file.

    Args:
        path: the file, in the cache's folder.
        views: by split.
        accelerator: its main process writes the file.
    """
    if not path.is_file() and accelerator.is_main_process:
        with told_when_unwritable(path):
            write_json(path, {split: _texts(one) for split, one in views.items()})
    accelerator.wait_for_everyone()
    texts: dict[str, list[str]] = read_json(path, "the cache is damaged: delete its folder and run again")
    unique = ["", *sorted({text for some in texts.values() for text in some} - {""})]
    number = {text: i for i, text in enumerate(unique)}
    return Prompts(unique, {split: [number[text] for text in some] for split, some in texts.items()})


def _texts(views: Views) -> list[str]:
    """Return the prompt of every view."""
    if views.copies == 1:
        return list(views.rows["text"])
    return [view.text for view in (views[index] for index in range(len(views)))]
