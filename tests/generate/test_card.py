"""The card of a synthetic dataset."""

from maskloom.generate.card import dataset_card
from maskloom.generate.joint import MaskFigures
from tests.tiny_datasets import tiny_description


def test_no_class_name_breaks_the_tables():
    settings = {"generator": "controlnet", "uses_mask": True, "negative_prompt": "a|b"}
    card = dataset_card(tiny_description(origin="synthetic"), {"a|b": 3, "c\nd": 2}, settings, 0, MaskFigures())
    assert r"| a\|b | 3 |" in card
    assert "| c d | 2 |" in card
    assert r"| negative_prompt | a\|b |" in card
