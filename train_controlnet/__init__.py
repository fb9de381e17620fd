"""ControlNet on a frozen Stable Diffusion backbone."""
