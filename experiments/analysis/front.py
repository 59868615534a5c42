"""The learning-forgetting front: what several methods keep at equal learning.

Each training gives a point: x is the accuracy on the new task and y a measure of what was kept,
higher is better for both. A method gives one point per learning rate (Biderman et al. 2024, "LoRA
Learns Less and Forgets Less", arXiv 2405.09673). Comparing two methods at one rate each mixes two
questions, as a lower rate learns less and forgets less with any method. So the methods are compared
where they have learned equally much:

     y
       o   .                    o  one method
         '   o  .               x  another
      x      '    o             between the dotted lines both have learned as much,
         '  x      '            and the mean vertical distance there is the difference
               '  x
                           x
"""

from collections.abc import Sequence

import numpy as np

Points = Sequence[tuple[float, float]]
LEVELS = 41


def rising(points: Points) -> Points:
    """Return the points up to the one that has learned most, from the lowest rate on.

    Beyond it, a higher rate learns less again, and there would be two y at one x.

    Args:
        points: (x, y) in ascending order of the learning rate.

    >>> rising([(0.7, 1.0), (0.9, 0.8), (0.5, 0.1)])
    [(0.7, 1.0), (0.9, 0.8)]
    """
    best = max(range(len(points)), key=lambda i: points[i][0])
    return list(points[: best + 1])


def level(points: Points, x: float) -> float | None:
    """Return y at x, interpolated linearly between the points up to the one that has learned most.

    None if x is not between them.

    Args:
        points: (x, y) in ascending order of the learning rate.
        x: how much is learned.

    >>> level([(0.0, 1.0), (1.0, 0.5)], 0.5), level([(0.0, 1.0), (1.0, 0.5)], 1.5)
    (0.75, None)
    """
    xs, ys = np.array(sorted(rising(points))).T
    return float(np.interp(x, xs, ys)) if xs[0] <= x <= xs[-1] else None


def difference(
    ours: Points, theirs: Points, part: tuple[float, float] = (0.0, 1.0)
) -> float | None:
    """Return the mean difference in y at equal x, over all x that both methods reach.

    Between the points of a method, y is interpolated linearly. None if there is no common x.

    Args:
        ours, theirs: (x, y) in ascending order of the learning rate.
        part: the part of these x to compare at, such as (0, 0.5) for their lower half.

    >>> round(difference([(0.0, 1.0), (1.0, 0.5)], [(0.0, 1.0), (2.0, 0.4)]), 6)
    -0.1
    """
    (x0, y0), (x1, y1) = (np.array(sorted(rising(points))).T for points in (ours, theirs))
    low, high = max(x0[0], x1[0]), min(x0[-1], x1[-1])
    if low >= high:
        return None
    levels = low + (high - low) * np.linspace(*part, LEVELS)
    return float((np.interp(levels, x0, y0) - np.interp(levels, x1, y1)).mean())
