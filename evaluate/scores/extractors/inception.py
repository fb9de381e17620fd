"""Inception v3 as the Fréchet inception distance was defined with (Heusel et al. 2017); needs torch-fidelity and its weights."""

from __future__ import annotations

from maskloom.evaluate.scores.features import Extractor
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.extras import require
from maskloom.pipeline.files.atomic import value_digest

INPUT_SIZE = 299


def load(side: int, device: str) -> Extractor:
    """Return the extractor: the 2048 features after the last pooling.

    Args:
        side: must be 299, the only size that published figures are for.
        device: `cpu` or `cuda`.

    Raises:
        MaskLoomError: torch-fidelity is not installed, its weights cannot be had, or another side is asked for.
    """
    if side != INPUT_SIZE:
        raise MaskLoomError(f"extractor_size={side}: the extractor inception takes {INPUT_SIZE} only")
    require("torch_fidelity", "fid", "extractor=inception", "extractor=efficientnet_lite0")
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval().to(device)
    except OSError as error:
        raise MaskLoomError(
            f"the weights of inception cannot be had ({one_line(error)}); use extractor=efficientnet_lite0"
        ) from None
    digest = value_digest([[name, float(value.double().sum())] for name, value in sorted(network.state_dict().items())])

    def features(pixels: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = network(pixels.round().clamp(0, 255).to(torch.uint8))[0]
        return pooled.float()

    return Extractor("inception", digest, side, features)
