"""`maskloom inspect RAW`: describes a raw folder and how to prepare it."""

import io
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Reject
from maskloom.data_prep.inspect.advice import advice_for, fitting_configuration
from maskloom.data_prep.inspect.content import IMAGES, kinds_of, misnamed
from maskloom.data_prep.inspect.guess import MODALITY, check_readable, recognised
from maskloom.data_prep.inspect.layout import Guess, guessed_options
from maskloom.data_prep.inspect.observation import Listing, Sample, listing_of, sample_of
from maskloom.data_prep.inspect.raw_tree import RawTree, known_formats, suffix_of, tables_of, tree_of
from maskloom.data_prep.inspect.text import Page, counted, quantiles, share
from maskloom.data_prep.inspect.yaml_text import command_line, configuration_text, experiment_name
from maskloom.data_prep.left_out import group_by_reason
from maskloom.data_prep.readers.file_names import printable
from maskloom.data_prep.sources import PACKAGE
from maskloom.pipeline.cli import shown_command
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.config.loading import load_experiment, validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import load_plugin

REASONS, FOLDERS, SETS = 8, 12, 6  # shown


def inspect_folder(raw_dir: Path, samples: int) -> None:
    """Print a description of a raw folder.

    Args:
        raw_dir: the folder.
        samples: largest number of samples to decode.

    Raises:
        MaskLoomError: the folder is missing, not a folder, unreadable or empty.
    """
    check_readable(raw_dir)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # file names may have characters that the terminal cannot show
    with Page() as page, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoder warnings about unusual files
        page.title(str(raw_dir))
        names = recognised_names(raw_dir, page)
        tree = tree_of(raw_dir)
        kinds = kinds_of(raw_dir, tree.files)
        _print_misnamed(kinds, page)
        read = [_describe_dataset(name, raw_dir, samples, page) for name in names]
        if not any(read):
            _describe_unknown(raw_dir, tree, kinds, samples, page)


def recognised_names(raw_dir: Path, page: Page) -> list[str]:
    """Return and print the datasets whose layout matches the folder, most specific first."""
    names, unchecked = recognised(raw_dir)
    for name, reason in unchecked.items():
        page.line(f"{name}: not checked ({reason})")
    page.line(f"looks like: {', '.join(names)}" if names else "none of the datasets that have an adapter of their own")
    return names


def _print_misnamed(kinds: dict[str, str], page: Page) -> None:
    found = misnamed(kinds, {file: suffix_of(file) for file in kinds})
    if found:
        page.section("Not what their endings say")
        for suffix, told in found:
            page.fact(suffix, told)


def _describe_dataset(name: str, raw_dir: Path, samples: int, page: Page) -> bool:
    """Describe the folder with the adapter of a known dataset; return whether it could be read."""
    plugin = load_plugin(PACKAGE, name, "dataset")
    summary = (plugin.__doc__ or "").strip().split("\n")[0].partition(": ")[2]
    page.title(f"{name}: {summary}")
    where = f"configs/{name}.yaml"  # works from any folder, because it ships with the package
    adapter: type[DatasetAdapter] = plugin.Adapter
    try:
        data = load_experiment(Path(where), []).data
        sets = adapter.needed_options(raw_dir)
        needed = ", ".join(f"{key}={value}" for key, value in sets[0].items())
        if data.options or needed:
            page.line(f"with the options of {where}{needed and f', but {needed}'}")
        options = validated({**data.options, **sets[0]}, adapter.Options, "data.options")
        _, listed, sample = _describe(adapter(raw_dir, options), raw_dir, samples, data, page)
        if not listed.items:
            raise MaskLoomError(
                f"no image that can be used, {len(listed.rejects)} left out: prepare would refuse this folder; fix the problems above,"
                f" or compare the folder with the layout that data_prep/datasets/{name}.py describes"
            )
    except (MaskLoomError, OSError) as error:
        page.section("Problem")
        page.line(str(error))
        return False
    page.section("To prepare it")
    page.fact("configuration", where)
    if not sample.items:
        page.line(
            "no image of the sample could be used: fix the problems above first, or prepare will refuse the folder"
        )
    for one in sets[:SETS]:
        page.command(command_line(where, raw_dir, one))
    if len(sets) > SETS:
        page.line(f"and {len(sets) - SETS} other sets, with their own data.options")
    return True


def _describe(
    adapter: DatasetAdapter, raw_dir: Path, samples: int, data: DataConfig | None, page: Page
) -> tuple[DataConfig, Listing, Sample]:
    """Print the listing, statistics of a sample, problems, and advice on the configuration.

    Args:
        adapter: the adapter of the folder.
        raw_dir: the folder.
        samples: largest number of samples to decode.
        data: the configuration; None: one that fits the sample.
        page: the output.

    Returns:
        The configuration, the listing, and the sample.
    """
    info, listing = adapter.info(), listing_of(adapter)
    _print_listing(info, listing, page)
    sample = sample_of(adapter, info, listing, samples)
    _print_sample(info, listing, sample, page)
    _print_problems([*listing.rejects, *sample.rejects], raw_dir, page)
    data = data or fitting_configuration(sample)
    advice = advice_for(info, listing, sample, data)
    if advice:
        page.section("Advice")
        for line in advice:
            page.bullet(line)
    return data, listing, sample


