"""Forest plots of the report."""

from maskloom.pipeline.report import write_report
from maskloom.pipeline.report.forest import forest_description, forest_plot
from maskloom.pipeline.results import Forest, ForestRow
from tests.pipeline import fake_run

FOREST = Forest(
    title="Dice <1>",
    x_label="difference in Dice",
    primary=True,
    rows=[
        ForestRow(
            name="a_$b$", value=0.01, low=-0.1, high=0.12, finding="no clear benefit", basis="9 cases", smallest=0.2
        ),
        ForestRow(name="one seed", value=-0.02, finding="cannot tell", basis="9 cases"),
        ForestRow(name="failed", value=None, finding="cannot tell", basis="0 cases", reference=True),
    ],
)


def test_the_same_forest_gives_the_same_bytes() -> None:
    assert forest_plot(FOREST) == forest_plot(FOREST)
    text = forest_plot(FOREST)
    assert "a_$b$: +0.010 [-0.100, 0.120]" in text
    assert "one seed: -0.0200 [no interval]" in text
    assert "failed: not defined" in text


def test_groups_of_rows_have_headings_and_long_names_are_wrapped() -> None:
    rows = [
        ForestRow(name=name, value=0.1, group=group)
        for name, group in (("one", "first"), ("two", "first"), ("x" * 150, "second"))
    ]
    text = forest_plot(Forest(title="t", x_label="difference", rows=rows))
    assert text.count(">first<") == text.count(">second<") == 1
    assert text.index(">first<") < text.index(">one: ") < text.index(">second<") < text.index("x" * 50)
    assert "x" * 60 not in text


def test_the_plot_is_described_in_words() -> None:
    words = forest_description(FOREST)
    assert words.startswith("forest plot: Dice <1>. a_$b$ +0.010 [-0.100, 0.120], no clear benefit (9 cases, smallest")
    assert "failed not defined, cannot tell (0 cases)" in words


def test_the_page_shows_forests_and_what_would_change_the_verdict(tmp_path) -> None:
    run, config = fake_run.whole_run(tmp_path)
    other = FOREST.model_copy(update={"primary": False, "title": "IoU"})
    extra = {"forests": [one.model_dump() for one in (other, FOREST)], "would_change": ["About 40 <groups>."]}
    extra["subgroups"] = [
        {"title": "Where it helps", "note": "Exploratory", "columns": ["part"], "rows": [["largest third"]]}
    ]
    fake_run.write_evaluation(run, "b_help", fake_run.evaluation("help", headline=True, **extra))
    write_report(config, False)
    page = run.report.read_text(encoding="utf-8")
    assert "About 40 &lt;groups&gt;." in page
    assert page.index("Dice by arm") < page.index("Where it helps") < page.index("largest third")
    assert "the same for 1 other score(s)" in page
    assert page.index("forest plot: Dice &lt;1&gt;") < page.index("forest plot: IoU")


def test_an_answer_about_other_images_is_not_shown(tmp_path) -> None:
    run, config = fake_run.whole_run(tmp_path)
    stale = fake_run.evaluation("help", headline=True, inputs={"real": "a" * 64})
    fake_run.write_evaluation(run, "b_help", stale)
    write_report(config, False)
    page = run.report.read_text(encoding="utf-8")
    assert "help: the answer is of other images than the run has now, and is not shown; run maskloom evaluate." in page
    assert stale["verdict"] not in page
