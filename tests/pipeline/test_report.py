"""The report, from run folders written by the contract's own writer."""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import content_digest
from maskloom.pipeline.files.formatting import counts_text, duration_text, interval_text, number_text
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.report import write_report
from maskloom.pipeline.report.curves import POINTS, averaged, curve_description, line_chart, training_curves
from maskloom.pipeline.report.gallery import image_grids, spread_choice
from maskloom.pipeline.report.page import MOST_COLUMNS, evenly_chosen, numeric_columns, page_wide, template_environment
from maskloom.pipeline.report.pictures import LOSSLESS_SIDE, embedded_file, embedded_image
from maskloom.pipeline.report.sources import class_counts, find_sources, rejection_counts
from maskloom.pipeline.report.stage import PAGE_BYTES, smallest_enough
from maskloom.pipeline.results import Curve, Interval, Table, cell_text
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage
from tests.pipeline import fake_run
from tests.records import write_record


class _Page(HTMLParser):
    """Collects what a page shows and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts, self.tags, self.loaded, self.links = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.loaded += [values[key] for key in ("src", "srcset", "data", "poster") if key in values]
        self.links += [values["href"]] if "href" in values else []

    def handle_data(self, data):
        self.texts.append(data)


def _report(config, force=False) -> tuple[str, _Page]:
    write_report(config, force)
    html = Run(config.run_folder).report.read_text(encoding="utf-8")
    return html, _Page(html)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run and its page."""
    run, config = fake_run.whole_run(tmp_path_factory.mktemp("whole"))
    html, page = _report(config)
    return run, config, html, page


