from pathlib import Path

import pytest

from maskloom.pipeline.files.private_paths import without_known_places, without_places


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/jane/raw", "…/raw"),
        ("~/raw", "…/raw"),
        ("../../jane/raw", "…/raw"),
        (r"C:\Users\jane\raw", "…/raw"),
        ("assets/nano-sd", "assets/nano-sd"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("look in /home/jane/raw for it", "look in …/raw for it"),
        ("T1/T2 ratio", "T1/T2 ratio"),
        ({"a": ["/home/jane/raw", 3, None]}, {"a": ["…/raw", 3, None]}),
    ],
)
def test_paths_out_of_the_working_folder_are_cut(value, shown):
    assert without_places(value) == shown


def test_known_places_go_wherever_they_stand(tmp_path: Path):
    place = tmp_path / "run"
    link = tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    text = f"{link}/a {place}/b {place}2/c /tmp/d"
    assert without_known_places(text, [link, None, Path("/tmp")]) == f"…/a …/b {place}2/c /tmp/d"
