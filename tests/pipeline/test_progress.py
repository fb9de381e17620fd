"""Progress: one closing line where there is no terminal, a bar where there is one."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from maskloom.pipeline.progress import progress, say, table_console

ROOT = Path(__file__).parents[2]
LONG_STEP = (
    "from maskloom.pipeline.progress import progress\n"
    "with progress('reading', 4, 'images') as advance:\n"
    "    for i in range(4):\n"
    "        advance(note=f'loss {i}')\n"
)


def test_elsewhere_one_line_tells_the_count_and_the_rate(capsys):
    with progress("reading", 5, "images") as advance:
        advance()
        advance(4, note="ignored")
    err = capsys.readouterr().err
    assert err.startswith("reading: 5 images in ")
    assert "images/s" in err
    assert err.count("\n") == 1


def test_elsewhere_a_long_step_tells_where_it_is_every_minute(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("maskloom.pipeline.progress.time.monotonic", lambda: now)
    with progress("reading", 10, "images", done=4) as advance:
        for now in (30.0, 61.0, 90.0, 125.0):
            advance(note=f"loss {now:.0f}")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 6 of 10 images, loss 61",
        "reading: 8 of 10 images, loss 125",
        "reading: 4 images in 125.0 s (31 s each)",
    ]


def test_tables_in_a_file_are_wide(capsys):
    table_console().print("word " * 30)
    assert capsys.readouterr().out.count("\n") == 1


def test_silent_where_asked(capsys):
    with progress("reading", 5, "images", show=False) as advance:
        advance(5)
    assert capsys.readouterr().err == ""


def test_news_go_to_stderr_as_they_are(capsys):
    say("[bold] 12 [/x] " + "long " * 60)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("[bold] 12 [/x]")


def test_on_a_terminal_there_is_a_bar_with_count_rate_and_note():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", LONG_STEP], cwd=ROOT, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux: the other side of the terminal was closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert "reading" in text
    assert "4/4" in text
    assert "images/s" in text
    assert "loss 3" in text
