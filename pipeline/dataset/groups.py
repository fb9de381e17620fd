"""What the groups of a dataset are, in words: what an interval over groups covers.

The contract does not state it, so this is told by the dataset's name, from its file in `data_prep/datasets`.
"""

PATIENTS = "patients"
GROUPS = {
    "acdc": PATIENTS,
    "brats": PATIENTS,
    "busbra": PATIENTS,
    "lidc": PATIENTS,
    "mni152": "slabs of one average brain",
}
UNKNOWN = "groups"


def group_words(dataset: str) -> str:
    """Return what the groups of a dataset are, in the plural; `groups` where its source does not tell."""
    return GROUPS.get(dataset, UNKNOWN)


def group_sentence(dataset: str) -> str:
    """Return what a group of a dataset is, and what follows for intervals over groups."""
    words = group_words(dataset)
    if words == PATIENTS:
        return f"Groups of {dataset} are patients: all images of a patient lie in one split."
    if words == UNKNOWN:
        return (
            f"Groups of {dataset} are what was kept in one split: patients where the source names them, otherwise single "
            "images or clusters of near-duplicates. Intervals cover other patients only in the first case."
        )
    return (
        f"Groups of {dataset} are {words}. They are not patients: intervals cover other slices of that brain, and "
        "nothing here says anything about other patients."
    )
