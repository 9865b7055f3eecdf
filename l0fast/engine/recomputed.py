"""How many prompt tokens an engine computes that it had computed before: told from outside, by what it found cached.

    turn 1   prompt |=========|  response |---|
    turn 2   prompt |=========|-----------|~~~~|     had been computed: all up to the last id of turn 1's response
                    |cached|                         of that, what was not cached is computed again

An engine that takes new weights over a response computes again what there was of it (at each cut).
"""

from collections.abc import Sequence

import numpy as np

from l0fast.prefixes import common_prefix


class Prefixes:
    def __init__(self):
        self.recomputed = 0
        """[tokens]"""
        self._known: dict[str, np.ndarray] = {}

    def observe(
        self, conversation: str, prompt: Sequence[int], sampled: Sequence[int], *, cached: int, cuts: Sequence[int] = ()
    ) -> None:
        """A response to a prompt of which `cached` tokens were found; `cuts`: where in it new weights came."""
        ids = np.array([*prompt, *sampled], np.int32)
        self.recomputed += max(0, common_prefix(ids[: len(prompt)], self._known.get(conversation, ids[:0])) - cached)
        self.recomputed += sum(len(prompt) + cut for cut in cuts)
        # keys and values of the last id are computed when something follows it
        self._known[conversation] = ids[:-1]

    def forget(self, conversation: str) -> None:
        self._known.pop(conversation, None)
