"""Any vision model that `transformers` loads, from the Hugging Face Hub or a local folder.

`extractor: NAMESPACE/NAME@COMMIT` or `extractor: ./FOLDER`: DINOv2 and DINOv3, RAD-DINO, CLIP,
SigLIP, ViT, ResNet, and with the package timm the models of timm. Only safetensors are read and no
code of the repository is run. A model on the Hub is pinned to a commit, so that its weights cannot
change under its name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from maskloom.evaluate.scores.features import Extractor
from maskloom.models.stable_diffusion.source import hub_files, looks_local
from maskloom.pipeline.errors import MaskLoomError, excerpt
from maskloom.pipeline.files.atomic import content_digest, value_digest
from maskloom.pipeline.files.reading import read_object

if TYPE_CHECKING:
    from torch import Tensor

INPUT_SIZE = 224  # of most models; each states its own
KEY = "extractor"
CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
SETTINGS = (CONFIG, *PROCESSORS)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
TIMM = "pretrained_cfg"  # key of the settings of timm's models
COMMIT = re.compile(r"[0-9a-f]{40}")
UNUSED = ("pooler.", "mask_token")  # weights that a checkpoint may lack: features do not depend on them
COMPLETE = "give a folder that save_pretrained has written, with its image processor"


def check(side: int) -> NoReturn:
    """Refuse the name `huggingface`, which names no model.

    Raises:
        MaskLoomError: always.
    """
    raise MaskLoomError(
        f"{KEY}=huggingface names no model: give a folder ({KEY}=./FOLDER) or a model on the Hub ({KEY}=NAMESPACE/NAME@COMMIT)"
    )


def load(side: int, device: str) -> NoReturn:
    """Refuse the name `huggingface`; see `check`.

    Raises:
        MaskLoomError: always.
    """
    check(side)


@dataclass(frozen=True)
class VisionModel:
    """A model, which is used as the file of an extractor is.

    Attributes:
        name: for tables: the folder's name, or the Hub id with the first digits of the commit.
        folder: holds `config.json`, the settings of the image processor and, unless the model is on
            the Hub, the weights.
        hub: Hub id and commit; None for a local folder.
        INPUT_SIZE: side in pixels at which the model was trained.
        mean: of each colour channel, 0..1.
        deviation: standard deviation of each colour channel.
    """

    name: str
    folder: Path
    hub: tuple[str, str] | None
    INPUT_SIZE: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def check(self, side: int) -> None:
        """Check what `load` needs, except for the weights of a model on the Hub.

        Raises:
            MaskLoomError: another side is asked for, a local folder has no safetensors, or the
                model is one of timm, which is not installed.
        """
        if side != self.INPUT_SIZE:
            raise MaskLoomError(f"extractor_size={side}: the extractor {self.name} takes {self.INPUT_SIZE} only")
        if self.hub is None:
            _weights(self.folder)
        if TIMM in read_object(self.folder / CONFIG, COMPLETE) and find_spec("timm") is None:
            raise MaskLoomError(f"{KEY}={self.name} needs timm: pip install timm, or use {KEY}=efficientnet_lite0")

    def digest(self) -> str:
        """Return the identity of the weights: of the files read, or the Hub id and its commit.

        Raises:
            MaskLoomError: a local folder has no safetensors.
        """
        if self.hub is not None:
            return value_digest(list(self.hub))
        settings = [path for name in SETTINGS if (path := self.folder / name).is_file()]
        files = [*settings, *_weights(self.folder)]
        return value_digest([[path.name, content_digest(path)] for path in files])

    def load(self, side: int, device: str) -> Extractor:
        """Return the extractor: the pooled output of the model, see `pooled_features`.

        The feature maps of its layers are those after each block.

        Args:
            side: see `check`.
            device: `cpu` or `cuda`.

        Raises:
            MaskLoomError: see `check`; the weights cannot be downloaded or read, or are incomplete.
        """
        self.check(side)
        import torch

        folder = self.folder if self.hub is None else hub_files(*self.hub, (*SETTINGS, *WEIGHTS), KEY)
        _weights(folder)
        model, has_pooler = _loaded(folder, self.name)
        model = model.eval().to(device)
        mean, deviation = (torch.tensor(one, device=device)[:, None, None] for one in (self.mean, self.deviation))

        def features(pixels: Tensor) -> Tensor:
            return pooled_features(model, (pixels / 255 - mean) / deviation, has_pooler)

        def maps(pixels: Tensor) -> list[Tensor]:
            return layer_maps(model, (pixels / 255 - mean) / deviation)

        try:
            with torch.inference_mode():
                features(torch.zeros(1, 3, side, side, device=device))
        except Exception as error:  # models raise errors of many kinds; the remedy is the same
            raise MaskLoomError(
                f"{KEY}={self.name}: gives no features of an image of {side} x {side} ({excerpt(error)}); "
                "use a vision model, whose image processor states its input size"
            ) from None
        return Extractor(self.name, self.digest(), side, features, maps)


def of_model(model: str) -> VisionModel:
    """Return the model that a configuration names; from the Hub, only its settings are downloaded.

    Args:
        model: a folder, or NAMESPACE/NAME@COMMIT.

    Raises:
        MaskLoomError: there is no such folder, the commit is missing, or the settings cannot be
            read; says what to write.
    """
    local = Path(model).expanduser()
    if "\0" not in model and local.is_dir():
        return _vision_model(local.resolve().name, local, None)
    hub_id, _, commit = model.partition("@")
    if looks_local(hub_id):
        raise MaskLoomError(
            f"{KEY}={model}: no such folder; give a folder, or a model on the Hub: NAMESPACE/NAME@COMMIT"
        )
    if not COMMIT.fullmatch(commit):
        raise MaskLoomError(
            f"{KEY}={model}: give the commit of the model, {hub_id}@ and its 40 hexadecimal digits, so that the weights "
            "cannot change; the model's page on the Hub lists them under Files and versions, History"
        )
    folder = hub_files(hub_id, commit, SETTINGS, KEY)
    return _vision_model(f"{hub_id}@{commit[:8]}", folder, (hub_id, commit))


def _vision_model(name: str, folder: Path, hub: tuple[str, str] | None) -> VisionModel:
    """Return the model of a folder, with the input size and the normalisation of its image processor."""
    side, mean, deviation = _preprocessing(folder)
    numbers = [one for pair in (mean, deviation) if isinstance(pair, list) and len(pair) == 3 for one in pair]
    floats = [float(one) for one in numbers if isinstance(one, int | float)]
    if len(floats) != 6 or min(floats[3:]) <= 0 or not isinstance(side, int) or side < 1:
        raise MaskLoomError(
            f"{KEY}={name}: its image processor states no square input size, or no mean and deviation of three channels; "
            "use a model of RGB images"
        )
    return VisionModel(name, folder, hub, side, tuple(floats[:3]), tuple(floats[3:]))


def _preprocessing(folder: Path) -> tuple[Any, Any, Any]:
    """Return input side, mean and deviation as the settings of a model state them; None where they do not."""
    timm = read_object(folder / CONFIG, COMPLETE).get(TIMM)
    if isinstance(timm, dict):  # models of timm have no image processor
        return (timm.get("input_size") or [None])[-1], timm.get("mean"), timm.get("std")
    file = next((path for name in PROCESSORS if (path := folder / name).is_file()), folder / PROCESSORS[0])
    settings = read_object(file, COMPLETE)
    settings = settings.get("image_processor", settings)
    if settings.get("do_normalize") is False:
        return _side(settings), [0.0] * 3, [1.0] * 3
    return _side(settings), settings.get("image_mean"), settings.get("image_std")


def _side(settings: dict[str, Any]) -> Any:
    """Return the side of the square that an image processor makes; None if it makes another shape."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    sides = set(size.values()) if isinstance(size, dict) else {size}
    return sides.pop() if len(sides) == 1 else None


