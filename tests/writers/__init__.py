"""Writers of tiny raw datasets, one per dataset that needs a raw folder: `tests/writers/NAME.py`.

Each has `write_raw(folder)`, which writes at least 12 samples in exactly the dataset's raw layout
(same bytes on each call), and `FLAWS`, at least eight ways in which such a folder can be damaged.
Optional: `OPTIONS`, the adapter's options that fit what is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flaw:
    """A way to damage a raw folder.

    Attributes:
        damage: changes the folder that `write_raw` wrote, in place.
        says: regular expression that must be found in the error that ends the work, or in the
            reason of a reject; None where the oddity must be taken in its stride (a path with
            spaces or other scripts): nothing may then be rejected beyond what was before.
    """

    damage: Callable[[Path], object]
    says: str | None
