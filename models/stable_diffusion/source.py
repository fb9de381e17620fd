"""The files of a Stable Diffusion backbone: a folder, a Hub repository, or a single `.safetensors`.

All stages find the files here, so they read the same ones. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from maskloom.models.stable_diffusion.keys import KEY, SINGLE_FILE_KEY, TOKENIZER_KEY
from maskloom.models.stable_diffusion.single_file import generation_of
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError, excerpt
from maskloom.pipeline.files.atomic import content_digest, read_json, value_digest
from maskloom.pipeline.files.shipped import shipped

INDEX = "model_index.json"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Base name of the weight files by part."""
SETTINGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
"""Name of the settings file by part."""
PARTS = (*SETTINGS, "tokenizer")
WEIGHT_ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SETTINGS_FILES = (
    INDEX,
    *(f"{part}/*.json" for part in SETTINGS),
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
)
ORIGINAL = Path(__file__).parent / "settings"
"""Settings of Stable Diffusion 1.x and 2.x for single files, which have none."""


@dataclass(frozen=True)
class BackboneSource:
    """The settings that identify a backbone.

    Attributes:
        name: Hub id, folder in diffusers format, or `.safetensors` file in Stable Diffusion's
            original layout.
        revision: branch, tag or commit on the Hub.
        variant: variant of the weight files, such as `fp16`.
        tokenizer_name: Hub id or folder of the tokenizer; None: the backbone's own.
        single_file_config: Hub id or folder with settings and tokenizer for a single file; None:
            those of Stable Diffusion 1.x or 2.x.
        prediction_type: the configured prediction type, which a single file does not contain.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    tokenizer_name: str | None = None
    single_file_config: str | None = None
    prediction_type: str | None = None

    @classmethod
    def of(cls, train: TrainConfig) -> BackboneSource:
        """Return the backbone of a configuration."""
        return cls(
            train.pretrained_model_name_or_path,
            train.revision,
            train.variant,
            train.tokenizer_name,
            train.single_file_config,
            train.prediction_type,
        )

    @property
    def path(self) -> Path:
        """The local path, as named or in the package (`assets/nano-sd`); a Hub id has none."""
        return shipped(Path(self.name))

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder."""
        return self.path.is_dir()

    @property
    def is_single_file(self) -> bool:
        """Whether it is a single local file."""
        return self.path.is_file()

    def settings_folder(self) -> Path:
        """Return the folder with `model_index.json` and the settings of the parts.

        From the Hub, only these files are downloaded.

        Raises:
            MaskLoomError: they cannot be downloaded, or a single file is of an unknown kind.
        """
        if self.is_folder:
            return self.path
        if not self.is_single_file:
            return hub_files(self.name, self.revision, SETTINGS_FILES, KEY)
        if self.single_file_config is None:
            return ORIGINAL / generation_of(self.path)
        return folder_of(self.single_file_config, None, SETTINGS_FILES, SINGLE_FILE_KEY)

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the content of `scheduler_config.json`.

        Raises:
            MaskLoomError: it is missing or damaged.
        """
        settings = read_settings(self.settings_folder() / "scheduler" / SETTINGS["scheduler"])
        if self.is_single_file and self.single_file_config is None and self.prediction_type is not None:
            settings["prediction_type"] = self.prediction_type
        return settings

    def tokenizer_folder(self) -> Path:
        """Return the folder with the files of the tokenizer.

        Raises:
            MaskLoomError: they cannot be downloaded, or a single file has no tokenizer.
        """
        if self.tokenizer_name is None:
            folder = self.settings_folder() / "tokenizer"
            if self.is_single_file and not folder.is_dir():
                raise MaskLoomError(
                    f"{KEY}={self.name}: a single file holds no tokenizer; set {TOKENIZER_KEY} to a folder with its "
                    "vocab.json and merges.txt or to a Hub id (openai/clip-vit-large-patch14 for Stable Diffusion 1.x), "
                    f"or {SINGLE_FILE_KEY} to a pipeline's folder or id"
                )
            return folder
        return folder_of(self.tokenizer_name, self.revision, TOKENIZER_FILES, TOKENIZER_KEY)

    def weight_names(self, part: str) -> list[str] | None:
        """Return the names of a part's weight files: one file, or an index and its shards.

        Returns:
            The names, or None if the Hub cannot be reached.

        Raises:
            MaskLoomError: there are no weights of this variant, or only pickles.
        """
        names = self._names(part)
        return None if names is None else weight_files(part, names, self.variant, self._index_reader(part), self.name)

    def has_no_weights(self) -> bool:
        """Return whether no part has weights, as in the Hub's cache before a training."""
        names = [name for part in WEIGHTS for name in self._names(part) or []]
        return not any(name.endswith(WEIGHT_ENDINGS) for name in names)

    def weights_folder(self) -> Path:
        """Return the folder with the weights, downloading only those that are read.

        Raises:
            MaskLoomError: weights are missing or cannot be downloaded.
        """
        if self.is_folder:
            return self.path
        wanted = [
            f"{part}/{name}"
            for part in WEIGHTS
            for name in self.weight_names(part) or possible_names(part, self.variant)
        ]
        folder = hub_files(self.name, self.revision, (*SETTINGS_FILES, *wanted), KEY)
        for part in WEIGHTS:  # a cache filled offline may lack some
            names = {path.name for path in (folder / part).glob("*")}
            weight_files(part, names, self.variant, self._index_reader(part), self.name)
        return folder

    def files(self) -> list[Path]:
        """Return the existing local files that loading reads; none for a backbone on the Hub."""
        if self.is_single_file:
            settings = self.settings_folder()
            return [self.path, *(settings / part / name for part, name in SETTINGS.items())]
        if not self.is_folder:
            return []
        folder = self.path
        found = [folder / INDEX, *(folder / part / name for part, name in SETTINGS.items())]
        for part in WEIGHTS:
            names = self._names(part) or []
            chosen = choose_weight_files(part, names, self.variant, self._index_reader(part))
            found += [folder / part / name for name in chosen]
        return [path for path in found if path.is_file()]

    def inputs(self) -> dict[str, str]:
        """Return what identifies the backbone, under the keys of a stage's record.

        `backbone` is a digest of the files that are read, or Hub id, revision and variant as text.
        `tokenizer` exists if the tokenizer is not the backbone's own.
        """
        if self.is_folder or self.is_single_file:
            settings = self.settings_folder()
            read = [*self.files(), *([] if self.tokenizer_name else tokenizer_files(settings / "tokenizer"))]
            # Names in the digest must not depend on where the files lie.
            names = ["" if path == self.path else path.relative_to(settings).as_posix() for path in read]
            digest = value_digest([[name, content_digest(path)] for name, path in zip(names, read, strict=True)])
            found = {"backbone": digest}
        else:
            found = {
                "backbone": f"{self.name}@{self.revision or 'main'}" + (f" {self.variant}" if self.variant else "")
            }
        if self.tokenizer_name is not None:
            folder = shipped(Path(self.tokenizer_name))
            files = [[path.name, content_digest(path)] for path in tokenizer_files(folder)]
            found["tokenizer"] = (
                value_digest(files) if folder.is_dir() else f"{self.tokenizer_name}@{self.revision or 'main'}"
            )
        return found

    def digest(self) -> str:
        """Return `inputs` as one value."""
        found = self.inputs()
        return found["backbone"] if len(found) == 1 else value_digest(found)

    def _names(self, part: str) -> Collection[str] | None:
        """Return the names of the files of a part, or None if the Hub cannot be reached."""
        if self.is_folder:
            return sorted(path.name for path in (self.path / part).glob("*"))
        listed = hub_listing(self.name, self.revision)
        if listed is None:
            return None
        return [name.removeprefix(f"{part}/") for name in listed if name.rpartition("/")[0] == part]

    def _index_reader(self, part: str) -> Callable[[str], Any]:
        """Return a function that reads an index of shards in a part's folder."""
        return lambda name: read_json(self.settings_folder() / part / name, "download the backbone again")


