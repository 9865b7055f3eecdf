"""Which of several engines the next turn of an episode goes to. Decisions only: no tasks, no clocks.

    an episode that was here before   stays on its engine, where its prefix is cached
    its engine is overloaded          it moves to the engine with the fewest requests: no slot is free at home, and there a good
                                      share is, so that to wait would cost more than to compute the prefix again
    its engine is down, or it is new  to the engine with the fewest episodes, then the fewest requests

Whoever gets a place gives it back (`done`) when the request is answered, and says when the episode is over (`forget`).
"""

FREE_SHARE = 0.25
"""Share of an engine's slots that must be free for an episode to leave an overloaded one for it."""


class Placement:
    def __init__(self, engines: int, slots: int):
        """
        Args:
            engines: numbered from 0, all of them down at first.
            slots: requests that one engine computes at once; more wait there.
        """
        self._slots = slots
        self._up: set[int] = set()
        self._homes: dict[str, int] = {}
        self._episodes = [0] * engines
        self._requests = [0] * engines

    def place(self, conversation: str) -> int | None:
        """The engine for a request of this conversation, which counts there until `done`; None while all are down."""
        if not self._up:
            return None
        home = self._homes.get(conversation)
        if home not in self._up or self._should_leave(home):
            # one that leaves goes for a free slot
            leaves = home in self._up
            first, second = (self._requests, self._episodes) if leaves else (self._episodes, self._requests)
            _, _, home = min([(first[engine], second[engine], engine) for engine in self._up])
            self.forget(conversation)
            self._homes[conversation] = home
            self._episodes[home] += 1
        self._requests[home] += 1
        return home

    def _should_leave(self, home: int) -> bool:
        if self._requests[home] < self._slots:
            return False
        return min(self._requests[engine] for engine in self._up) <= (1 - FREE_SHARE) * self._slots

    def done(self, engine: int) -> None:
        """A request that was placed there is answered, or given up."""
        self._requests[engine] -= 1

    def forget(self, conversation: str) -> None:
        """The episode is over."""
        if (home := self._homes.pop(conversation, None)) is not None:
            self._episodes[home] -= 1

    def up(self, engine: int) -> None:
        self._up.add(engine)

    def down(self, engine: int) -> None:
        """It gets nothing until it is up again; its episodes find another home at their next turn."""
        self._up.discard(engine)

    @property
    def homes(self) -> dict[str, int]:
        """Where each episode that is not over was last."""
        return dict(self._homes)

    @property
    def requests(self) -> tuple[int, ...]:
        """Unanswered, engine by engine."""
        return tuple(self._requests)
