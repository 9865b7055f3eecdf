"""Which rows should share a prefix that is computed once: the choice that leaves the fewest tokens.

A family of rows has one prefix, which all of them begin with; each goes on with at least one token of its own. A family
is a node of the trie of the rows: it costs the tokens of its depth d once and saves them in each of its rows. A row goes to
the deepest chosen node above it, so what is saved is

    sum over rows of d(family of the row) - sum over families of d

and its largest value, from the leaves up, with a the depth of the chosen node next above, 0 for none:

    save(node, a) = max(keep(a), keep(d) - d)
    keep(a) = a x (rows right below node) + sum over children of save(child, a)

Inner nodes are the intervals of the sorted rows with an equal common prefix, at most n - 1 of them (the LCP-interval tree
of Abouelhoda, Kurtz and Ohlebusch, "Replacing suffix trees with enhanced suffix arrays", 2004, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class _Node:
    """An inner node of the trie: rows that have their first `depth` tokens in common, and one more each."""

    depth: int
    rows: list[int] = field(default_factory=list)
    """Those of them that are in no deeper node."""
    children: list["_Node"] = field(default_factory=list)
    above: tuple[int, ...] = ()
    """Depths of the nodes above."""
    saved: dict[int, int] = field(default_factory=dict)
    """[depth of the chosen node next above] -> tokens saved below it."""
    chosen: set[int] = field(default_factory=set)
    """The depths above for which this node is a family."""


class Prefixes:
    """What some rows have in common, and the families of any choice of them.

    Args:
        rows: token ids, [n] int64 each, n >= 1.
    """

    def __init__(self, rows: Sequence[np.ndarray]):
        # any order will do that keeps rows which begin alike together
        keys = [row.tobytes() for row in rows]
        self._lengths = [len(row) for row in rows]
        self._order = sorted(range(len(rows)), key=keys.__getitem__)
        self._place = {row: place for place, row in enumerate(self._order)}
        pairs = zip(self._order, self._order[1:], strict=False)
        self._common = np.array([common_prefix(rows[a], rows[b]) for a, b in pairs], np.int64)

    def num_tokens(self, rows: Sequence[int]) -> int:
        """Tokens these rows take, laid out."""
        return sum(self._lengths[row] for row in rows) - self._trie(rows)[-1].saved[0]

    def families(self, rows: Sequence[int]) -> list[tuple[int, list[int]]]:
        """The best choice: (tokens of the prefix, two rows or more) of each family."""
        found: list[tuple[int, list[int]]] = []
        below: list[tuple[_Node, int, list[int]]] = [(self._trie(rows)[-1], 0, [])]
        while below:
            node, above, family = below.pop()
            if above in node.chosen:
                above, family = node.depth, []
                found.append((above, family))
            family += node.rows
            below += [(child, above, family) for child in node.children]
        return sorted(((depth, sorted(family)) for depth, family in found), key=lambda found: found[1])

    def _trie(self, rows: Sequence[int]) -> list[_Node]:
        """Inner nodes with what they save, children before parents; the last is the root, of depth 0."""
        places = sorted(self._place[row] for row in rows)
        stack, closed = [_Node(0)], []
        for i, place in enumerate(places):
            row = child = self._order[place]
            common = -1  # after the last row every node ends
            if i + 1 < len(places):
                following = places[i + 1]
                shortest = min(self._lengths[row], self._lengths[self._order[following]])
                # every row keeps a token of its own
                common = min(int(self._common[place:following].min()), shortest - 1)
            while stack and stack[-1].depth > common:
                node = stack.pop()
                _add(node, child)
                closed.append(child := node)
            if stack:
                if stack[-1].depth < common:
                    stack.append(_Node(common))
                _add(stack[-1], child)
        for node in reversed(closed):
            for child in node.children:
                child.above = (*node.above, node.depth)
        for node in closed:
            keep = {
                above: above * len(node.rows) + sum(child.saved[above] for child in node.children)
                for above in (*node.above, node.depth)
            }
            own = keep[node.depth] - node.depth
            node.saved = {above: max(kept, own) for above, kept in keep.items()}
            node.chosen = {above for above in node.above if own > keep[above]}
        return closed


def _add(node: _Node, child: "_Node | int") -> None:
    if isinstance(child, _Node):
        node.children.append(child)
    else:
        node.rows.append(child)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two rows have in common from the start."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n
