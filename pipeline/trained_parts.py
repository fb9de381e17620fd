"""Which folders of trained weights a configuration leaves in `generator/`; imports nothing of weight."""

from pipeline.config import TrainConfig


def exported_names(config: TrainConfig) -> list[str]:
    """Return the folders' names, each one that a diffusers user loads by itself.

    `controlnet` (`ControlNetModel.from_pretrained`), `unet` (`UNet2DConditionModel.from_pretrained`; where its decoder was trained), `lora`
    (`pipe.load_lora_weights`), `vae` (`AutoencoderKL.from_pretrained`; where its decoder was fine-tuned).
    """
    names = []
    if config.controlnet != "none":
        names.append("controlnet")
    if not config.sd_locked:
        names.append("unet")
    if {"unet", "text_encoder"} & set(config.lora):
        names.append("lora")
    if config.vae_decoder is not None:
        names.append("vae")
    return names
