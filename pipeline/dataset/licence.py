"""Licences of datasets: as the cards on the Hub name them, and which of them let anyone publish."""

import re
import unicodedata
from typing import Any

from maskloom.pipeline.dataset.contract import Description

HUB_LICENCES = {
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "mit",
    "apache-2.0",
}
"""Identifiers from the Hub's list; any other licence of a prepared dataset is `other` with a name."""
OPEN_LICENCE = re.compile(
    r"(cc0(-1\.0)?|cc-by(-sa)?-\d\.\d|mit|apache-2\.0|pddl(-1\.0)?|odc-by(-1\.0)?|cdla-permissive-\d\.\d)( \([^()]*\))?",
    re.IGNORECASE,
)
"""Licences that let anyone pass the data on for any purpose, with or without a remark in brackets."""


def hub_identifier(text: str) -> str:
    """Return an identifier for the Hub: lower-case ASCII letters, digits, dots and hyphens."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9.]+", "-", plain.lower()).strip("-.")


def other_licence(about: Description) -> dict[str, Any]:
    """Return a card's metadata for a licence that is not on the Hub's list."""
    return {"license": "other", "license_name": hub_identifier(about.licence)}


def licence_metadata(about: Description) -> dict[str, Any]:
    """Return a model card's licence: that of the data, since weights have none of their own."""
    link = {"license_link": about.homepage} if re.match(r"https?://", about.homepage) else {}
    return {**other_licence(about), **link}
