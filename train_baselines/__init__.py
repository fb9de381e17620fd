"""The stage `baselines`: generators trained from scratch, to compare with fine-tuned Stable Diffusion.

GANs, pix2pix and joint diffusion are one file each in `architectures`. The training loop is `pipeline.training`; networks that sampling needs as well live in `models`.
"""
