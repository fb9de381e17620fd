"""Changed copies: image, mask, conditioning and words move together, and the same key gives the
same bytes.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from maskloom.pipeline.config.train import AugmentConfig
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.prompts import mask_attributes, render_prompt
from maskloom.train_controlnet.data.augmentation import Pictures, augmented_pictures, augmented_prompt, uses_mask_words
from tests.tiny_datasets import tiny_description

MODES = ("mask", "edges", "both", "foreground", "image")
PALETTE = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
INSIDE, OUTSIDE = 200, 20
STILL: dict[str, Any] = {"rotation_degrees": 0, "scale": (1, 1), "translation": 0, "brightness": 0, "contrast": 0}


def about(mode: str = "mask", templates: tuple[str, ...] = ("{modality}",)) -> Description:
    return tiny_description().model_copy(
        update={
            "conditioning": mode,
            "palette": PALETTE,
            "mask_classes": ("background", "lesion", "vessel"),
            "prompt_templates": templates,
        }
    )


def contract_row(
    mask: np.ndarray | None, image: np.ndarray, mode: str = "mask", name: str = "one", **more: Any
) -> dict[str, Any]:
    """Return a row as `datasets` decodes it; a paired picture is the image's negative."""
    paired = 255 - image if mode == "image" else None
    seen = conditioning_image(mask, image, mode, PALETTE, paired)
    return {
        "image": Image.fromarray(image),
        "mask": None if mask is None else Image.fromarray(mask),
        "conditioning_image": Image.fromarray(seen),
        "text": "toy imaging",
        "label": 0,
        "sample_id": name,
        "attributes": "{}",
        **more,
    }


def marked(height: int, width: int, channels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image that is bright where its mask is set, and the mask: two blocks of two
    classes.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for value in (1, 2):
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        mask[top : top + rng.integers(3, height), left : left + rng.integers(3, width)] = value
    image = np.where(mask > 0, INSIDE, OUTSIDE).astype(np.uint8)
    return (image if channels == 1 else np.repeat(image[..., None], 3, axis=2)), mask


sides = st.integers(2, 7).map(lambda n: 8 * n)
changes = st.builds(
    AugmentConfig,
    random_flip=st.booleans(),
    rotation_degrees=st.floats(0, 180),
    scale=st.tuples(st.floats(0.6, 1), st.floats(1, 1.6)),
    translation=st.floats(0, 0.3),
    brightness=st.just(0),
    contrast=st.just(0),
)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from([1, 3]), st.sampled_from(MODES), changes, st.integers(0, 1000), st.integers(1, 4))
def test_image_mask_and_conditioning_move_together(
    height: int, width: int, channels: int, mode: str, config: AugmentConfig, seed: int, copy: int
) -> None:
    image, mask = marked(height, width, channels, seed)
    made = augmented_pictures(contract_row(mask, image, mode), about(mode), config, seed, copy)
    assert made.mask is not None
    assert made.image.shape == image.shape
    assert made.mask.shape == mask.shape
    assert made.conditioning.shape == (height, width, 3)
    assert made.image.dtype == made.mask.dtype == made.conditioning.dtype == np.uint8
    assert set(np.unique(made.mask[made.mask > 0])) == set(np.unique(mask[mask > 0]))
    bright = made.image if channels == 1 else made.image[..., 0]
    # Bilinear: the nearest pixel, which the mask takes its value from, weighs at least a quarter.
    within, beyond = INSIDE * 0.25 + OUTSIDE * 0.75, INSIDE * 0.75 + OUTSIDE * 0.25
    assert (made.mask[bright > beyond + 2] > 0).all()
    assert (bright[made.mask > 0] >= within - 2).all()
    if mode == "mask":
        assert np.array_equal(made.conditioning, np.asarray(PALETTE, np.uint8)[made.mask])
    elif mode == "image":
        assert (made.mask[made.conditioning[..., 0] > 255 - within + 2] == 0).all()
        assert (made.conditioning[..., 0][made.mask > 0] <= 255 - within + 2).all()
    else:  # drawn from the moved picture
        assert np.array_equal(made.conditioning, conditioning_image(made.mask, made.image, mode, PALETTE))


