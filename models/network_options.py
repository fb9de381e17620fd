"""The choice of a segmentation or classification network, its settings, and how it is built.

Networks are plug-ins: `models/segmenters` and `models/classifiers` say what a file provides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from maskloom.pipeline.config.base import DigestedSection, Size
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.training.fixed_steps import FixedSteps

if TYPE_CHECKING:
    from torch import Tensor, nn

Loss = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class KeyedNetwork:
    """A network whose settings are keys of the section itself.

    Attributes:
        file: the file of the network.
        keys: the section's keys that are settings of the network.
        fixed: settings that the name fixes.
    """

    file: str
    keys: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)


class NetworkOptions(FixedSteps, DigestedSection):
    """Image size and training of a network, and the network's own settings.

    A subclass adds the key that names the network, `CHOOSER`, and the keys of its `KEYED` networks;
    these keys have no effect on other networks.
    """

    PACKAGE: ClassVar[str]
    KIND: ClassVar[str]
    CHOOSER: ClassVar[str]
    KEYED: ClassVar[Mapping[str, KeyedNetwork]]

    image_size: Size = (256, 256)
    network_options: dict[str, Any] = Field({}, description="settings of the network, see the file of its name")

    @model_validator(mode="before")
    @classmethod
    def _settings_suit_the_network(cls, values: Any) -> Any:
        """Check the network's settings, and put those of a keyed network where its keys are."""
        name = values.get(cls.CHOOSER, cls.model_fields[cls.CHOOSER].default) if isinstance(values, dict) else None
        given = (values.get("network_options") or {}) if isinstance(values, dict) else None
        if not isinstance(name, str) or not isinstance(given, dict):
            return values  # pydantic reports the type
        try:
            plugin = cls._plugin(name)
            settings = validated(given, plugin.Options, f"network_options of {name}")
        except MaskLoomError as error:
            raise ValueError(str(error)) from None
        found = {key: value for key, value in values.items() if key != "network_options"}
        if name in cls.KEYED:
            found |= given
        else:
            found["network_options"] = settings.model_dump(mode="json")
        if found.get("learning_rate") is None and (name not in cls.KEYED or "learning_rate" in found):
            found["learning_rate"] = plugin.LEARNING_RATE
        return found

    @classmethod
    def _plugin(cls, name: str) -> ModuleType:
        """Return the file of a network, by the name that a configuration gives."""
        file = cls.KEYED[name].file if name in cls.KEYED else name
        return load_plugin(cls.PACKAGE, file, cls.KIND)

    @model_validator(mode="after")
    def _size_suits_the_network(self) -> NetworkOptions:
        factor, smallest = self.plugin.sides(self.settings)
        if any(side % factor or side < smallest for side in self.image_size):
            multiples = f"multiples of {factor}, and " if factor > 1 else ""
            raise ValueError(
                f"image_size={self.image_size}: both sides must be {multiples}at least {smallest} for {self.network_name} "
                "with these settings"
            )
        return self

    def unused_keys(self) -> set[str]:
        """Return the keys of other networks; `network_options` where other keys replace it."""
        if self.network_name in self.KEYED:
            return super().unused_keys() | {"network_options"}
        return super().unused_keys() | {key for network in self.KEYED.values() for key in network.keys}

    @property
    def network_name(self) -> str:
        """The network, as the configuration names it."""
        return str(getattr(self, self.CHOOSER))

    @property
    def plugin(self) -> ModuleType:
        """The file of the network."""
        return self._plugin(self.network_name)

    @property
    def settings(self) -> Any:
        """The network's own settings, an instance of its `Options`."""
        keyed = self.KEYED.get(self.network_name)
        if keyed is None:
            return self.plugin.Options(**self.network_options)
        return self.plugin.Options(**keyed.fixed, **{key: getattr(self, key) for key in keyed.keys})

    def check_packages(self) -> None:
        """Check that the packages that the network needs are installed.

        Raises:
            MaskLoomError: one is not.
        """
        check = getattr(self.plugin, "check", None)
        if check is not None:
            check()


def build_network(options: NetworkOptions, image_channels: int, classes: int, seed: int) -> nn.Module:
    """Return the untrained network of these options; the same seed gives the same weights.

    It maps (B, image_channels, H, W) in [-1, 1] to logits, or to a list of them, the final ones first.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: nn.Module = options.plugin.build(options.settings, image_channels, classes, options.image_size)
        return network


def final_logits(outputs: Any) -> Tensor:
    """Return the logits that predictions are made from: the first of several."""
    final: Tensor = outputs[0] if isinstance(outputs, list | tuple) else outputs
    return final


def training_loss(options: NetworkOptions, loss: Loss) -> Loss:
    """Return the training loss: the network's own, or the mean of `loss` over all its logits."""
    import torch

    def mean_loss(outputs: Any, targets: Tensor) -> Tensor:
        if not isinstance(outputs, list | tuple):
            return loss(outputs, targets)
        return torch.stack([loss(one, targets) for one in outputs]).mean()

    own: Loss = getattr(options.plugin, "loss", mean_loss)
    return own
