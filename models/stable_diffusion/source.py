"""Which files a Stable Diffusion backbone consists of: a folder, a repository on the Hub, or one original `.safetensors` file.

Every stage asks here, so that all of them read the same files. Imports no torch.
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
"""By part that has weights: how their files' names begin."""
SETTINGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
"""By part: the file of its settings."""
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
"""Settings of Stable Diffusion 1.x and 2.x, for single files, which hold none."""


@dataclass(frozen=True)
class BackboneSource:
    """All settings that name a backbone.

    Attributes:
        name: Hub id, folder in diffusers format, or `.safetensors` file in Stable Diffusion's original layout.
        revision: branch, tag or commit on the Hub.
        variant: of the weights' files, such as `fp16`.
        tokenizer_name: Hub id or folder; None: the backbone's own.
        single_file_config: Hub id or folder whose settings and tokenizer a single file takes; None: those of Stable Diffusion 1.x or 2.x.
        prediction_type: what the configuration says that the UNet predicts; a single file does not.
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
        """Where it lies on this machine, unless it is on the Hub: as named, or in the package (`assets/nano-sd`)."""
        return shipped(Path(self.name))

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.path.is_dir()

    @property
    def is_single_file(self) -> bool:
        """Whether it is one file of this machine."""
        return self.path.is_file()

    def settings_folder(self) -> Path:
        """Return the folder with `model_index.json` and the parts' settings; from the Hub only these are downloaded.

        Raises:
            MaskLoomError: they cannot be downloaded, or a single file is of no known kind.
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
        """Return the folder with the tokenizer's files.

        Raises:
            MaskLoomError: they cannot be downloaded, or a single file is given without a tokenizer.
        """
        if self.tokenizer_name is None:
            folder = self.settings_folder() / "tokenizer"
            if self.is_single_file and not folder.is_dir():
                raise MaskLoomError(
                    f"{KEY}={self.name}: a single file holds no tokenizer; set {TOKENIZER_KEY} to a folder with its vocab.json and merges.txt "
                    f"or to a Hub id (openai/clip-vit-large-patch14 for Stable Diffusion 1.x), or {SINGLE_FILE_KEY} to a pipeline's folder or id"
                )
            return folder
        return folder_of(self.tokenizer_name, self.revision, TOKENIZER_FILES, TOKENIZER_KEY)

    def weight_names(self, part: str) -> list[str] | None:
        """Return the names of a part's files of weights (an index and its shards, or one file), or None where the Hub cannot be asked.

        Raises:
            MaskLoomError: there are none of this variant, or only pickles.
        """
        names = self._names(part)
        return None if names is None else weight_files(part, names, self.variant, self._reader(part), self.name)

    def has_no_weights(self) -> bool:
        """Return whether no part has a file of weights, of whatever kind; so is the Hub's cache before the first training."""
        names = [name for part in WEIGHTS for name in self._names(part) or []]
        return not any(name.endswith(WEIGHT_ENDINGS) for name in names)

    def weights_folder(self) -> Path:
        """Return the folder that all weights are read from; downloads those that are read, and no others.

        Raises:
            MaskLoomError: they are not there, or cannot be downloaded.
        """
        if self.is_folder:
            return self.path
        wanted = [
            f"{part}/{name}" for part in WEIGHTS for name in self.weight_names(part) or _any_name(part, self.variant)
        ]
        folder = hub_files(self.name, self.revision, (*SETTINGS_FILES, *wanted), KEY)
        for part in WEIGHTS:  # a cache that was filled without the network may lack some
            names = {path.name for path in (folder / part).glob("*")}
            weight_files(part, names, self.variant, self._reader(part), self.name)
        return folder

    def files(self) -> list[Path]:
        """Return the files of this machine that loading reads, as far as they are there; none for a backbone on the Hub."""
        if self.is_single_file:
            settings = self.settings_folder()
            return [self.path, *(settings / part / name for part, name in SETTINGS.items())]
        if not self.is_folder:
            return []
        folder = self.path
        found = [folder / INDEX, *(folder / part / name for part, name in SETTINGS.items())]
        for part in WEIGHTS:
            names = self._names(part) or []
            chosen = _chosen(part, names, self.variant, self._reader(part))
            found += [folder / part / name for name in chosen]
        return [path for path in found if path.is_file()]

    def inputs(self) -> dict[str, str]:
        """Return what identifies the backbone: the content of the files that are read, or the Hub id, revision and variant as text.

        The keys are those of a stage's record; `tokenizer` is there where it is not the backbone's own.
        """
        if self.is_folder or self.is_single_file:
            read = [*self.files(), *([] if self.tokenizer_name else _tokenizer_files(self._own_tokenizer()))]
            digest = value_digest([[self._named(path), content_digest(path)] for path in read])
            found = {"backbone": digest}
        else:
            found = {
                "backbone": f"{self.name}@{self.revision or 'main'}" + (f" {self.variant}" if self.variant else "")
            }
        if self.tokenizer_name is not None:
            folder = shipped(Path(self.tokenizer_name))
            files = [[path.name, content_digest(path)] for path in _tokenizer_files(folder)]
            found["tokenizer"] = (
                value_digest(files) if folder.is_dir() else f"{self.tokenizer_name}@{self.revision or 'main'}"
            )
        return found

    def digest(self) -> str:
        """Return `inputs` as one value."""
        found = self.inputs()
        return found["backbone"] if len(found) == 1 else value_digest(found)

    def _own_tokenizer(self) -> Path:
        return self.settings_folder() / "tokenizer"

    def _named(self, path: Path) -> str:
        """Return a file's name in a digest, which says nothing of where it lies."""
        return "" if path == self.path else path.relative_to(self.settings_folder()).as_posix()

    def _names(self, part: str) -> Collection[str] | None:
        """Return the names of the files in a part's folder, or None where the Hub cannot be asked."""
        if self.is_folder:
            return sorted(path.name for path in (self.path / part).glob("*"))
        listed = hub_listing(self.name, self.revision)
        if listed is None:
            return None
        return [name.removeprefix(f"{part}/") for name in listed if name.rpartition("/")[0] == part]

    def _reader(self, part: str) -> Callable[[str], Any]:
        """Return what reads an index of shards in a part's folder."""
        return lambda name: _index(self.settings_folder() / part / name)