@settings(max_examples=20, deadline=None)
@given(sides, sides, st.integers(0, 1000))
def test_a_mere_mirroring_is_exact(height: int, width: int, seed: int) -> None:
    image, mask = marked(height, width, 1, seed)
    config = AugmentConfig(**STILL)
    for copy in range(1, 9):
        made = augmented_pictures(contract_row(mask, image), about(), config, seed, copy)
        assert made.mask is not None
        flipped = not np.array_equal(made.image, image)
        expected = (image[:, ::-1], mask[:, ::-1]) if flipped else (image, mask)
        assert np.array_equal(made.image, expected[0])
        assert np.array_equal(made.mask, expected[1])


def test_half_of_the_copies_are_mirrored_and_none_where_flips_are_off() -> None:
    image, mask = marked(16, 24, 1, 0)
    assert not np.array_equal(mask, mask[:, ::-1])

    def mirrored(config: AugmentConfig) -> int:
        rows = [contract_row(mask, image, name=f"row-{i}") for i in range(200)]
        return sum(not np.array_equal(augmented_pictures(row, about(), config, 0, 1).image, image) for row in rows)

    assert 80 < mirrored(AugmentConfig(**STILL)) < 120
    assert mirrored(AugmentConfig(**STILL, random_flip=False)) == 0


def test_brightness_and_contrast_change_the_image_only() -> None:
    image, mask = marked(32, 32, 1, 3)
    config = AugmentConfig(**{**STILL, "brightness": 0.2, "contrast": 0.5}, random_flip=False)
    seen = set()
    for copy in range(1, 6):
        for mode in ("mask", "edges", "image"):
            row = contract_row(mask, image, mode)
            made = augmented_pictures(row, about(mode), config, 0, copy)
            assert np.array_equal(made.mask, mask)
            assert np.array_equal(made.conditioning, np.asarray(row["conditioning_image"]))
        dark, bright = np.unique(made.image[mask == 0]), np.unique(made.image[mask > 0])
        assert len(dark) == len(bright) == 1
        assert dark[0] < bright[0]
        seen.add((int(dark[0]), int(bright[0])))
    assert len(seen) == 5


def test_a_class_never_leaves_the_picture() -> None:
    """A dot in the corner, and movements that nearly always lose it."""
    mask = np.zeros((32, 32), np.uint8)
    mask[0, 0] = 1
    image = np.where(mask, INSIDE, OUTSIDE).astype(np.uint8)
    config = AugmentConfig(translation=0.4, scale=(1.5, 1.5), random_flip=False, brightness=0, contrast=0)
    moved = 0
    for copy in range(1, 40):
        made = augmented_pictures(contract_row(mask, image), about(), config, 0, copy)
        assert made.mask is not None
        assert made.mask.max() == 1
        moved += not np.array_equal(made.mask, mask)
    assert 0 < moved < 39  # some found room, others were given up


@pytest.mark.parametrize("mode", ["edges", "foreground", "image"])
def test_a_row_without_a_mask_is_changed_as_well(mode: str) -> None:
    image, _ = marked(24, 40, 3, 1)
    made = augmented_pictures(contract_row(None, image, mode), about(mode), AugmentConfig(), 0, 1)
    assert made.mask is None
    assert made.image.shape == image.shape
    assert not np.array_equal(made.image, image)
    assert made.conditioning.shape == image.shape


def digest(pictures: Pictures) -> str:
    parts = (pictures.image, pictures.mask, pictures.conditioning)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts if part is not None)).hexdigest()


