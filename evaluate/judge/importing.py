"""Images that something else made, written as a synthetic set of a real dataset, as `generate` writes one.

Nobody states what they were made from. So no row has a parent, but for rows of a MaskLoom set whose
parents are in the very same real dataset.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.evaluate.judge.remarks import blank_remark, classes_remark, mask_remark, transparency_remark
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.contract import Description, Parent
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.licence import hub_identifier
from maskloom.pipeline.dataset.masks import resize_mask
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, Shard, plan_shards
from maskloom.pipeline.errors import LeakedImages, MaskLoomError, one_line
from maskloom.pipeline.files.atomic import value_digest, write_text
from maskloom.pipeline.files.formatting import markdown_cell
from maskloom.pipeline.files.private_paths import without_known_places
from maskloom.pipeline.files.reading import row_attributes
from maskloom.pipeline.progress import progress, say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.sample_files import sample_files, write_sample_files
from maskloom.pipeline.runs.stage import Stage

NAME = "synthetic"
"""Name of the set, in the run and on the report."""
ORIGIN = "made elsewhere: unknown training set"
STAGE = "generate"  # whose output it is
STOPS = "stopped.jsonl"
VERSION = 2  # of the rules by which rows are converted
ROWS_PER_SHARD = 512
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Conversion:
    """How the rows of a given dataset become rows like those of the real one.

    Attributes:
        about: the real dataset.
        labels: index of the real class by that of the given one.
        classes: (256,) real mask index by given mask index; None: masks are left out.
        parents: group of each real train row, if the given set states parents of this very dataset.
    """

    about: Description
    labels: Mapping[int, int]
    classes: Pixels | None
    parents: Mapping[str, str]

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """Return a stored row as a synthetic sample."""
        image = png_array(row["image"]["bytes"])
        stored = None if row["mask"] is None or self.classes is None else png_array(row["mask"]["bytes"])
        mask = None if stored is None or self.classes is None else self.classes[stored]
        image, mask = resized(_with_channels(image, self.about.channels), mask, self.about)
        parent = row["parent_id"] if row["parent_id"] in self.parents else None
        mode = "edges" if mask is None or self.about.conditioning == "image" else self.about.conditioning
        return Sample(
            image=image,
            mask=mask,
            conditioning_image=conditioning_image(mask, image, mode, self.about.palette),
            text=row["text"],
            label=None if row["label"] is None else self.labels.get(row["label"]),
            sample_id=row["sample_id"],
            group_id=self.parents[parent] if parent else f"{NAME}/{row['group_id']}",
            source=self.about.dataset,
            origin="synthetic",
            attributes=row_attributes(row["attributes"], row["sample_id"]),
            parent_id=parent,
            generator=ORIGIN,
        )


def import_set(
    run: Run, real: MaskPromptDataset, given: MaskPromptDataset, where: Path, force: bool, masks_stated: bool = True
) -> None:
    """Write the rows of a given dataset to `RUN/synthetic/synthetic`.

    Args:
        run: the run.
        real: its dataset, verified.
        given: the images to judge, verified.
        where: the folder that the user gave, for errors.
        force: write them even if nothing has changed.
        masks_stated: see `mask_remark`.

    Raises:
        MaskLoomError: classes or mask classes differ from the real ones, masks are inverted, much of the images is
            transparent, or a set has rows of both kinds.
    """
    if given.description.origin == "combined":
        raise MaskLoomError(
            f"--synthetic {where}: a combined dataset, with real images in it; give the synthetic ones alone"
        )
    conversion = conversion_of(real, given, where)
    stops = earlier_stops(run)
    stage = Stage(
        run, STAGE, {"dataset": real.digest, "images": given.digest}, [VERSION, *stops], [run.synthetic / NAME]
    )
    if stage.skips(force):
        return
    found = [
        classes_remark(class_counts(real), class_counts(given)),
        mask_remark(real, given, where, masks_stated),
        transparency_remark(real, given, where),
        blank_remark(given),
    ]
    remarks = [remark for remark in found if remark]
    for remark in remarks:
        say(f"judge: {remark}")
    shards = plan_shards({"train": given.num_rows}, ROWS_PER_SHARD)
    settings = {"generator": NAME, "origin": ORIGIN, "uses_mask": conversion.classes is not None}
    generation = {
        **settings,
        "notes": [*notes(real, given), *remarks, *stops],
        "training": dict.fromkeys(("stage", "dataset", "weights")),
    }
    about = real.description.model_copy(
        update={
            "origin": "synthetic",
            **{name: stated(getattr(given.description, name)) for name in ("licence", "citation", "homepage")},
            "preprocessing": {**real.description.preprocessing, "generation": generation},
        }
    )
    writer = DatasetWriter(
        run.synthetic / NAME, about, shards, value_digest([VERSION, real.digest, given.digest, *stops])
    )
    with stage.recorded() as results:
        writer.prepare_folder(from_scratch=force)
        _write_shards(writer, writer.missing_shards(), conversion, given)
        parent = Parent(path=os.path.relpath(run.dataset, writer.folder), digest=real.digest)
        writer.finish(dataset_card(about, given, settings), (), stage.config_hash, parent)
        write_sample_files(writer.folder, sample_files(given.folder).items())
        results[NAME] = {"images": given.num_rows, "left_out": given.contract.rejected, "stops": stops}


def earlier_stops(run: Run) -> list[str]:
    """Return a sentence for each set that was given before and stopped.

    Raises:
        MaskLoomError: the list is damaged.
    """
    path = run.logs("audit") / STOPS
    try:
        return (
            [str(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        )
    except ValueError as error:
        raise MaskLoomError(f"{path}: damaged ({one_line(error)}); judge into a new folder") from error


def record_stop(run: Run, leak: LeakedImages) -> None:
    """Keep what stopped a set, for the report on what remains: whoever made the images may have seen held-out ones."""
    told = without_known_places(leak.found, [run.folder, Path.cwd(), Path.home()])  # contracts are published
    sentence = f"An earlier set was stopped, and these images may be what remained of it: {told}."
    stops = dict.fromkeys([*earlier_stops(run), sentence])
    write_text(run.logs("audit") / STOPS, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in stops))


def conversion_of(real: MaskPromptDataset, given: MaskPromptDataset, where: Path) -> Conversion:
    """Return how the rows of a given dataset are converted.

    Raises:
        MaskLoomError: it has classes or mask classes that the real one lacks; names `where`.
    """
    known, theirs = class_counts(real), class_counts(given)
    by_name = {label.casefold(): index for index, label in enumerate(real.description.labels)}
    present = {label.casefold() for label in known}
    strange = sorted(label for label in theirs if label.casefold() not in present) if known else []
    if strange:
        raise MaskLoomError(
            f"--synthetic {where}: class {strange[0]!r} is none of the real classes ({', '.join(known)}); rename it, leave "
            f"it out{', synthetic.options.labels=[...],' if given.description.dataset == 'folder' else ''} or give real images of it"
        )
    labels = {
        index: by_name[label.casefold()]
        for index, label in enumerate(given.description.labels)
        if label.casefold() in by_name
    }
    parent, train = given.contract.parent, real.ids("train").get("train", [])
    parents = dict(train) if parent is not None and parent.digest == real.digest else {}
    described = given.description if mask_count(given) else real.description  # classes without masks say nothing
    classes = mask_class_table(real.description, described, where) if mask_count(real) else None
    return Conversion(real.description, labels, classes, parents)


def class_counts(dataset: MaskPromptDataset) -> Counter[str]:
    """Return the number of images of each class that has any, in the order of the classes."""
    names = (dataset.description.label_name(row["label"]) for row in dataset.rows(None, ["label"]))
    counts = Counter(name for name in names if name is not None)
    return Counter({label: counts[label] for label in dataset.description.labels if counts[label]})


def mask_count(dataset: MaskPromptDataset) -> int:
    """Return the number of images that have a mask."""
    return sum(1 for row in dataset.rows(None, ["mask.path"]) if row["mask"] is not None)


def mask_class_table(ours: Description, theirs: Description, where: Path) -> Pixels:
    """Return the real mask index of each given one, (256,).

    Classes are matched by name. A single class is the other set's single class whatever its name.

    Raises:
        MaskLoomError: a mask class is none of the real ones.
    """
    table = np.zeros(256, dtype=np.uint8)
    if len(ours.mask_classes) == len(theirs.mask_classes) == 2:
        table[1] = 1
        return table
    known = {name.casefold(): index for index, name in enumerate(ours.mask_classes)}
    for index, name in enumerate(theirs.mask_classes[1:], start=1):
        if name.casefold() not in known:
            raise MaskLoomError(
                f"--synthetic {where}: mask class {name!r} is none of the real ones ({', '.join(ours.mask_classes[1:])}); "
                "say what the mask values mean, in the real names: synthetic.options.mask_values={0: background, ...}"
            )
        table[index] = known[name.casefold()]
    return table


def notes(real: MaskPromptDataset, given: MaskPromptDataset) -> list[str]:
    """Return what was done to the images, and which questions they do not allow, in sentences for the report."""
    ours, count = real.description, given.num_rows
    height, width = ours.image_size
    found = [
        f"Made elsewhere: nothing states what these {count} images were trained on, or from which masks.",
        f"They are {height} × {width} with {ours.channels} channel(s), like the real ones: resized (antialiased; padded with "
        "black where the aspect ratio differs), colours turned to luminance or grey repeated where needed.",
    ]
    questions = {"mask": "faithfulness and segmentation leave", "class": "classification leaves"}
    counts = {
        "mask": (mask_count(real), mask_count(given)),
        "class": [class_counts(one).total() for one in (real, given)],
    }
    for name, (of_real, of_given) in counts.items():
        if of_real and of_given < count:
            which = f"{count - of_given} images have" if of_given else "No image has"
            found.append(f"{which} {'no' if of_given else 'a'} {name}: {questions[name]} them out.")
        elif name == "mask" and of_given and not of_real:
            found.append("Their masks are left out, because the real images have none.")
    if given.contract.rejected:
        found.append(f"{given.contract.rejected} files could not be used and are not judged.")
    if real.contract.rejected:
        found.append(
            f"{real.contract.rejected} real file(s) were left out (rejected.jsonl gives reasons); copies of them are not looked for."
        )
    return found


def stated(text: str) -> str:
    """Return what a dataset states of its origin; a default says nothing of whose data these are."""
    return "not stated" if text.startswith("not stated") else text


def resized(image: Pixels, mask: Pixels | None, about: Description) -> tuple[Pixels, Pixels | None]:
    """Return image and mask at a size of the real dataset: that of the nearest aspect ratio.

    The aspect ratio is kept; what is missing is black, and background.

    Args:
        image: (H, W) or (H, W, 3).
        mask: (H, W) class indices, or None.
        about: the real dataset.
    """
    if image.shape[:2] in about.sizes:
        return image, mask
    height, width = image.shape[:2]
    size = min(about.sizes, key=lambda size: abs(np.log(size[1] / size[0]) - np.log(width / height)))
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    place = slice(top, top + inner[0]), slice(left, left + inner[1])
    canvas = np.zeros((*size, *image.shape[2:]), dtype=np.uint8)
    canvas[place] = np.asarray(Image.fromarray(image).resize(inner[::-1], Image.Resampling.BICUBIC))
    if mask is None:
        return canvas, None
    background = np.zeros(size, dtype=np.uint8)
    background[place] = resize_mask(mask, inner).mask
    return canvas, background


def _with_channels(image: Pixels, channels: int) -> Pixels:
    """Return an image as (H, W) for one channel, or (H, W, 3)."""
    return np.asarray(Image.fromarray(image).convert("L" if channels == 1 else "RGB"))


def _write_shards(
    writer: DatasetWriter, missing: Sequence[Shard], conversion: Conversion, given: MaskPromptDataset
) -> None:
    with progress("converting synthetic images", sum(one.stop - one.start for one in missing), "images") as advance:
        for shard in missing:
            rows = islice(_all_rows(given), shard.start, shard.stop)
            writer.write_shard(shard, map(conversion.sample, rows))
            advance(shard.stop - shard.start)


def _all_rows(given: MaskPromptDataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of all splits: whoever made the images may have split them."""
    for split in given.contract.split_names:
        yield from given.rows(split)


def dataset_card(about: Description, given: MaskPromptDataset, settings: Mapping[str, Any]) -> str:
    """Return the dataset card: where the images come from, and their classes."""
    counts = class_counts(given)
    counts += Counter({"no class": given.num_rows - counts.total()})
    lines = [
        *("---", "license: other", f"license_name: {hub_identifier(given.description.licence)}"),
        *("tags: [synthetic, medical, maskloom]", "---", ""),
        *(f"# Synthetic images beside {about.dataset}: {ORIGIN}", ""),
        "MaskLoom has read these images and judged them; it has not made them. Synthetic images are not patients.",
        *("", "| class | images |", "|---|---|"),
        *(f"| {markdown_cell(name)} | {count} |" for name, count in counts.items()),
        *("", "| setting | value |", "|---|---|"),
        *(f"| {key} | {markdown_cell(value)} |" for key, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"