def _print_listing(info: DatasetInfo, listing: Listing, page: Page) -> None:
    page.section("Listed")
    kind = listing.kind
    page.fact(kind, f"{len(listing.items)} listed, {len(listing.rejects)} left out")
    page.fact("licence", info.licence)
    if any(item.label for item in listing.items):
        page.fact("classes", counted(Counter(item.label or "none" for item in listing.items)))
    groups = Counter(item.group for item in listing.items if item.group is not None)
    if groups:
        page.fact("groups", f"{len(groups)}; {kind} in each: {quantiles(list(groups.values()))}")
    else:
        page.fact("groups", "no patient ids known")
    splits = Counter(item.split or "not fixed" for item in listing.items)
    page.fact("official splits", counted(splits) if set(splits) - {"not fixed"} else "none; drawn by data.splits")


def _print_sample(info: DatasetInfo, listing: Listing, sample: Sample, page: Page) -> None:
    opened = f" of {sample.inside} in {sample.opened} {listing.kind}" if listing.kind != "images" else ""
    page.section(f"In a sample of {len(sample.items)} images{opened}{'' if sample.in_time else ' (time was up)'}")
    if not sample.items:
        page.line("none could be read")
        return
    if listing.kind != "images" and any(item.label for item in sample.items):
        page.fact("classes", counted(Counter(item.label or "none" for item in sample.items)))
    by_area = sorted(sample.sizes, key=lambda size: (size[0] * size[1], size))
    shown = [f"{width} x {height}" for height, width in (by_area[0], by_area[len(by_area) // 2], by_area[-1])]
    sizes = len(set(by_area))
    page.fact(
        "width x height", shown[0] if sizes == 1 else f"{shown[0]} to {shown[2]}, median {shown[1]}; {sizes} sizes"
    )
    page.fact("pixels", f"{counted(sample.kinds)}; values {sample.low:g} to {sample.high:g}")
    if sample.file_modes:
        page.fact("files", counted(sample.file_modes))
    if not sample.masks:
        page.fact("masks", "none")
        return
    total = sample.class_pixels.total()
    page.fact(
        "mask pixels",
        ", ".join(f"{name} {share(sample.class_pixels[i] / total)}" for i, name in enumerate(info.mask_classes)),
    )
    empty = sample.masks - len(sample.foreground)
    page.fact("empty masks", f"{empty} of {sample.masks} ({share(empty / sample.masks)})")
    if sample.foreground:
        page.fact(
            "marked area", f"{quantiles([100 * part for part in sample.foreground])} % of the image, empty masks aside"
        )


def _print_problems(rejects: Sequence[Reject], raw_dir: Path, page: Page) -> None:
    """Print the most frequent reasons, each with the number of files and an example."""
    if not rejects:
        return
    entries = group_by_reason(rejects)
    page.section(f"Left out: {len(rejects)}")
    for entry in entries[:REASONS]:
        example = entry.paths[0].removeprefix(f"{printable(str(raw_dir))}/")
        page.fact(str(len(entry.paths)), f"{entry.reason} (such as {example})")
    if len(entries) > REASONS:
        page.line(f"and {len(entries) - REASONS} other reasons; all are listed in rejected.jsonl once it is prepared")


def _describe_unknown(raw_dir: Path, tree: RawTree, kinds: dict[str, str], samples: int, page: Page) -> None:
    """Describe an unknown folder, and print a matching configuration of the dataset `folder`."""
    page.section(f"Files: {len(tree.files)}{'' if tree.complete else ' and more; only these were looked at'}")
    by_folder = tree.kinds_by_folder()
    for folder, counts in by_folder[:FOLDERS]:
        page.fact(folder, counted(counts))
    if len(by_folder) > FOLDERS:
        page.line(f"and {len(by_folder) - FOLDERS} other folders")
    tables, unreadable = tables_of(raw_dir, tree)
    if tables or unreadable:
        page.section("Tables")
        for table in tables:
            page.fact(table.file, f"{len(table.rows)} rows; columns {', '.join(table.columns) or 'none'}")
        for file, reason in unreadable:
            page.fact(file, reason)
    formats = known_formats(tree, kinds)
    if formats:
        page.section("Formats")
        for name, count, advice in formats:
            page.fact(name, f"{count} files; {advice}")
    guess = guessed_options(raw_dir, tree.without([file for file, kind in kinds.items() if kind not in IMAGES]), tables)
    if guess is not None:
        _describe_guess(guess, raw_dir, samples, page)
    elif not formats:
        page.section("Problem")
        page.line(
            "no image of a format that is read (PNG, JPEG, BMP, TIFF, npy); see docs/extending.md for an adapter of your own"
        )


def _describe_guess(guess: Guess, raw_dir: Path, samples: int, page: Page) -> None:
    if guess.mask_values:
        page.section("Masks")
        page.fact("values", guess.mask_values)
    page.title("folder: with the options guessed below")
    adapter: type[DatasetAdapter] = load_plugin(PACKAGE, "folder", "dataset").Adapter
    data = DataConfig(dataset="folder")
    try:
        opened = adapter(raw_dir, validated({"modality": "images", **guess.options}, adapter.Options, "data.options"))
        data, _, _ = _describe(opened, raw_dir, samples, None, page)
    except MaskLoomError as error:
        page.section("Problem")
        page.line(str(error))
    name = f"configs/{experiment_name(raw_dir)}.yaml"
    page.section(f"To prepare it: save this as {name}, replace TODO, check what was guessed")
    page.block(configuration_text(guess, raw_dir, data))
    page.section("Then")
    page.command(f"{shown_command('prepare')} --config {name}")
    page.section(f"Or without a file of your own: replace {MODALITY!r}, which prompts would say, by the imaging method")
    options = {"modality": MODALITY, **guess.options}
    size = {"image_size": data.image_size[0], "conditioning": data.conditioning}
    page.command(
        f"{command_line('configs/folder.yaml', raw_dir, options, **size)} experiment={experiment_name(raw_dir)}"
    )
