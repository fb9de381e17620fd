"""The section `generate`: generators, masks to sample from, and sampling settings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from maskloom.pipeline.config.base import Plugins, Precision, Section, plugin_options
from maskloom.pipeline.config.bounds import BatchSize, Rows, Timesteps, Tries
from maskloom.pipeline.plugins import default_plugins


class WarpConfig(Section):
    """How train masks are warped into new masks."""

    rotation_degrees: float = Field(15.0, ge=0, le=180)
    scale: tuple[float, float] = (0.85, 1.2)
    shear_degrees: float = Field(5.0, ge=0, lt=45)
    translation: float = Field(0.05, ge=0, lt=0.5, description="largest shift, as a fraction of the image's side")
    elastic_alpha: float = Field(0.03, ge=0, description="largest displacement, as a fraction of the image's side")
    elastic_sigma: float = Field(0.08, gt=0, description="smoothness, as a fraction of the image's side")
    flip_horizontal: bool = False
    min_area_ratio: float = Field(
        0.5, gt=0, le=1, description="smallest allowed area of a class, relative to the original"
    )
    max_area_ratio: float = Field(2.0, ge=1, description="largest allowed area, relative to the original")
    attempts: Tries = Field(
        20, ge=1, description="attempts per mask; after the last one the mask is rejected with the reason"
    )

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> "WarpConfig":
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: give the smallest and the largest factor, both above 0")
        return self


SchedulerName = Literal["unipc", "dpmsolver++", "ddim"]
DEFAULT_GENERATORS = default_plugins("maskloom.generate.generators")


class GenerateConfig(Section):
    """`generate`: trained generator + mask source -> synthetic mask-and-prompt dataset."""

    generators: Annotated[Plugins, plugin_options(*DEFAULT_GENERATORS)] = Field(
        {name: {} for name in DEFAULT_GENERATORS},
        description="file name in generate/generators -> its options",
    )
    mask_source: list[Literal["train", "warped"]] = Field(["train", "warped"], min_length=1)
    num_images: Rows | None = Field(
        None, ge=1, description="total number, divided evenly among the classes; null: the size of the train split"
    )
    images_per_class: dict[str, Rows] | None = Field(
        None, description="exact number of images for each class name; overrides num_images"
    )
    warp: WarpConfig = WarpConfig()
    scheduler: SchedulerName = "unipc"
    num_inference_steps: Timesteps = Field(20, ge=1)
    guidance_scale: float = Field(3.0, ge=0)
    controlnet_conditioning_scale: float = Field(1.0, ge=0)
    batch_size: BatchSize = Field(8, ge=1)
    mixed_precision: Precision = "no"
    enable_xformers_memory_efficient_attention: bool = False
    rows_per_shard: Rows = Field(64, ge=1)