def weight_files(
    part: str, names: Collection[str], variant: str | None, read: Callable[[str], Any], where: str
) -> list[str]:
    """Return the names of a part's weight files: one file, or an index and its shards.

    Args:
        part: a key of `WEIGHTS`.
        names: names of the files in the part's folder.
        variant: variant of the weights.
        read: returns the content of an index by name.
        where: the backbone, for messages.

    Raises:
        MaskLoomError: there are no weights of this variant, or only pickles, or an index names
            anything but safetensors next to it.
    """
    chosen = choose_weight_files(part, names, variant, read)
    bad = [name for name in chosen if not name.endswith((".safetensors", ".json")) or "/" in name or "\\" in name]
    if bad:
        raise MaskLoomError(
            f"{KEY}={where}: {part}/{chosen[0]} names {bad[0]!r}, which is no .safetensors file beside it; "
            "only safetensors are read"
        )
    missing = [name for name in chosen if name not in names]
    if not chosen or missing:
        raise MaskLoomError(f"{KEY}={where}: {missing_weights(part, names, variant, missing)}")
    return chosen


def choose_weight_files(
    part: str, names: Collection[str], variant: str | None, read: Callable[[str], Any]
) -> list[str]:
    """Return the names of the files that diffusers or transformers would read.

    Shards may be missing. diffusers looks for an index first, transformers for a single file.
    """
    single, *indices = possible_names(part, variant)
    index = next((name for name in indices if name in names), None)
    if single in names and (index is None or part == "text_encoder"):
        return [single]
    if index is None:
        return []
    content = read(index)
    named = content.get("weight_map") if isinstance(content, dict) else None
    return [index, *sorted({str(name) for name in named.values()} if isinstance(named, dict) else ())]


