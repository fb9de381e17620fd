"""The figures of `plan` and `find-lr` go into no file of the user's.

That is said before anything is computed.
"""

import pytest

from maskloom.pipeline.runs.command import EXIT_CODE
from maskloom.train_controlnet.__main__ import main
from tests.train_controlnet.conftest import tiny_values, write_config


@pytest.mark.parametrize("command", ["plan", "find-lr"])
def test_a_file_of_the_users_stays(tmp_path, capsys, command):
    config = write_config(tmp_path / "c.yaml", tiny_values(tmp_path / "run", tmp_path / "no backbone"))
    (tmp_path / "mine.json").write_text("mine")
    with pytest.raises(SystemExit, match=str(EXIT_CODE)):
        main([command, "--config", str(config), "--json", str(tmp_path / "mine.json")])
    assert f"--json {tmp_path / 'mine.json'}: exists, and is not an earlier" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "mine"
