"""Self-attention over all positions of a feature map.

Zhang et al., Self-Attention Generative Adversarial Networks (2019): 1 x 1 convolutions to an eighth
of the channels, unscaled dot products, and a learnt gate that starts at zero.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

NARROWING = 8


class SelfAttention(nn.Module):
    """Maps (B, channels, H, W) to the same shape; the identity before training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // NARROWING)
        self.query, self.key, self.value = (nn.Conv2d(channels, narrow, 1) for _ in range(3))
        self.out = nn.Conv2d(narrow, channels, 1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Return the features plus the gated attention over all positions."""
        query, key, value = (
            layer(features).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        attended = attended[:, 0].transpose(1, 2).unflatten(2, features.shape[2:])
        return features + self.gate * self.out(attended)