def keyed_digests() -> dict[str, str]:
    """Return the digest of each (seed, sample, copy), made in an order of its own."""
    image, mask = marked(32, 48, 1, 5)
    keys = [(seed, name, copy) for seed in (0, 1) for name in ("a", "b") for copy in (1, 2, 3)]
    return {
        f"{seed} {name} {copy}": digest(
            augmented_pictures(contract_row(mask, image, "both", name), about("both"), AugmentConfig(), seed, copy)
        )
        for seed, name, copy in keys
    }


def test_a_key_gives_the_same_bytes_in_any_process_and_order_and_different_keys_different_ones() -> None:
    here = keyed_digests()
    assert len(set(here.values())) == len(here) == 12
    assert keyed_digests() == here
    code = (
        "import json, numpy\nnumpy.random.seed(9); numpy.random.rand(3)\n"
        "from tests.train_controlnet.test_augmentation import keyed_digests\nprint(json.dumps(keyed_digests()))"
    )
    root = Path(__file__).parents[2]
    there = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert json.loads(there.splitlines()[-1]) == here


def placed(column: int) -> np.ndarray:
    mask = np.zeros((48, 48), np.uint8)
    mask[22:27, column : column + 5] = 1
    return mask


def test_a_mirrored_lesion_changes_sides_in_the_prompt_and_other_words_stay() -> None:
    template = "{modality}, {finding} in the {side} breast, {size} {shape} {mask_classes} {place}"
    description = about(templates=(template,))
    attributes = {**mask_attributes(placed(4), description.mask_classes), "side": "left", "finding": "mass"}
    mask = placed(4)
    row = contract_row(mask, mask, attributes=json.dumps(attributes))
    config, mirrored = AugmentConfig(**STILL), 0
    for copy in range(1, 12):
        made = augmented_pictures(row, description, config, 0, copy)
        before, after = (mask_attributes(one, description.mask_classes) for one in (mask, made.mask))
        text = augmented_prompt(row, description, before, after)
        flipped = not np.array_equal(made.mask, mask)
        mirrored += flipped
        place = "central right" if flipped else "central left"
        assert text == f"toy imaging, mass in the left breast, small {after['shape']} lesion {place}"
    assert 0 < mirrored < 11


def test_a_dataset_s_own_word_is_not_the_mask_s() -> None:
    """A reader's `shape` stays though a mask has a shape as well, and its `size`.

    An equal word is taken for the mask's.
    """
    description = about(templates=("{shape} {size} {place}",))
    mask, moved = placed(4), placed(40)
    before, after = (mask_attributes(one, description.mask_classes) for one in (mask, moved))
    own = {**before, "shape": "spiculated", "size": "12 mm"}
    row = contract_row(mask, mask, attributes=json.dumps(own))
    assert augmented_prompt(row, description, before, after) == "spiculated 12 mm central right"


def test_the_same_mask_gives_the_row_s_own_prompt() -> None:
    templates = ("{modality} of a {label}", "{size} {shape} {label}, {place}", "{place}: {finding}")
    description = about(templates=templates)
    for i in range(12):
        mask = placed(3 * i)
        words = mask_attributes(mask, description.mask_classes)
        values = {"modality": "toy imaging", "label": "square", **words, "finding": "cyst"}
        text = render_prompt(templates, f"row-{i}", values)
        row = contract_row(mask, mask, name=f"row-{i}", label=1, attributes=json.dumps(values))
        assert augmented_prompt(row, description, words, words) == text


def test_modality_and_label_are_known_without_attributes() -> None:
    description = about(templates=("{modality} of a {label}",))
    row = contract_row(placed(4), placed(4), label=1)
    assert augmented_prompt(row, description, {}, {}) == "toy imaging of a square"


def test_which_templates_speak_of_the_mask() -> None:
    assert uses_mask_words(("{modality}", "{label} {place}"))
    assert not uses_mask_words(("{modality} of a {label}", "{finding}"))


@pytest.mark.parametrize("scale", [(0, 1), (1.2, 0.9)])
def test_a_scale_that_is_no_range_is_an_error(scale: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="smallest and the largest factor"):
        AugmentConfig(scale=scale)
