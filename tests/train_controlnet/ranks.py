"""The train stage on processes that each hold a part of the weights: `torchrun -m
tests.train_controlnet.ranks CONFIG`.
"""

import sys
from functools import partial
from pathlib import Path

import yaml

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.training import setup
from maskloom.train_controlnet.train import train_stage
from tests.pipeline.ranks import fsdp_accelerator

FILE = Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp.yaml"


if __name__ == "__main__":
    engine = yaml.safe_load(FILE.read_text())["fsdp_config"]
    setup.make_accelerator = partial(  # type: ignore[assignment]
        fsdp_accelerator,
        auto_wrap_policy=engine["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=engine["fsdp_transformer_layer_cls_to_wrap"].split(","),
        reshard_after_forward=engine["fsdp_reshard_after_forward"],
        state_dict_type=engine["fsdp_state_dict_type"],
    )
    train_stage(load_experiment(Path(sys.argv[1]), []), force=False)
