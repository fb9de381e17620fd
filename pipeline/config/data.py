"""The section `data`: the raw dataset and how it is prepared."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from maskloom.pipeline.config.base import NOTHING_TO_DROP, PluginName, Section, Size, UserPath
from maskloom.pipeline.config.bounds import Rows, Workers


class Splits(Section):
    """Share of the groups in each split."""

    train: float = Field(0.7, gt=0, le=1)
    validation: float = Field(0.15, ge=0, lt=1)
    test: float = Field(0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _sum_is_one(self) -> "Splits":
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError(f"the shares must sum to 1, not {self.train + self.validation + self.test:g}")
        return self


class IntensityWindow(Section):
    """Mapping of raw intensities to 0..255: the values that become black and white."""

    method: Literal["percentile", "window", "zscore"] = "percentile"
    lower: float = Field(1.0, ge=0, lt=100, description="percentile mapped to black")
    upper: float = Field(99.0, gt=0, le=100, description="percentile mapped to white")
    center: float | None = Field(None, description="centre of the window, in raw units (Hounsfield units for CT)")
    width: float | None = Field(None, gt=0, description="width of the window, in raw units")
    deviations: float = Field(
        3.0, gt=0, description="zscore: the window spans the mean plus and minus this many standard deviations"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> "IntensityWindow":
        if self.method == "window" and (self.center is None or self.width is None):
            raise ValueError("method=window needs center and width, in raw units")
        if self.lower >= self.upper:
            raise ValueError(f"lower={self.lower:g} must be below upper={self.upper:g}")
        return self


class StainConfig(Section):
    """Stain normalisation of H&E and similar images."""

    method: Literal["macenko", "reinhard"]
    reference: UserPath | None = Field(
        None,
        description="image whose stains all others are normalised to; "
        "null: the published reference vectors (macenko only)",
    )

    @model_validator(mode="after")
    def _has_a_reference(self) -> "StainConfig":
        if self.method == "reinhard" and self.reference is None:
            raise ValueError(
                "method=reinhard needs reference: the path of an image whose colours all others are normalised to"
            )
        return self


class ExternalConfig(Section):
    """An external dataset that provides an additional test split."""

    raw_dir: UserPath | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="the adapter's own options")


def _as_external(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if isinstance(value, dict) and (dropped := next((name for name in value if value[name] is False), None)):
        raise ValueError(NOTHING_TO_DROP.format(name=dropped))
    return value


class DataConfig(Section):
    """`prepare`: raw dataset -> mask-and-prompt dataset."""

    dataset: PluginName = Field(description="file name in data_prep/datasets, without extension")
    raw_dir: UserPath | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="the adapter's own options")
    image_size: Size = (512, 512)
    buckets: list[Size] = Field(
        default_factory=list,
        description="further sizes besides image_size; each image is resized to the one with the nearest aspect ratio",
    )
    resize_mode: Literal["pad", "crop", "stretch"] = "pad"
    conditioning: Literal["mask", "edges", "both", "foreground", "image"] = "mask"
    intensity: IntensityWindow | None = Field(None, description="null: as the dataset defines")
    stain: StainConfig | None = None
    splits: Splits = Splits()
    duplicates: Literal["near", "identical", "none"] | None = Field(None, description="null: as the dataset defines")
    near_duplicate_correlation: float | None = Field(
        None,
        gt=0,
        le=1,
        description="correlation after alignment above which two images are near-duplicates; "
        "null: 0.55, and more shared detail than between unrelated images",
    )
    external: Annotated[dict[PluginName, ExternalConfig], BeforeValidator(_as_external)] = Field(
        default_factory=dict,
        description="file name in data_prep/datasets -> its settings; each dataset becomes the split external_NAME",
    )
    rows_per_shard: Rows = Field(512, ge=1)
    num_workers: Workers | None = Field(
        None, ge=1, description="reading processes; null: one per core, fewer for few images"
    )

    @model_validator(mode="after")
    def _sides_suit_the_vae(self) -> "DataConfig":
        for size in self.sizes:
            if any(side < 8 or side % 8 for side in size):
                key = "image_size" if size == self.image_size else "buckets"
                raise ValueError(f"{key}={size}: both sides must be positive multiples of 8 (the VAE's factor)")
        return self

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All sizes that images are resized to, `image_size` first."""
        return list(dict.fromkeys([self.image_size, *self.buckets]))