def _weights(folder: Path) -> list[Path]:
    """Return the weight files of a folder, sorted.

    Raises:
        MaskLoomError: there are no safetensors.
    """
    found = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    if not found:
        raise MaskLoomError(
            f"{KEY}={folder}: no model.safetensors; pickles can run code and are never opened: convert them with "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return found


def _loaded(folder: Path, name: str) -> tuple[Any, bool]:
    """Return the model of a folder, and whether the weights of its pooling layer were in the files.

    Raises:
        MaskLoomError: it cannot be read, or weights are missing (they would be random).
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise MaskLoomError(
            f"{KEY}={name}: cannot be read by transformers ({excerpt(error)}); download the model again, install what "
            "it needs, or use extractor=efficientnet_lite0"
        ) from None
    missing = sorted(key for key in found["missing_keys"] if not any(part in key for part in UNUSED))
    if missing:
        raise MaskLoomError(f"{KEY}={name}: the weights {missing[0]} are missing; download the model again")
    return model, not any(UNUSED[0] in key for key in found["missing_keys"])


def pooled_features(model: Any, images: Tensor, has_pooler: bool) -> Tensor:
    """Return one vector per image, (N, D).

    Of an image-and-text model, the image's embedding in the common space (that of CMMD for CLIP);
    otherwise the model's pooled output; where the files hold no pooling layer, the class token.

    Args:
        model: a model of transformers.
        images: (N, 3, H, W), normalised.
        has_pooler: whether the weights of the pooling layer were read.
    """
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=images)
        embedding: Tensor = getattr(found, "pooler_output", found)  # transformers 4 returns the tensor itself
        return embedding.float()
    output = model(pixel_values=images)
    pooled = getattr(output, "pooler_output", None) if has_pooler else None
    vector: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
    return vector.flatten(1).float()


def layer_maps(model: Any, images: Tensor) -> list[Tensor]:
    """Return the feature maps after each block, (N, C, H, W), or (N, C, tokens) of a transformer."""
    network = getattr(model, "vision_model", model)
    blocks = network(pixel_values=images, output_hidden_states=True).hidden_states[1:]
    return [(one.transpose(1, 2) if one.ndim == 3 else one).float() for one in blocks]
