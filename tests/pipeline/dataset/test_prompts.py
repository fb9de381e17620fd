"""Prompts: words read off a mask, and templates filled with them."""

import numpy as np
import pytest

from maskloom.pipeline.dataset.prompts import mask_attributes, render_prompt, template_keys
from maskloom.pipeline.errors import MaskLoomError

CLASSES = ("background", "lesion", "cyst")


def _ellipse(centre=(50, 50), axes=(10, 10), value=1, side=100) -> np.ndarray:
    rows, columns = np.indices((side, side))
    inside = ((rows - centre[0]) / axes[0]) ** 2 + ((columns - centre[1]) / axes[1]) ** 2 <= 1
    return (inside * value).astype(np.uint8)


@pytest.mark.parametrize("mask", [None, np.zeros((8, 8), dtype=np.uint8)])
def test_without_foreground_there_are_no_words(mask):
    assert mask_attributes(mask, CLASSES) == {}


@pytest.mark.parametrize(("radius", "word"), [(5, "small"), (15, "medium"), (30, "large")])
def test_size(radius, word):
    assert mask_attributes(_ellipse(axes=(radius, radius)), CLASSES)["size"] == word


@pytest.mark.parametrize(
    ("centre", "words"),
    [
        ((15, 15), "upper left"),
        ((50, 50), "central"),
        ((85, 85), "lower right"),
        ((15, 50), "upper middle"),
        ((50, 85), "central right"),
        ((99, 99), "lower right"),
    ],
)
def test_place(centre, words):
    assert mask_attributes(_ellipse(centre), CLASSES)["place"] == words


@pytest.mark.parametrize(
    ("axes", "word"), [((10, 10), "round"), ((10, 16), "oval"), ((8, 30), "elongated"), ((30, 8), "elongated")]
)
def test_shape(axes, word):
    assert mask_attributes(_ellipse(axes=axes), CLASSES)["shape"] == word


def test_a_shape_that_is_not_convex_is_irregular():
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[10:50, 10:18] = mask[42:50, 10:50] = 1
    assert mask_attributes(mask, CLASSES)["shape"] == "irregular"


def test_shape_is_that_of_the_largest_part():
    mask = _ellipse(axes=(15, 15))
    mask[2:4, 2:40] = 1
    assert mask_attributes(mask, CLASSES)["shape"] == "round"


def test_a_single_pixel_has_words_too():
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[4, 4] = 1
    assert mask_attributes(mask, CLASSES)["place"] == "central"


def test_classes_are_named():
    mask = np.maximum(_ellipse((25, 25)), _ellipse((75, 75), value=2))
    assert mask_attributes(mask, CLASSES)["mask_classes"] == "lesion and cyst"


def test_the_template_depends_on_the_sample_only():
    templates = [f"{{size}} number {i}" for i in range(5)]
    prompts = [render_prompt(templates, f"s{i}", {"size": "small"}) for i in range(40)]
    assert prompts == [render_prompt(templates, f"s{i}", {"size": "small"}) for i in range(40)]
    assert len(set(prompts)) == 5


def test_only_templates_whose_attributes_are_known_are_used():
    templates = ("{modality}", "{modality} of a {size} lesion")
    assert {render_prompt(templates, f"s{i}", {"modality": "MRI"}) for i in range(20)} == {"MRI"}


def test_spaces_are_folded():
    assert render_prompt(["{a}  of\n{b}"], "s", {"a": "x ", "b": "y"}) == "x of y"


def test_no_template_that_can_be_filled_is_an_error_that_names_the_sample():
    with pytest.raises(MaskLoomError, match=r"sample s1: no prompt template can be filled from \['a'\]"):
        render_prompt(["{b}"], "s1", {"a": "x"})
    with pytest.raises(MaskLoomError, match=r"can be filled from \['a', 'c'\]"):
        render_prompt(["{b}"], "s1", {"c": "x", "a": "x"})
    with pytest.raises(MaskLoomError, match="no prompt template"):
        render_prompt([], "s1", {})


def test_template_keys():
    assert template_keys("a {b} of {c}, {b} {{d}}") == {"b", "c"}
