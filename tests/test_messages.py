"""Messages to the user name commands that exist in a checkout and when installed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "data_prep", "train_controlnet", "train_baselines", "models", "generate", "evaluate", "src")
TARGETS = "demo|prepare|train|baselines|generate|evaluate|report|all|sweep|status|plan|push|[{]"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_message_names_a_target_of_the_makefile(package: str) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / package).rglob("*.py")}
    assert texts
    assert [path for path, text in texts.items() if re.search(rf"[(`]make ({TARGETS})", text)] == []
