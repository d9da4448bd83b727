"""A toy table of cartoon faces: fifty rows, five features with 7, 6, 3, 4 and 8 levels."""

import numpy as np
import torch

from .dataset import Dataset

#: Feature -> its levels, in the order of the columns.
LEVELS = {
    "top": (
        "NoHair",
        "LongHairBun",
        "LongHairCurly",
        "LongHairStraight",
        "ShortHairShortWaved",
        "ShortHairShortFlat",
        "ShortHairFrizzle",
    ),
    "hair colour": ("Black", "Blonde", "Brown", "PastelPink", "Red", "SilverGray"),
    "accessories": ("Blank", "Round", "Sunglasses"),
    "clothing": ("Hoodie", "Overall", "ShirtScoopNeck", "ShirtVNeck"),
    "clothing colour": ("Black", "Blue01", "Gray01", "PastelGreen", "PastelOrange", "Pink", "Red", "White"),
}
SIZES = tuple(len(levels) for levels in LEVELS.values())

#: Rows of each level among the fifty, by feature.
_COUNTS = (
    (4, 3, 4, 23, 6, 7, 3),
    (9, 8, 11, 4, 8, 10),
    (12, 22, 16),
    (8, 13, 19, 10),
    (5, 4, 3, 4, 4, 3, 5, 22),
)
#: The rows that the table is known to begin with.
_FIRST = (
    ("ShortHairShortFlat", "Red", "Round", "ShirtScoopNeck", "White"),
    ("ShortHairFrizzle", "SilverGray", "Round", "Overall", "White"),
    ("ShortHairShortFlat", "Blonde", "Sunglasses", "ShirtScoopNeck", "White"),
    ("LongHairStraight", "Red", "Round", "ShirtScoopNeck", "White"),
    ("NoHair", "SilverGray", "Round", "Overall", "White"),
)
#: A combination that two rows share, the second of the first rows among them.
_TWICE = 3


def faces() -> Dataset:
    """Fifty faces: the rows that are published, then rows drawn so that all features have the published shares.

    46 % LongHairStraight, 16 % Red hair, 44 % Round glasses, 38 % ShirtScoopNeck, 44 % White; one combination occurs
    exactly twice, all others at most once. Columns hold level numbers, see `LEVELS`.
    """
    first = [[LEVELS[f].index(level) for f, level in zip(LEVELS, row)] for row in _FIRST]
    rng = np.random.default_rng(5)
    rows = np.array([*first, first[_TWICE]])
    rest = []
    for j, counts in enumerate(_COUNTS):
        left = np.array(counts) - np.bincount(rows[:, j], minlength=len(counts))
        assert left.min() >= 0 and sum(counts) == 50
        rest.append(np.repeat(np.arange(len(counts)), left))
    while True:  # another shuffle where two more rows happen to be alike
        table = np.concatenate([rows, np.stack([rng.permutation(column) for column in rest], 1)])
        _, times = np.unique(table, axis=0, return_counts=True)
        if (times == 2).sum() == 1 and times.max() == 2:
            break
    return Dataset(
        name="faces",
        x=torch.from_numpy(table.astype(np.float64)),
        feature_names=tuple(LEVELS),
        description="Fifty cartoon faces, five features of each as level numbers.",
        source="simulated with published shares and first rows; the full table is not public",
    )
