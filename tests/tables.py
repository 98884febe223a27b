"""Small tables of client rows whose aggregates are known to ten digits."""

from __future__ import annotations

import numpy as np

STEPS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])

# Five rows close together and one far off.
TABLE = np.array(
    [
        [1.0, 2.0, -1.0, 0.5],
        [1.2, 1.8, -0.9, 0.4],
        [0.9, 2.1, -1.1, 0.6],
        [1.1, 1.9, -1.0, 0.3],
        [0.8, 2.2, -1.2, 0.7],
        [10.0, -9.0, 8.0, -7.0],
    ]
)
GOOD = [1.0, 2.0, -1.04, 0.5]  # mean of the first five
MIDDLE = [1.05, 1.95, -1.0, 0.45]

# Four corners of a square and two points inside, one row far off.
SEVEN = np.array(
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5], [0.4, 0.6], [9.0, -9.0]]
)