def test_the_page_loads_nothing_from_anywhere(whole):
    _, _, html, page = whole
    assert page.loaded
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(" not in html


def test_the_menu_leads_to_every_section_in_order(whole):
    _, _, html, page = whole
    assert page.links == [f"#{name}" for name in re.findall(r'<section id="(\w+)"', html)]


def test_the_page_is_small(whole):
    assert len(whole[2].encode()) < PAGE_BYTES


def test_the_finding_of_a_headline_stands_out_from_what_follows(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    verdict = "Task: helped. A changed Dice by +0.1 (9 images). An effect of 0.2 would be found."
    fake_run.write_evaluation(run, "b_help", fake_run.evaluation("help", headline=True, verdict=verdict))
    page = _report(config)[0]
    assert '<p class="answer">Task: helped. A changed Dice by +0.1 (9 images).</p>' in page
    assert "<p>An effect of 0.2 would be found.</p>" in page


def test_verdicts_come_first_and_the_headline_before_the_others(whole):
    text = whole[3].text
    places = [
        text.index(word)
        for word in ("Verdict", "help: changed Dice", "copy: changed Dice", "Real and synthetic images", "Provenance")
    ]
    nav_end = text.index("Provenance") + 1
    assert places[:4] == sorted(places[:4])
    assert text.index("Dice by arm", nav_end) > places[3]


def test_everything_from_data_is_escaped(whole):
    _, _, html, page = whole
    assert "oval <b>wide</b>" in page.text
    assert "<b>" not in html
    assert "real + <synthetic>" in page.text
    assert "mask is <empty>" in page.text


def test_numbers_carry_their_intervals(whole):
    assert "0.701 [0.681, 0.720]" in whole[3].text


def test_counts_ledger_limits_and_provenance_are_shown(whole):
    text = whole[3].text
    assert "3 rejected:" in text
    assert "One test set, one scanner." in text
    assert "0123456789ab -dirty" in text or "0123456789ab-dirty" in text
    assert "1 min 23 s" in text
    assert "1 line(s) of the log could not be read" in text


def test_both_kinds_of_synthetic_images_are_told_apart(whole):
    text = whole[3].text
    assert "for this mask, seed" in text
    assert "for this mask, warped (inset), seed" in text
    assert "for another mask of this class (inset), seed" in text or "none" in text


def test_the_same_inputs_give_the_same_bytes_and_a_skip(whole, capsys):
    run, config, html, _ = whole
    before = run.report.stat().st_mtime_ns
    write_report(config, force=False)
    assert run.report.stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().err
    assert _report(config, force=True)[0] == html


def test_a_new_evaluation_makes_the_report_stale(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    _report(config)
    answer = json.dumps(fake_run.evaluation("help", headline=True)).replace("no clear benefit", "a clear benefit")
    fake_run.write_evaluation(run, "b_help", json.loads(answer))
    assert "a clear benefit" in _report(config)[1].text


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_with_nothing_in_it_is_refused(tmp_path, exists):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    if exists:
        config.run_folder.mkdir()
    with pytest.raises(MaskLoomError, match=r"/run: nothing to report, no stage of this run has finished; run them"):
        write_report(config, force=False)
    assert not list(tmp_path.glob("run/*"))


def test_settings_given_now_do_not_change_what_the_run_was_made_with(tmp_path, capsys):
    run, _ = fake_run.whole_run(tmp_path)
    path = tmp_path / "config.yaml"
    made = load_experiment(path, ["seed=3", "train.max_train_steps=77"])
    Run(run.folder, made).keep_config()
    html, _ = _report(made)
    kept = (run.folder / "config.yaml").read_bytes()
    capsys.readouterr()
    assert _report(load_experiment(path, []), force=True)[0] == html
    assert (run.folder / "config.yaml").read_bytes() == kept
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "differs" in line]
    assert line == (
        f"report: {run.folder}/config.yaml, which the stages were last run with, differs from this configuration in "
        "seed (there 3, now 0), train.max_train_steps (there 77, now 1000). Give the same overrides to every command."
    )
    _, page = _report(load_experiment(path, ["report.title=Mine"]))
    assert "Mine" in page.text
    assert load_experiment(run.folder / "config.yaml", []) == load_experiment(
        path, ["seed=3", "train.max_train_steps=77", "report.title=Mine"]
    )


def test_the_page_states_the_seed_of_each_stage_where_they_differ(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    for stage in ("prepare", "train"):
        write_record(run, stage, seed=4)
    assert "seed 4" in _report(config)[1].text
    write_record(run, "train", seed=5)
    assert "seeds: prepare 4, train 5" in _report(config)[1].text


def test_a_configuration_changed_by_hand_is_not_taken_for_the_runs(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    html, _ = _report(config)
    kept = run.folder / "config.yaml"
    kept.write_text(kept.read_text().replace("seed: 0", "seed: 5"))
    assert _report(config, force=True)[0] == html


def test_an_almost_empty_run_says_what_is_missing(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    Run(config.run_folder).mark()
    (config.run_folder / "synthetic" / "half_done").mkdir(parents=True)
    _, page = _report(config)
    for sentence in (
        "nothing has been evaluated",
        "The dataset has not been prepared.",
        "There is no training log.",
        "No stage has been recorded.",
    ):
        assert sentence in page.text


def test_a_run_that_trains_nothing_lacks_no_training_log(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path, train=None), [])
    fake_run.write_real(Run(config.run_folder))
    text = _report(config)[1].text
    assert "This run trains no generator." in text
    assert "There is no training log" not in text


def test_a_run_that_was_generated_but_not_evaluated_shows_its_images(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    fake_run.write_synthetic(run, "controlnet", fake_run.write_real(run))
    (run.synthetic / "half_done" / "data").mkdir(parents=True)
    _, page = _report(config)
    assert "There is no verdict yet" in page.text
    assert "The synthetic dataset half_done is unfinished and is left out." in page.text
    assert page.tags.count("img") > 8


def test_generators_that_do_not_see_masks_are_marked(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    real = fake_run.write_real(run, preprocessing={"generation": {"uses_mask": False}})
    fake_run.write_synthetic(run, "blind", real)
    assert "blind, not conditioned on the mask" in _report(config)[1].text


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 3, "image_size": (48, 72)},
        {"labels": ()},
        {"conditioning": "edges"},
        {"conditioning": "both", "homepage": ""},
        {"conditioning": "foreground"},
        {"conditioning": "image", "channels": 3},
    ],
    ids=["colour, not square", "no classes", "edges", "both", "foreground", "paired"],
)
def test_other_kinds_of_datasets(tmp_path, changes):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    fake_run.write_synthetic(run, "controlnet", fake_run.write_real(run, **changes))
    html, page = _report(config)
    assert page.tags.count("img") >= 8
    words = {"edges": "edge map", "foreground": "foreground map", "image": "paired image"}
    seen = words.get(changes.get("conditioning"), "mask")
    assert f"The generators received its {seen}, unless" in page.text
    assert f"for this {seen}, seed" in page.text
    assert ('class="swatch"' in html) == (seen == "mask")  # the legend of colours


def test_external_test_sets_are_listed_after_the_own_splits(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    about = fake_run.description()
    splits = {"external_abroad": 2, "train": 4, "test": 3}
    rows = {
        split: [fake_run.sample(f"{split}-{i}", 100 * len(split) + i, about) for i in range(count)]
        for split, count in splits.items()
    }
    real = fake_run.write_dataset(run.dataset, about, rows)
    assert list(class_counts(MaskPromptDataset(run.dataset, real))) == ["train", "test", "external_abroad"]
    text = _report(config)[1].text
    assert "external_abroad 1 1 2 2" in text  # a row of each class, two images, two groups


def test_a_damaged_evaluation_is_one_line_that_names_the_file_and_the_field(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    owned = OwnedFolder(Run(config.run_folder).evaluation)
    owned.write_text("help.json", json.dumps({**fake_run.evaluation(), "tables": "none"}))
    with pytest.raises(MaskLoomError, match=r"help\.json: tables: .*run evaluate again with --force"):
        write_report(config, force=False)
    owned.write_text("help.json", "{")
    with pytest.raises(MaskLoomError, match=r"help\.json: not valid JSON"):
        write_report(config, force=False)


def test_a_dataset_edited_by_hand_is_refused_and_no_report_is_left(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    fake_run.write_real(run)
    (run.dataset / "README.md").write_text("edited")
    with pytest.raises(MaskLoomError, match="SHA-256 differs"):
        write_report(config, force=False)
    assert not run.report.exists()


def test_a_missing_picture_is_said_to_be_missing(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    OwnedFolder(run.evaluation).remove(["pictures/worst.png"])
    assert "This image is missing or cannot be read: worst.png" in _report(config)[1].text


@pytest.mark.parametrize("name", ["b_help.json", "pictures/worst.png"])
def test_a_changed_answer_is_not_shown(tmp_path, name):
    run, config = fake_run.whole_run(tmp_path)
    path = run.evaluation / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(MaskLoomError, match=rf"{name}: changed since it was written: damaged since evaluate wrote it"):
        write_report(config, force=False)
    path.unlink()
    with pytest.raises(MaskLoomError, match=rf"{name}: missing: damaged since evaluate wrote it"):
        write_report(config, force=False)
    assert not run.report.exists()


def test_the_users_own_files_beside_the_answers_are_not_looked_at(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    (run.evaluation / "mine.json").write_text("[]")
    assert "copy: changed" in _report(config)[1].text


def test_a_changed_training_log_is_left_out_and_named(tmp_path, capsys):
    run, config = fake_run.whole_run(tmp_path)
    log = run.logs("train") / "metrics.jsonl"
    write_record(run, "train", shown={"logs/train/metrics.jsonl": content_digest(log)})
    assert "is left out" not in _report(config)[1].text
    log.write_text(log.read_text().replace("1", "2"))
    text = _report(config)[1].text
    assert "logs/train/metrics.jsonl: changed since it was written and is left out." in text
    assert "There is no training log." in text
    assert "metrics.jsonl: changed since it was written, and is left out" in capsys.readouterr().err


def test_questions_that_were_not_measured_come_last(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    skipped = fake_run.evaluation("alpha", headline=True, skipped="no masks", verdict="Not measured: no masks.")
    fake_run.write_evaluation(run, "a_alpha", skipped)
    text = _report(config)[1].text
    assert text.index("copy: changed") < text.index("Not measured")


def test_the_nearest_training_image_of_a_copy_is_its_original(tmp_path):
    run = Run(tmp_path)
    real = fake_run.write_real(run)
    synthetic = fake_run.write_synthetic(run, "copier", real)
    sets = {"copier": MaskPromptDataset(run.synthetic / "copier", synthetic)}
    grids = image_grids(MaskPromptDataset(run.dataset, real), sets, per_class=8)
    rows = [row for rows in grids.values() for row in rows]
    assert len(rows) == fake_run.ROWS["train"]
    for row in rows:
        shown = row.shown["copier"]
        assert shown.nearest_id == row.sample_id
        assert shown.correlation > 0.99
        assert np.array_equal(shown.nearest, row.real)


def test_grid_rows_prefer_samples_that_were_generated_from():
    rows = [{"sample_id": str(i)} for i in range(10)]
    chosen = spread_choice(rows, [{"4", "9"}, {"4"}], 4)
    assert [row["sample_id"] for row in chosen] == ["4", "9", "0", "8"]
    assert [row["sample_id"] for row in spread_choice(rows[::-1], [], 3)] == ["0", "4", "9"]


def test_pages_that_would_be_too_large_carry_smaller_images(whole, monkeypatch):
    run, config, html, _ = whole
    monkeypatch.setattr("maskloom.pipeline.report.stage.PAGE_BYTES", 1000)
    monkeypatch.setattr("maskloom.pipeline.report.stage.IMAGE_SIDES", (256, 16))
    assert len(smallest_enough(config, find_sources(run))) < len(html)


def test_ledgers_are_summed_up_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("maskloom.pipeline.report.sources.REASONS_SHOWN", 1)
    lines = [{"path": "a", "reason": "dark"}, {"path": "b", "reason": "torn"}, {"path": "c", "reason": "torn"}]
    (tmp_path / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rejection_counts(tmp_path) == ([("torn", 2)], 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.71234, "0.712"),
        (45.97, "46.0"),
        (12345, "12,345"),
        (12345.0, "12,345"),
        (1234.56, "1,235"),
        (0, "0"),
        (0.0, "0.00"),
        (1.2e-5, "1.20e-05"),
        (-0.0123, "-0.0123"),
        (math.nan, "undefined"),
        (math.inf, "undefined"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number_text(value) == text


def test_interval_ends_have_the_decimals_of_their_value():
    assert interval_text(0.70123, 0.6811, 0.7203) == "0.701 [0.681, 0.720]"
    assert interval_text(45.97, 44.21, 148.0) == "46 [44, 148]"
    assert interval_text(0.91, 0.8211, 1.0) == "0.910 [0.821, 1.000]"
    assert interval_text(0.0123, -0.0041, 0.0274) == "0.012 [-0.004, 0.027]"
    assert interval_text(-0.00012, -0.00031, 0.0001) == "-0.000120 [-0.000310, 0.000100]"
    assert interval_text(-0.0, -1e-17, 0.0) == "0.000 [0.000, 0.000]"
    assert interval_text(0.5, None, 0.7) == "0.500"
    assert interval_text(0.5, math.nan, 0.7) == "0.500 [undefined, 0.700]"


def test_cells():
    cells = ["word", None, True, 3, Interval(value=None), Interval(value=0.5, low=0.25, high=0.75)]
    assert [cell_text(cell) for cell in cells] == ["word", "–", "yes", "3", "–", "0.500 [0.250, 0.750]"]
    table = Table(title="", columns=["a", "b", "c"], rows=[["x", None, 1], ["y", 2.0, "z"]])
    assert numeric_columns(table) == {1}


def test_durations_and_counts():
    assert [duration_text(s) for s in (3.21, 250, 7500)] == ["3.2 s", "4 min 10 s", "2 h 05 min"]
    assert [counts_text(c) for c in ({"train": 8}, [0, 1], 5)] == ["8 (train)", "0, 1", "5"]


def test_training_curves_share_charts_by_kind(tmp_path):
    run = Run(tmp_path)
    fake_run.write_training_log(run)
    curves, unreadable = training_curves(run.logs("train") / "metrics.jsonl")
    assert unreadable == 1
    assert {curve.title: sorted(curve.series) for curve in curves} == {
        "loss": ["loss", "validation/loss"],
        "loss bin": ["validation/loss_bin_0", "validation/loss_bin_1"],
        "lr": ["lr"],
    }


def test_the_losses_of_two_networks_have_a_chart_each_and_their_gradients_share_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keys = (
        "loss",
        "loss/generator",
        "loss/discriminator",
        "grad_norm/generator",
        "grad_norm/discriminator",
        "right/real",
    )
    path.write_text(json.dumps({"step": 1, **dict.fromkeys(keys, 1.0)}) + "\n")
    titles = {curve.title: sorted(curve.series) for curve in training_curves(path)[0]}
    assert titles == {
        "loss": ["loss"],
        "loss of generator": ["loss/generator"],
        "loss of discriminator": ["loss/discriminator"],
        "grad norm": ["grad_norm/discriminator", "grad_norm/generator"],
        "right": ["right/real"],
    }
    path.write_text('{"step": 1, "loss": 1.0, "loss/controlnet": 1.0}\n')
    assert [curve.title for curve in training_curves(path)[0]] == ["loss"]


def test_every_architecture_shows_its_curves_and_its_newest_previews(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path, train=None, baselines={"gan": {}, "other": {}}), [])
    run = Run(config.run_folder)
    fake_run.write_training_log(run, stage="baselines/gan")
    fake_run.write_training_log(run, steps=200, stage="baselines/other")
    fake_run.write_records(run, ("baselines",))
    page = _report(config)[1]
    sources = find_sources(run)
    assert list(sources.trainings) == ["baselines/gan", "baselines/other"]
    text = page.text[page.text.index("Training", page.text.index("Results")) :]
    assert (
        text.index("baselines/gan")
        < text.index("step-000400")
        < text.index("baselines/other")
        < text.index("step-000200")
    )
    assert "step-000300" not in text
    assert "There is no training log" not in text
    assert "baselines: packages, hashes and results" in text
    before = sources.digests()
    (run.logs("baselines/other") / "metrics.jsonl").write_text("")
    assert find_sources(run).digests() != before


def test_masks_that_a_generator_drew_are_told_from_those_it_was_given(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    real = fake_run.write_real(run)
    fake_run.write_synthetic(run, "joint", real, own_masks=True)
    text = _report(config)[1].text
    assert "generated with this mask (inset), seed" in text
    assert "for another mask" not in text
    assert "for this mask" not in text


def test_images_made_elsewhere_are_not_said_to_follow_a_mask(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    fake_run.write_synthetic(run, "vendor", fake_run.write_real(run), own_masks=True, seeded=False)
    text = _report(config)[1].text
    assert "made elsewhere, for no image of this row" in text
    assert "images of its class that were made elsewhere" in text and "The generators received" not in text
    assert "generated with this mask" not in text


def test_a_step_that_was_logged_twice_keeps_the_later_value(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5}\n{"step": 1, "loss": 2, "note": "x", "bad": NaN}\n[]\n')
    curves, unreadable = training_curves(path)
    assert [curve.series for curve in curves] == [{"loss": [(1, 2.0)]}]
    assert unreadable == 1


def test_long_series_are_averaged():
    points = averaged((float(x), float(x % 2)) for x in range(POINTS * 10))
    assert len(points) == POINTS
    assert {y for _, y in points} == {0.5}
    assert averaged([]) == []


def test_charts_are_the_same_bytes_every_time_and_draw_any_text():
    curve = Curve(
        title="t", x_label="$x", y_label="a < b", series={"_hidden $1": [(0, 1), (1, None), (2, 3)], "<b>": [(0, 2)]}
    )
    svg = line_chart(curve)
    assert svg == line_chart(curve)
    assert "hidden $1" in svg
    assert "<b>" not in svg


def test_charts_are_described_in_words():
    series = {"real": [(100, 1.25), (200, 0.5), (300, None)], "failed": [(100, None)]}
    words = curve_description(Curve(title="Loss <1>", series=series))
    assert words == "line chart: Loss <1>. real: from 1.25 at 100 to 0.500 at 200; failed: no values."


def test_masks_keep_their_colours_exactly_and_large_photographs_become_jpeg():
    mask = np.zeros((512, 512, 3), dtype=np.uint8)
    mask[100:300] = (0, 160, 255)
    assert embedded_image(mask, 256, exact=True).uri.startswith("data:image/png")
    photograph = np.random.default_rng(0).integers(0, 255, (512, 300), dtype=np.uint8)
    assert embedded_image(photograph, 256).uri.startswith("data:image/jpeg")
    assert embedded_image(photograph[:LOSSLESS_SIDE, :100], 256).uri.startswith("data:image/png")
    assert embedded_image(photograph[:64, :64], 256).width == 128


def test_picture_files_that_are_no_pictures_give_none(tmp_path):
    (tmp_path / "no.png").write_text("no")
    Image.new("L", (900, 30)).save(tmp_path / "yes.png")
    assert embedded_file(tmp_path / "no.png", 100) is None
    assert embedded_file(tmp_path / "missing.png", 100) is None
    assert embedded_file(tmp_path / "yes.png", 100).width == 100


def test_what_is_no_file_among_the_pictures_of_a_training_is_left_out(tmp_path):
    """A pipe would be waited for without end."""
    run = Run(tmp_path / "run")
    pictures = run.logs("train") / "images"
    (pictures / "folder.png").mkdir(parents=True)
    os.mkfifo(pictures / "pipe.png")
    (pictures / "step-000002.png").write_bytes(b"x")
    assert list(find_sources(run).trainings["train"].pictures) == [pictures / "step-000002.png"]
    stage = Stage(run, "train", {}, None, [], shown=("images/*.png",))
    with stage.recorded():
        pass
    assert list(stage.record()["shown"]) == ["logs/train/images/step-000002.png"]


def test_evenly_chosen_pictures_hold_the_first_and_the_last():
    paths = [Path(str(i)) for i in range(9)]
    assert [path.name for path in evenly_chosen(paths, 4)] == ["0", "3", "5", "8"]
    assert evenly_chosen(paths[:2], 4) == paths[:2]


def test_the_page_is_one_document(whole):
    assert len(re.findall(r"</html>", whole[2])) == 1


@pytest.fixture
def opened() -> Iterator[list[Path]]:
    """Collects the files that Python opens during a test."""
    files, active = [], True

    def note(event, args):
        if active and event == "open" and isinstance(args[0], str | os.PathLike):
            files.append(Path(os.fspath(args[0])))

    sys.addaudithook(note)  # cannot be removed, hence `active`
    yield files
    active = False


def test_the_page_is_written_anew_when_any_file_changes_that_it_reads(tmp_path, opened):
    run, config = fake_run.whole_run(tmp_path)
    known = find_sources(run).digests()
    opened.clear()
    smallest_enough(config, find_sources(run))
    read = {path for path in opened if path.is_relative_to(run.folder) and path.is_file() and path.stat().st_size}
    assert {path.relative_to(run.folder).parts[0] for path in read} >= {"dataset", "evaluation", "logs"}

    def is_noticed() -> bool:
        try:
            sources = find_sources(run)
            for dataset in (sources.real, *sources.synthetic.values()):
                verify_quickly(dataset.folder)
        except MaskLoomError:
            return True
        return sources.digests() != known

    assert not is_noticed()
    for path in sorted(read):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert is_noticed(), path
        path.write_bytes(content)


def test_a_wide_table_is_shown_in_parts_that_repeat_the_names_of_the_rows() -> None:
    columns = ["arm", "score", *(f"figure {i}" for i in range(13))]
    rows = [["real", "Dice", *range(13)], ["synthetic", "Dice", *range(13)]]
    wide = Table(title="Scores", note="Means.", columns=columns, rows=rows, groups=["a", "b"])
    parts = page_wide(wide)
    assert [part.columns[:2] for part in parts] == [["arm", "score"]] * 3
    assert all(len(part.columns) <= MOST_COLUMNS and part.groups == ["a", "b"] for part in parts)
    assert [name for part in parts for name in part.columns[2:]] == columns[2:]
    assert [cell for part in parts for cell in part.rows[1][2:]] == list(range(13))
    narrow = wide.model_copy(update={"columns": columns[:8], "rows": [row[:8] for row in rows]})
    assert page_wide(narrow) == [narrow]
    numbers = Table(title="", columns=[str(i) for i in range(10)], rows=[list(range(10))])
    assert [part.columns[0] for part in page_wide(numbers)] == ["0", "0"]
    words = Table(title="", columns=[str(i) for i in range(10)], rows=[["a"] * 10])
    assert [len(part.columns) for part in page_wide(words)] == [6, 5]


def test_the_values_of_a_table_name_their_column_for_narrow_screens() -> None:
    table = Table(title="Scores", note="Means.", columns=["arm", "change & interval"], rows=[["real", 0.5]])
    macros = template_environment().get_template("macros.html.j2").module
    html = macros.results_table(table)
    assert '<td data-column="arm">real</td><td data-column="change &amp; interval" class="number">0.500</td>' in html
    assert html.count("<h4>") == 1 and html.count("Means.") == 1
