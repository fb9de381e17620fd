"""`accelerate launch -m train_controlnet.backbone`: the older name of `train_backbone`.

Stages do not import each other, so it hands the command over by name.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("maskloom.train_backbone", run_name="__main__", alter_sys=True)
