"""Inception v3 as used to define the Fréchet inception distance (Heusel et al. 2017).

Needs the package torch-fidelity and its weights.
"""

from __future__ import annotations

from maskloom.evaluate.scores.features import Extractor
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.plugins import require

INPUT_SIZE = 299


def check(side: int) -> None:
    """Check what `load` needs, except for the weights.

    Args:
        side: must be 299, the only size used by published figures.

    Raises:
        MaskLoomError: torch-fidelity is not installed, or another side is asked for.
    """
    if side != INPUT_SIZE:
        raise MaskLoomError(f"extractor_size={side}: the extractor inception takes {INPUT_SIZE} only")
    require("torch_fidelity", "fid", "extractor=inception", "extractor=efficientnet_lite0")


def load(side: int, device: str) -> Extractor:
    """Return the extractor: the 2048 features after the last pooling layer.

    Args:
        side: see `check`.
        device: `cpu` or `cuda`.

    Raises:
        MaskLoomError: see `check`; or its weights cannot be downloaded.
    """
    check(side)
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval().to(device)
    except OSError as error:
        raise MaskLoomError(
            f"the weights of inception cannot be downloaded ({one_line(error)}); use extractor=efficientnet_lite0"
        ) from None
    digest = value_digest([[name, float(value.double().sum())] for name, value in sorted(network.state_dict().items())])

    def features(pixels: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = network(pixels.round().clamp(0, 255).to(torch.uint8))[0]
        return pooled.float()

    return Extractor("inception", digest, side, features)