def possible_names(part: str, variant: str | None) -> list[str]:
    """Return the possible names of weights: a single file, and an index by its new and old name."""
    base, mark = WEIGHTS[part], f".{variant}" if variant else ""
    names = [f"{base}{mark}.safetensors", f"{base}.safetensors.index{mark}.json"]
    return [*names, f"{base}{mark}.safetensors.index.json"] if variant else names


def missing_weights(part: str, names: Collection[str], variant: str | None, missing: Sequence[str]) -> str:
    """Return why no weights of a part can be read, and what to do."""
    if missing:
        return f"{part}/{missing[0]} is missing, which the index of its shards names; download the backbone again"
    wanted = possible_names(part, variant)[0]
    there = sorted(name for name in names if name.endswith(".safetensors"))
    variants = sorted(
        {name.split(".")[1] for name in there if name.startswith(f"{WEIGHTS[part]}.") and name.count(".") == 2}
    )
    if not there and any(name.endswith(WEIGHT_ENDINGS) for name in names):
        return (
            f"{part} has no {wanted}, only weights that are not safetensors (pickles can run code and are never opened); "
            "convert them: pipe = StableDiffusionPipeline.from_pretrained(FOLDER); pipe.save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    if variant and f"{WEIGHTS[part]}.safetensors" in there:
        return f"{part} has no {wanted}; set train.variant=null to read {WEIGHTS[part]}.safetensors"
    if variants:
        return (
            f"{part} has no {wanted}; set train.variant={variants[0]} to read {WEIGHTS[part]}.{variants[0]}.safetensors"
        )
    return f"{part} has no {wanted}; give a whole Stable Diffusion folder in diffusers format"


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the existing files of a tokenizer."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def looks_local(name: str) -> bool:
    """Return whether a name is no Hub id, NAMESPACE/NAME, or names a file in an existing folder."""
    path = Path(name)
    return "\0" in name or name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()


def folder_of(name: str, revision: str | None, patterns: tuple[str, ...], key: str) -> Path:
    """Return a local folder, or the folder of a repository's files; see `hub_files`.

    Raises:
        MaskLoomError: there is no such folder, or see `hub_files`.
    """
    if "\0" not in name and (folder := shipped(Path(name))).is_dir():
        return folder
    if looks_local(name):
        raise MaskLoomError(f"{key}={name}: no such folder; give a local folder or a Hub id, NAMESPACE/NAME")
    return hub_files(name, revision, patterns, key)


@lru_cache(maxsize=64)
def hub_files(name: str, revision: str | None, patterns: tuple[str, ...], key: str) -> Path:
    """Return the folder in the Hub's cache with files of a repository, downloading missing ones.

    Args:
        name: Hub id.
        revision: branch, tag or commit.
        patterns: patterns of the files.
        key: the configuration key that names the repository.

    Raises:
        MaskLoomError: the Hub cannot be reached and the files are not in the cache, or there is no
            such repository, branch or commit.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the client raises errors of many kinds; the remedy is the same
        at = f" of revision {revision}" if revision else ""
        raise MaskLoomError(
            f"{key}={name}: its files{at} are neither in the Hub's cache nor can they be downloaded ({excerpt(error)}); "
            "connect to the network once, correct the name, or give a local folder"
        ) from None


@lru_cache(maxsize=64)
def hub_listing(name: str, revision: str | None) -> tuple[str, ...] | None:
    """Return the paths of all files in a repository, or None if the Hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return tuple(HfApi().list_repo_files(name, revision=revision))
    except Exception:  # offline, only the cache is left; see `hub_files` for errors
        return None


def read_settings(path: Path) -> dict[str, Any]:
    """Return the content of a settings file.

    Raises:
        MaskLoomError: it is missing, not JSON, or not a mapping.
    """
    values = read_json(path, "give a folder in diffusers format")
    if not isinstance(values, dict):
        raise MaskLoomError(
            f"{path}: must hold a mapping, not {json.dumps(values)[:40]}; give a folder in diffusers format"
        )
    return values
