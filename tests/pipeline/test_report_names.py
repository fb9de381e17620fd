"""Names with markup, very long names and many arms: the page stays whole and everything is escaped."""

from html.parser import HTMLParser

import pytest

from maskloom.pipeline.report import write_report
from maskloom.pipeline.results import Forest, ForestRow, Table
from tests.pipeline import fake_run

HOSTILE = '<b onclick="x()">arm & "quote" \'single\'</b><script>alert(1)</script> $x$ {{ 7 * 7 }}'
LONG = "a_very_long_name_" * 20
ARMS = [HOSTILE, LONG, *(f"arm {number}" for number in range(28))]


class _Tags(HTMLParser):
    """Collects the tags and the texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened, self.closed, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        self.closed.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_thirty_arms_with_hostile_and_long_names_are_shown_escaped(tmp_path) -> None:
    run, config = fake_run.whole_run(tmp_path)
    rows = [ForestRow(name=name, value=0.01, low=-0.1, high=0.1, finding=HOSTILE, group=name) for name in ARMS]
    forests = [Forest(title=HOSTILE, x_label=HOSTILE, primary=True, rows=rows).model_dump()]
    cells = [[name, HOSTILE, 0.5] for name in ARMS for _ in range(3)]
    groups = [name for name in ARMS for _ in range(3)]
    table = Table(title=HOSTILE, note=LONG, columns=[HOSTILE, LONG, "value"], rows=cells, groups=groups)
    curves = [{"title": HOSTILE, "x_label": HOSTILE, "series": {name: [[0, 1], [1, 2]] for name in ARMS}}]
    texts = {"verdict": HOSTILE, "question": LONG, "warnings": [HOSTILE], "limits": [LONG], "would_change": [HOSTILE]}
    answer = fake_run.evaluation(
        "help", headline=True, forests=forests, tables=[table.model_dump(mode="json")], curves=curves, **texts
    )
    fake_run.write_evaluation(run, "b_help", answer)
    write_report(config, False)
    page = _Tags(run.report.read_text(encoding="utf-8"))
    assert not {"script", "b"} & set(page.opened)
    assert page.text.count(HOSTILE) > 90
    assert LONG in page.text
    for tag in ("table", "tr", "td", "th", "figure", "details", "div", "section"):
        assert page.opened.count(tag) == page.closed.count(tag), tag


def test_a_table_has_a_heading_for_every_row_or_for_none() -> None:
    with pytest.raises(ValueError, match="1 groups for 2 rows; give one for each row, or none"):
        Table(title="t", columns=["a"], rows=[["x"], ["y"]], groups=["first"])
    assert "groups" not in Table(title="t", columns=["a"], rows=[["x"]]).model_dump()
