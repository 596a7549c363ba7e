# SPDX-License-Identifier: Apache-2.0
"""The k best ways through a model: shortest paths with a limit, exact, by dynamic programming over half-blocks.

Every plan is one path from position 0 to 2·depth. A half-block that stays is a free step of 1, a replaced half a step
of 1, a span a step of twice its length. A step has an `aim` (its sum is to be as small as possible) and `spent` (its
sum may not exceed a limit). Nodes before a block are threefold, so that a path remembers what may come next.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from .plan import Half, Span


OPEN, AFTER_SPAN, NO_MLP, INSIDE = range(4)  # anything may start; no span may; no fold may; between the halves
BEAM = 200  # labels a node of the first, rough search
SLOPES = (0.0, 0.5, 0.8, 1.0, 1.25, 2.0)  # times the best multiplier: which bounds are tried
SLACK = 1e-9  # relative; keeps rounding from cutting off a path that is as good as the k-th best


@dataclass(frozen=True)
class Step:
    """One edge of the graph: from a node to a later one, and the item it stands for (None: the half-block stays)."""

    start: int
    end: int
    aim: float
    spent: float
    item: Span | Half | None


@dataclass(frozen=True)
class Graph:
    """Nodes 0 to 8·depth + 3, in order of position, and the steps that leave each. The last four end every path."""

    depth: int
    steps: tuple[tuple[Step, ...], ...]

    @property
    def ends(self) -> range:
        """The nodes at which a path is complete."""
        return range(8 * self.depth, 8 * self.depth + 4)


def build_graph(depth: int, weighted: Iterable[tuple[Span | Half, float, float]]) -> Graph:
    """The graph of all plans that can be made of these items, each given with its `aim` and `spent`."""
    steps: list[list[Step]] = [[] for _ in range(8 * depth + 4)]

    def connect(position: int, states: Sequence[int], length: int, state: int, *amounts) -> None:
        for before in states:
            start = 4 * position + before
            steps[start].append(Step(start, 4 * (position + length) + state, *amounts))

    for block in range(depth):
        connect(2 * block, (OPEN, AFTER_SPAN, NO_MLP), 1, INSIDE, 0, 0, None)
        connect(2 * block + 1, (INSIDE,), 1, OPEN, 0, 0, None)
    for item, aim, spent in weighted:
        if isinstance(item, Span):
            states = (OPEN,) if item.map == "fold" else (OPEN, NO_MLP)
            connect(2 * item.start, states, 2 * item.length, AFTER_SPAN, aim, spent, item)
        elif item.half == "attention":
            connect(2 * item.block, (OPEN, AFTER_SPAN, NO_MLP), 1, INSIDE, aim, spent, item)
        else:
            connect(2 * item.block + 1, (INSIDE,), 1, NO_MLP, aim, spent, item)
    return Graph(depth, tuple(map(tuple, steps)))


def reachable_sums(graph: Graph) -> set[float]:
    """Every sum of `spent` that a complete path can have. For whole numbers of blocks, of which there are few."""
    sums: list[set[float]] = [set() for _ in graph.steps]
    sums[OPEN].add(0)
    for leaving in graph.steps:
        for step in leaving:
            sums[step.end].update(spent + step.spent for spent in sums[step.start])
    return set().union(*(sums[end] for end in graph.ends))


def smallest_spent(graph: Graph) -> float:
    """The smallest sum of `spent` of any path: minus the most that can be saved."""
    return _completions(graph, 0.0, 1.0)[OPEN]


def best_paths(graph: Graph, limit: float, k: int, exact: bool) -> list[tuple[Span | Half, ...]]:
    """The items of the k best complete paths, best first: smallest sum of `aim`, and of `spent` among equals.

    The sum of `spent` is at most `limit`, or with `exact` equal to it. Fewer than k where there are no more. The
    result is exact: a partial path is given up only if k others at the same node are as good in both sums, or if a
    lower bound on what it can still reach (Lagrangian, over all its completions) exceeds the k-th best of a rough
    search made first.
    """
    if exact:
        return _items(_search(graph, limit, k, exact, None, None))
    bounds = _Bounds(graph, limit)
    rough = _search(graph, limit, k, exact, bounds, BEAM)
    if len(rough) == k:
        bounds.worst = rough[-1][0]
    return _items(_search(graph, limit, k, exact, bounds, None))


class _Bounds:
    """Lower bounds on the `aim` of every completion of a partial path that keeps to the limit."""

    def __init__(self, graph: Graph, limit: float):
        self.limit, self.worst = limit, math.inf
        self.least_spent = _completions(graph, 0.0, 1.0)
        multiplier = _best_multiplier(graph, limit)
        slopes = {slope * multiplier for slope in SLOPES}
        self.tables = [(slope, _completions(graph, 1.0, slope)) for slope in sorted(slopes)]

    def lowest(self, label: tuple, node: int) -> float:
        """The bound for one label, infinite where it cannot keep to the limit or be among the k best."""
        aim, spent, _ = label
        if spent + self.least_spent[node] > self.limit:
            return math.inf
        room = spent - self.limit
        bound = max(aim + table[node] + slope * room for slope, table in self.tables)
        slack = SLACK * (abs(self.worst) + self.tables[-1][0] * abs(self.limit))
        return math.inf if bound > self.worst + slack else bound


def _search(graph: Graph, limit: float, k: int, exact: bool, bounds: _Bounds | None, beam: int | None) -> list[tuple]:
    """Labels (aim, spent, (link to the label before, item)) of the k best complete paths."""
    labels: list[list[tuple]] = [[] for _ in graph.steps]
    labels[OPEN] = [(0, 0, None)]
    for node, leaving in enumerate(graph.steps):
        if not leaving or not labels[node]:
            continue
        kept = _undominated(labels[node], k, exact)
        if bounds is not None:
            rated = [(bounds.lowest(label, node), label) for label in kept]
            rated = [pair for pair in rated if pair[0] < math.inf]
            if beam is not None and len(rated) > beam:
                rated = heapq.nsmallest(beam, rated, key=itemgetter(0))
            kept = [label for _, label in rated]
        labels[node] = []
        for step in leaving:
            aim, spent, item, into = step.aim, step.spent, step.item, labels[step.end]
            if item is None:
                into.extend(kept)
            else:
                into.extend([(label[0] + aim, label[1] + spent, (label[2], item)) for label in kept])
    complete = [label for end in graph.ends for label in labels[end]]
    complete = [label for label in complete if (label[1] == limit if exact else label[1] <= limit)]
    return heapq.nsmallest(k, complete, key=itemgetter(0, 1))


def _undominated(labels: list[tuple], k: int, exact: bool) -> list[tuple]:
    """Without the labels that k others equal or better in both sums (with `exact`: of the same `spent`)."""
    labels.sort(key=itemgetter(0, 1))
    kept = []
    if exact:
        counts: dict[float, int] = {}
        for label in labels:
            counts[label[1]] = counts.get(label[1], 0) + 1
            if counts[label[1]] <= k:
                kept.append(label)
        return kept
    smallest: list[float] = []  # minus the k smallest `spent` so far, as a heap
    for label in labels:
        if len(smallest) < k:
            heapq.heappush(smallest, -label[1])
        elif label[1] < -smallest[0]:
            heapq.heapreplace(smallest, -label[1])
        else:
            continue
        kept.append(label)
    return kept


def _completions(graph: Graph, aim: float, spent: float) -> list[float]:
    """For every node the smallest sum of `aim · step.aim + spent · step.spent` from there to the end."""
    best = [math.inf] * len(graph.steps)
    for end in graph.ends:
        best[end] = 0.0
    for node in range(graph.ends.start - 1, -1, -1):
        for step in graph.steps[node]:
            best[node] = min(best[node], aim * step.aim + spent * step.spent + best[step.end])
    return best


def _best_multiplier(graph: Graph, limit: float) -> float:
    """The price of `spent` at which the cheapest path just keeps to the limit: the largest of all lower bounds."""

    def bound(price: float) -> float:
        return _completions(graph, 1.0, price)[OPEN] - price * limit

    scale = [abs(step.aim / step.spent) for leaving in graph.steps for step in leaving if step.aim and step.spent]
    if not scale:
        return 0.0
    low, high = 0.0, 2 * max(scale)
    for _ in range(50):  # the bound is concave in the price
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if bound(left) < bound(right) else (low, right)
    return (low + high) / 2


def _items(labels: Sequence[tuple]) -> list[tuple[Span | Half, ...]]:
    paths = []
    for _, _, link in labels:
        items = []
        while link is not None:
            link, item = link
            items.append(item)
        paths.append(tuple(reversed(items)))
    return paths
