"""What the groups of a dataset are, in words: what an interval over groups covers.

The contract does not state it, so the dataset's file in `data_prep/datasets` does: `GROUPS`, in the plural.
"""

from maskloom.pipeline.plugins import load_plugin, plugin_names

PACKAGE = "maskloom.data_prep.datasets"
PATIENTS = "patients"
UNKNOWN = "groups"


def group_words(dataset: str) -> str:
    """Return what the groups of a dataset are, in the plural; `groups` where its source does not tell."""
    if dataset not in plugin_names(PACKAGE):
        return UNKNOWN
    return str(getattr(load_plugin(PACKAGE, dataset, "dataset"), "GROUPS", UNKNOWN))


def group_sentence(dataset: str) -> str:
    """Return what a group of a dataset is, and what follows for intervals over groups."""
    words = group_words(dataset)
    if words == PATIENTS:
        return f"Groups of {dataset} are patients: all images of a patient lie in one split."
    if words == UNKNOWN:
        return (
            "Groups are what was kept in one split: patients where the source names them, otherwise single images or "
            "clusters of near-duplicates. Intervals cover other patients only if it names them."
        )
    return (
        f"Groups of {dataset} are {words}. They are not patients: intervals cover other slices of that brain, and "
        "nothing here says anything about other patients."
    )
