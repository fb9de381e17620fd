"""A backbone on the Hub: settings are looked at before weights are downloaded, and only files that
are read are downloaded at all.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from maskloom.models.stable_diffusion import source as backbone_source
from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.loading import load_part
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.text import load_tokenizer
from maskloom.pipeline.errors import MaskLoomError
from tests.hub_server import HubState, Repo
from tests.pipeline.hub.test_hub import hub as _hub
from tests.tiny_backbone import build_tiny_backbone

NAME = "someone/backbone"
hub = _hub


@pytest.fixture
def published(hub: HubState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Put a tiny backbone on the Hub and return its files."""
    folder = build_tiny_backbone(tmp_path / "backbone")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= {
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "planted.py": b"raise SystemExit",
        "v1.safetensors": b"other",
    }
    hub.repos["models", NAME] = Repo("models", False, {"main": files})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for cached in (backbone_source.hub_files, backbone_source.hub_listing):
        cached.cache_clear()
    yield files
    for cached in (backbone_source.hub_files, backbone_source.hub_listing):
        cached.cache_clear()


def downloaded(hub: HubState) -> set[str]:
    start = f"/{NAME}/resolve/"
    return {
        path.removeprefix(start).split("/", 1)[1]
        for method, path in hub.requests
        if method == "GET" and path.startswith(start)
    }


def test_only_what_is_read_is_downloaded(hub: HubState, published: dict[str, bytes]) -> None:
    source = BackboneSource(NAME)
    check_backbone(source)
    assert not [name for name in downloaded(hub) if not name.endswith((".json", ".txt"))]
    load_part(source, "unet")
    load_tokenizer(source)
    assert downloaded(hub) <= published.keys() - {"planted.py", "v1.safetensors", "unet/diffusion_pytorch_model.bin"}


def test_a_planted_class_is_refused_before_weights_are_downloaded(hub: HubState, published: dict[str, bytes]) -> None:
    index = json.loads(published["model_index.json"])
    published["model_index.json"] = json.dumps({**index, "scheduler": ["planted", "Planted"]}).encode()
    with pytest.raises(MaskLoomError, match=r"names planted\.Planted as its scheduler"):
        load_part(BackboneSource(NAME), "unet")
    assert not [name for name in downloaded(hub) if name.endswith((".safetensors", ".py", ".bin"))]


def test_a_variant_that_is_not_there_is_told_from_the_listing(hub: HubState, published: dict[str, bytes]) -> None:
    with pytest.raises(
        MaskLoomError, match=r"unet has no diffusion_pytorch_model\.fp16\.safetensors; set train\.variant=null"
    ):
        check_backbone(BackboneSource(NAME, variant="fp16"))
    assert not [name for name in downloaded(hub) if name.endswith(".safetensors")]


def test_an_unknown_revision_is_told(published: dict[str, bytes]) -> None:
    with pytest.raises(
        MaskLoomError, match=r"its files of revision v9 are neither in the Hub's cache nor can they be downloaded"
    ):
        check_backbone(BackboneSource(NAME, revision="v9"))


def test_a_cache_is_enough_without_the_network(
    hub: HubState, published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = BackboneSource(NAME)
    weights = load_part(source, "vae").state_dict()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for cached in (backbone_source.hub_files, backbone_source.hub_listing):
        cached.cache_clear()
    huggingface_hub.close_session()
    again = load_part(source, "vae").state_dict()
    assert all(weights[key].equal(again[key]) for key in weights)


def test_a_cache_without_weights_is_told(
    hub: HubState, published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = BackboneSource(NAME)
    check_backbone(source)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for cached in (backbone_source.hub_files, backbone_source.hub_listing):
        cached.cache_clear()
    huggingface_hub.close_session()
    check_backbone(source, settings_only=True)
    with pytest.raises(MaskLoomError, match=r"neither in the Hub's cache|unet has no diffusion_pytorch_model"):
        load_part(source, "unet")
