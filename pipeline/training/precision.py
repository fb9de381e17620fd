"""The dtypes of accelerate's `mixed_precision` settings."""

import torch

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
