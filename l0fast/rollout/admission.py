"""How many episodes may be in flight before the KV cache thrashes. Pure: no tasks, times are passed in.

    new episode    goes when, on the forecast, the cache never needs more than `fill` of its entries; first come, first served
    next turn      goes at once while what is in flight fits into the cache: its prefix is still there. Else the episode is
                   parked: it no longer counts, and comes back before any new one, the longest admitted first
    nobody there   whoever is first goes, whatever the forecast says

An agent leaves its KV entries behind while its tools run. Too many agents, and the engine evicts prefixes that are about to
be needed; each is computed again, evicts another one, and the more there are the slower all become. Too few, and the
batch is small. How many fit depends on how long they get, which is known only afterwards; so it is learned:

    g[k]    mean growth by turn k + 1                 p[k, h]   share of those k turns old that come to their h-th turn from now
    F[h]    = sum over episodes, k turns old, of  p[k, h] (tokens + g[k] + ... + g[k + h - 1])     entries needed at that turn

Both from all turns so far, those of episodes in flight included (a hazard a turn, as Kaplan and Meier do it, so that the
first to finish don't make all look short), the older the fainter. What the forecast gets wrong shows in the engine's own figures:
`fill` falls where it computes again what it had, and rises where it doesn't although somebody waits. What it computed
again while more was in flight than may be, or for those that were parked, says nothing about `fill`.

Nobody starves: parked episodes go in the order of their admission, new ones in the order of their coming, and the first in
line waits only for those in flight to end; one that neither ends nor returns counts no longer after `idle_limit_s`.

ThunderAgent (arXiv 2602.13692) schedules agentic programs, rather than their requests, by the same thought.
"""

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from l0fast.engine.base import EngineLoad

_HORIZON = 12
"""Turns looked ahead."""
_MAX_TURNS = 64
"""Later turns are taken for this one."""
_MEMORY = 1 - 1 / 512
"""Weight of the past when an episode ends."""
_STAYS, _PRIOR = 0.75, 4
"""Share of episodes that take another turn, as long as nothing is known of them; and how many it takes to know better."""
_FILL, _FILL_MIN, _FILL_MAX = 0.88, 0.5, 1.0
"""Share of the entries that the forecast may need: at first, at least, at most."""
_PARK = 1.1
"""What is in flight may be this much more than that before next turns wait; not while the engine computes again what it had."""
_WASTE_HIGH, _WASTE_LOW = 0.1, 0.03
"""Share of the engine's time that it spends on what it had: from here on `fill` falls, and below that it rises."""
_FALL, _RISE = 0.95, 1.02
_SMOOTH = 16
"""Looks at the engine that its waste is averaged over."""
_FORECAST_AGE = 8
"""Endings after which the forecast is made anew."""


@dataclass(slots=True)
class _Episode:
    number: int
    """Place in the order of admission, once it is."""
    turns: int = 0
    """Turns that are over."""
    tokens: int = 0
    """KV entries that it leaves or will need at once."""
    before: int = 0
    """What `tokens` was when its last turn was over, or at its first prompt."""
    shared: int = 0
    """Entries at its start that others have too; not in `tokens`."""
    state: str = "asks"
    """"asks" | "runs" | "idle" | "parked"; it counts as in flight where it runs or is idle."""
    since_s: float = 0.0
    forgotten: bool = False
    """To be dropped as soon as it is idle."""


