"""The recipe of a small Stable Diffusion backbone: vocabulary, VAE, then text encoder and UNet together."""