def weight_files(
    part: str, names: Collection[str], variant: str | None, read: Callable[[str], Any], where: str
) -> list[str]:
    """Return which files of a part's folder hold its weights: one, or an index and the shards that it names.

    Args:
        part: of `WEIGHTS`.
        names: of the files that are there.
        variant: of the weights.
        read: returns the content of an index.
        where: the backbone, for messages.

    Raises:
        MaskLoomError: there are none of this variant, only pickles, or an index that names anything but safetensors beside it.
    """
    chosen = _chosen(part, names, variant, read)
    bad = [name for name in chosen if not name.endswith((".safetensors", ".json")) or "/" in name or "\\" in name]
    if bad:
        raise MaskLoomError(
            f"{KEY}={where}: {part}/{chosen[0]} names {bad[0]!r}, which is no .safetensors file beside it; only safetensors are read"
        )
    missing = [name for name in chosen if name not in names]
    if not chosen or missing:
        raise MaskLoomError(f"{KEY}={where}: {_no_weights(part, names, variant, missing)}")
    return chosen


def _chosen(part: str, names: Collection[str], variant: str | None, read: Callable[[str], Any]) -> list[str]:
    """Return the files that diffusers (an index first) or transformers (a single file first) reads; shards that are named may be missing."""
    single, *indices = _any_name(part, variant)
    index = next((name for name in indices if name in names), None)
    if single in names and (index is None or part == "text_encoder"):
        return [single]
    return [] if index is None else [index, *sorted(set(_shards(read(index))))]


def _any_name(part: str, variant: str | None) -> list[str]:
    """Return the names that weights may have: of a single file, and of an index by its new and by its old name."""
    base, mark = WEIGHTS[part], f".{variant}" if variant else ""
    names = [f"{base}{mark}.safetensors", f"{base}.safetensors.index{mark}.json"]
    return [*names, f"{base}{mark}.safetensors.index.json"] if variant else names


def _shards(index: Any) -> list[str]:
    """Return the files that an index of shards names."""
    named = index.get("weight_map") if isinstance(index, dict) else None
    return [str(name) for name in named.values()] if isinstance(named, dict) else []


def _index(path: Path) -> Any:
    return read_json(path, "download the backbone again")


def _no_weights(part: str, names: Collection[str], variant: str | None, missing: Sequence[str]) -> str:
    """Return why a part has no weights that can be read, and what to do."""
    if missing:
        return f"{part}/{missing[0]} is missing, which the index of its shards names; download the backbone again"
    wanted = _any_name(part, variant)[0]
    there = sorted(name for name in names if name.endswith(".safetensors"))
    variants = sorted(
        {name.split(".")[1] for name in there if name.startswith(f"{WEIGHTS[part]}.") and name.count(".") == 2}
    )
    if not there and any(name.endswith(WEIGHT_ENDINGS) for name in names):
        return (
            f"{part} has no {wanted}, only weights that are not safetensors (pickles can run code and are never opened); convert them: "
            "pipe = StableDiffusionPipeline.from_pretrained(FOLDER); pipe.save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    if variant and f"{WEIGHTS[part]}.safetensors" in there:
        return f"{part} has no {wanted}; set train.variant=null to read {WEIGHTS[part]}.safetensors"
    if variants:
        return (
            f"{part} has no {wanted}; set train.variant={variants[0]} to read {WEIGHTS[part]}.{variants[0]}.safetensors"
        )
    return f"{part} has no {wanted}; give a whole Stable Diffusion folder in diffusers format"


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def looks_local(name: str) -> bool:
    """Return whether a name cannot be a Hub id, NAMESPACE/NAME, or is that of a place beside an existing folder."""
    path = Path(name)
    return "\0" in name or name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()


def folder_of(name: str, revision: str | None, patterns: tuple[str, ...], key: str) -> Path:
    """Return a folder as it is, or that of a repository's files; see `hub_files`.

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
    """Return the folder of the Hub's cache that holds the files of a repository, after downloading those that are missing.

    Args:
        name: Hub id.
        revision: branch, tag or commit.
        patterns: of the files.
        key: the configuration key that names it.

    Raises:
        MaskLoomError: it cannot be reached and is not in the cache, or there is no such repository, branch or commit.
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
    """Return the paths of all files in a repository, or None where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return tuple(HfApi().list_repo_files(name, revision=revision))
    except Exception:  # without the network the cache is all there is; see `hub_files` for errors
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