class Admission:
    """Args:
    max_tokens: KV entries there are; 0 as long as nobody has said, and then everybody goes [tokens].
    new_tokens: what a response is taken to be long before any has been seen [tokens].
    idle_limit_s: an episode that asks for nothing for so long is taken to be over [s].
    """

    def __init__(self, *, max_tokens: int = 0, new_tokens: int = 256, idle_limit_s: float = 600.0):
        self.max_tokens, self.fill = max_tokens, _FILL
        self.tokens_in_flight = 0
        self.num_parked = 0
        """Times that an episode was parked."""
        self._new_tokens, self._idle_limit_s = new_tokens, idle_limit_s
        self._episodes: dict[str, _Episode] = {}
        self._in_flight: dict[str, None] = {}
        self._new: deque[str] = deque()
        self._parked: list[tuple[int, str]] = []
        self._admitted = 0
        # per turns over: episodes in flight, and their tokens
        self._count = np.zeros(_MAX_TURNS + 1)
        self._tokens = np.zeros(_MAX_TURNS + 1)
        # the same for all there were: turns that began there, what they added, and episodes that ended there
        self._went_on = np.zeros(_MAX_TURNS + 1)
        self._growth = np.zeros(_MAX_TURNS + 1)
        self._ended = np.zeros(_MAX_TURNS + 1)
        self._endings_since_forecast = _FORECAST_AGE
        self._last: EngineLoad | None = None
        self._excused = 0.0
        self._over = False
        """Whether more was in flight at the last look than `fill` allows."""
        self._held = False
        """Whether anybody waited since the last look at the engine."""
        self._waste = 0.0
        """Smoothed over some looks."""
        self._endings_at_best = 0
        """Episodes that ended since `fill` changed or should have."""
        self._next_look_s = 0.0

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._new) + len(self._parked)

    # what happens

    def ask(self, conversation: str, prompt_tokens: int, now_s: float) -> bool:
        """An episode wants a turn. True: it may have it now. False: `admit` will name it."""
        episode = self._episodes.get(conversation)
        if episode is None:
            episode = self._episodes[conversation] = _Episode(
                number=-1, tokens=prompt_tokens, before=prompt_tokens, since_s=now_s
            )
            self._new.append(conversation)
            return self._go_if_named(conversation, now_s)
        assert episode.state == "idle", f"{conversation!r} asks while it {episode.state}"
        self._resize(episode, max(1, prompt_tokens - episode.shared))
        if self._fits_now() or len(self._in_flight) == 1:
            episode.state, episode.since_s = "runs", now_s
            return True
        self._stop_counting(conversation, episode)
        episode.state = "parked"
        self.num_parked += 1
        heapq.heappush(self._parked, (episode.number, conversation))
        return self._go_if_named(conversation, now_s)

    def ran(self, conversation: str, tokens: int, cached_tokens: int, now_s: float) -> None:
        """A turn is over, and the episode's context holds so many tokens; so many of its prompt's were there before it."""
        episode = self._episodes[conversation]
        if not episode.turns:
            # what its first prompt found was computed for others
            episode.shared = cached_tokens
            episode.before -= cached_tokens
        tokens -= episode.shared
        level = self._level(episode)
        self._went_on[level] += 1
        self._growth[level] += tokens - episode.before
        self._count_out(episode)
        episode.turns, episode.tokens, episode.before = episode.turns + 1, tokens, tokens
        self._count_in(episode)
        self._rest(conversation, episode, now_s)

    def withdraw(self, conversation: str, now_s: float) -> None:
        """It no longer wants the turn it asked for, or was given: cancelled."""
        episode = self._episodes[conversation]
        if episode.state == "runs" and episode.turns:
            self._rest(conversation, episode, now_s)
        elif episode.state == "runs":
            self._stop_counting(conversation, episode)
            del self._episodes[conversation]
        elif episode.number < 0:
            self._new.remove(conversation)
            del self._episodes[conversation]
        else:
            self._parked.remove((episode.number, conversation))
            heapq.heapify(self._parked)
            self._start_counting(conversation, episode, "idle", now_s)
            self._rest(conversation, episode, now_s)

    def forget(self, conversation: str) -> None:
        """The episode is over. Unknown names are fine; one that runs is over when its turn is."""
        episode = self._episodes.get(conversation)
        if episode is None:
            return
        if episode.state != "idle":
            episode.forgotten = True
            return
        self._stop_counting(conversation, episode)
        del self._episodes[conversation]
        for past in (self._growth, self._went_on, self._ended):
            past *= _MEMORY
        self._ended[self._level(episode)] += 1
        self._endings_since_forecast += 1
        self._endings_at_best += 1

    def observe(self, load: EngineLoad) -> None:
        """What the engine says of itself; the more often, the sooner `fill` is right."""
        # one that is down, with nobody beside it, has none until it is back
        self.max_tokens = load.max_tokens or self.max_tokens
        last, self._last = self._last, load
        if last is None:
            return
        prefill, decoded = load.prefill_tokens - last.prefill_tokens, load.decoded_tokens - last.decoded_tokens
        again = load.recomputed_tokens - last.recomputed_tokens
        excused = min(self._excused, again)
        self._excused -= excused
        again -= excused
        prefill_s, decode_s = load.prefill_s - last.prefill_s, load.decode_s - last.decode_s
        if prefill_s + decode_s > 0:
            waste = again / max(1, prefill) * prefill_s / (prefill_s + decode_s)
        else:
            waste = again / max(1, prefill + decoded)
        self._waste += (waste - self._waste) / _SMOOTH
        over = self.tokens_in_flight > self.fill * self.max_tokens
        if self._over and not over:
            # what was wasted until now is no fault of what is in flight now
            self._waste = 0.0
        self._over = over
        # a fall takes hold only when what is in flight has shrunk, and a rise shows only when all of it has changed
        if self._waste > _WASTE_HIGH:
            if not over:
                self.fill = max(_FILL_MIN, self.fill * _FALL)
                self._waste = 0.0
            self._endings_at_best = 0
        elif self._endings_at_best > 2 * len(self._in_flight) and self._waste < _WASTE_LOW and self._held:
            self.fill = min(_FILL_MAX, self.fill * _RISE)
            self._endings_at_best = 0
        self._held = self.num_waiting > 0

    def updated_weights(self) -> None:
        """All that is in flight is computed again for another reason: that is not held against anybody."""
        self._excused = float(self.tokens_in_flight)

    def admit(self, now_s: float) -> list[str]:
        """Who of those that were told to wait may have their turn now."""
        if not self.num_waiting:
            return []
        self._drop_the_idle(now_s)
        named: list[str] = []
        needed: np.ndarray | None = None
        while self.num_waiting:
            conversation = self._parked[0][1] if self._parked else self._new[0]
            episode = self._episodes[conversation]
            if self._in_flight and self.max_tokens:
                if needed is None:
                    needed = self._forecast()
                needed = needed + self._forecast_of(episode)
                # of a dozen numbers Python finds the largest sooner than numpy
                if max(needed.tolist()) > self.fill * self.max_tokens:
                    break
            if self._parked:
                heapq.heappop(self._parked)
                # by now it has been evicted, on purpose
                self._excused += episode.tokens
            else:
                self._new.popleft()
                episode.number, self._admitted = self._admitted, self._admitted + 1
            self._start_counting(conversation, episode, "runs", now_s)
            named.append(conversation)
        return named

    # the forecast

    def _forecast(self) -> np.ndarray:
        """[_HORIZON + 1] entries that those in flight need, so many turns from now."""
        self._learn()
        return self._tokens @ self._lives + self._count @ self._grows

    def _forecast_of(self, episode: _Episode) -> np.ndarray:
        level = self._level(episode)
        return episode.tokens * self._lives[level] + self._grows[level]

    def _learn(self) -> None:
        """Renew `_lives` p[k, h] and `_grows` p[k, h] (g[k] + ... + g[k + h - 1])."""
        if self._endings_since_forecast < _FORECAST_AGE:
            return
        self._endings_since_forecast = 0
        turns = self._went_on.sum()
        usual = self._growth.sum() / turns if turns else self._new_tokens
        growth = (self._growth + _PRIOR * usual) / (self._went_on + _PRIOR)
        stays = (self._went_on + _PRIOR * _STAYS) / (self._went_on + self._ended + _PRIOR)
        lives = np.ones((_MAX_TURNS + 1, _HORIZON + 1))
        more = np.zeros((_MAX_TURNS + 1, _HORIZON + 1))
        for h in range(_HORIZON):
            now = np.minimum(np.arange(_MAX_TURNS + 1) + h, _MAX_TURNS)
            # an episode that was admitted goes on with the turn that it asked for
            lives[:, h + 1] = lives[:, h] * (stays[now] if h else 1.0)
            more[:, h + 1] = more[:, h] + growth[now]
        self._lives, self._grows = lives, lives * more

    # bookkeeping

    def _go_if_named(self, conversation: str, now_s: float) -> bool:
        """Whether it is the only one in line, and may go."""
        goes = self.num_waiting == 1 and self.admit(now_s) == [conversation]
        self._held |= not goes
        return goes

    def _fits_now(self) -> bool:
        slack = _PARK if self._waste < _WASTE_HIGH else 1.0
        return not self.max_tokens or self.tokens_in_flight <= slack * self.fill * self.max_tokens

    def _rest(self, conversation: str, episode: _Episode, now_s: float) -> None:
        """Its turn is over."""
        episode.state, episode.since_s = "idle", now_s
        if episode.forgotten:
            self.forget(conversation)

    def _drop_the_idle(self, now_s: float) -> None:
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + self._idle_limit_s / 10
        for conversation in list(self._in_flight):
            episode = self._episodes[conversation]
            if episode.state == "idle" and now_s - episode.since_s > self._idle_limit_s:
                self._stop_counting(conversation, self._episodes.pop(conversation))

    def _level(self, episode: _Episode) -> int:
        return min(episode.turns, _MAX_TURNS)

    def _start_counting(self, conversation: str, episode: _Episode, state: str, now_s: float) -> None:
        episode.state, episode.since_s = state, now_s
        self._in_flight[conversation] = None
        self._count_in(episode)

    def _stop_counting(self, conversation: str, episode: _Episode) -> None:
        del self._in_flight[conversation]
        self._count_out(episode)

    def _resize(self, episode: _Episode, tokens: int) -> None:
        self._count_out(episode)
        episode.tokens = tokens
        self._count_in(episode)

    def _count_in(self, episode: _Episode) -> None:
        level = self._level(episode)
        self._count[level] += 1
        self._tokens[level] += episode.tokens
        self.tokens_in_flight += episode.tokens

    def _count_out(self, episode: _Episode) -> None:
        level = self._level(episode)
        self._count[level] -= 1
        self._tokens[level] -= episode.tokens
        self.tokens_in_flight -= episode.tokens
