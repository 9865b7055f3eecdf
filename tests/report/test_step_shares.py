"""Shares of a step: every instant is charged once, to the first cause that holds. Time is a number that tests set."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.step_shares import CAUSES, STALL_S, StepShares

S = 10**9
STALL = int(STALL_S * S)


class Time:
    now = 100 * S

    def __call__(self) -> int:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += int(seconds * S)


@dataclass
class Work:
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


def seconds(taken: dict[str, float]) -> dict[str, float]:
    """What is not nothing, in seconds."""
    step_s = taken["time/step_s"]
    return {k.removeprefix("share/"): round(v * step_s, 6) for k, v in taken.items() if k.startswith("share/") and v}


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def shares(time: Time) -> StepShares:
    return StepShares(time)


def test_an_instant_is_charged_to_the_first_cause_that_holds(time: Time, shares: StepShares):
    time.passes(1)  # nothing
    episodes = [shares.episode(str(i)) for i in range(4)]
    with episodes[0].span("lease"):
        time.passes(2)
    with episodes[0].span("execute"):
        time.passes(4)
        with episodes[0].span("tool"):
            time.passes(8)
            with episodes[1].span("generate"):
                time.passes(16)
                with shares.span("learn"):
                    time.passes(32)  # hidden behind the engine
                    with shares.span("sync"):
                        time.passes(64)
    with shares.span("learn"):
        time.passes(120)
    with shares.span("checkpoint"):
        time.passes(8)
    with shares.span("learn"):
        with shares.span("take"), shares.span("evaluate"):
            time.passes(256)  # asked beside
    with shares.span("evaluate"), episodes[2].span("generate"):
        time.passes(512)
        with shares.span("take"):
            time.passes(1024)  # the step waits for that request, too
    taken = shares.take_step()
    assert taken["time/step_s"] == 2047
    assert seconds(taken) == {
        "other": 1, "sandbox": 2 + 4, "tools": 8, "decode": 16 + 32 + 1024, "sync": 64, "learn": 128 + 256, "evaluate": 512
    }  # fmt: skip


def test_stragglers_are_less_than_a_quarter_of_the_most_there_were(time: Time, shares: StepShares):
    episodes = [shares.episode(str(i)) for i in range(8)]
    requests = [episode.span("generate") for episode in episodes]
    for request in requests:
        request.__enter__()
    time.passes(1)
    for i in range(6):
        requests[i].__exit__(None, None, None)
        episodes[i].end(status="completed")
    time.passes(2)  # two of eight are a quarter
    requests[6].__exit__(None, None, None)
    time.passes(4)  # one is at the engine, and two are under way
    episodes[6].end()
    time.passes(8)
    with shares.span("learn"):
        time.passes(16)  # the one that is left holds nobody up
    assert seconds(shares.take_step()) == {"decode": 1 + 2 + 4, "tail": 8, "learn": 16}
    # in the next step, it is all there is
    time.passes(1)
    assert seconds(shares.take_step()) == {"decode": 1}


def test_stragglers_are_told_by_the_most_of_their_own_step(time: Time, shares: StepShares):
    def step(num_episodes: int, num_requests: int, left: int) -> dict[str, float]:
        """Episodes begin, some are at the engine, all but a few end, and one is at the engine."""
        episodes = [shares.episode("e") for _ in range(num_episodes)]
        requests = [episode.span("generate") for episode in episodes[:num_requests]]
        for request in requests:
            request.__enter__()
        for request in requests:
            request.__exit__(None, None, None)
        for episode in episodes[left:]:
            episode.end()
        with episodes[0].span("generate"):
            time.passes(1)
        for episode in episodes[:left]:
            episode.end()
        return seconds(shares.take_step())

    assert step(20, 20, left=4) == {"tail": 1}
    assert step(5, 5, left=2) == {"decode": 1}, "two of five"
    assert step(20, 20, left=4) == {"tail": 1}
    assert step(20, 1, left=4) == {"decode": 1}, "there was never more than one at the engine"


def test_the_engines_time_is_split_by_its_own_figures(time: Time, shares: StepShares):
    shares.take_step(Work(prefill_tokens=50, recomputed_tokens=10, prefill_s=1.0, decode_s=2.0))
    with shares.episode("a").span("generate"):
        time.passes(8)
    # since then: 1 s on 100 tokens, 20 of them again, and 3 s of sampling
    work = Work(prefill_tokens=150, recomputed_tokens=30, prefill_s=2.0, decode_s=5.0)
    assert seconds(shares.take_step(work)) == pytest.approx({"decode": 6.0, "prefill": 1.6, "recompute": 0.4})
    # another engine, that counts from 0
    with shares.episode("a").span("generate"):
        time.passes(4)
    assert seconds(shares.take_step(Work())) == {"decode": 4.0}


def test_what_a_late_loop_charged_is_a_stall(time: Time, shares: StepShares):
    with shares.episode("a").span("generate"):
        shares.beat(time.now, time.now, time.now + STALL)
        time.passes(3)  # due after 20 ms
        with shares.span("learn"):
            time.passes(1)
            with shares.span("sync"):
                time.passes(8)  # who waits for these needs no loop
    with shares.span("learn"):
        time.passes(16)
    shares.beat(100 * S + STALL, time.now, None)
    time.passes(2)
    stalled = {"decode": STALL_S, "stall": 4 - STALL_S, "sync": 8, "learn": 16, "other": 2}
    assert seconds(shares.take_step()) == pytest.approx(stalled)


def test_a_loop_that_is_a_little_late_is_not_stalled(time: Time, shares: StepShares):
    shares.beat(time.now, time.now, time.now)
    time.passes(STALL_S)
    shares.beat(time.now - STALL, time.now, None)
    assert seconds(shares.take_step()) == {"other": STALL_S}


def test_a_step_may_end_while_the_loop_is_late(time: Time, shares: StepShares):
    shares.beat(time.now, time.now, time.now + 1 * S)
    time.passes(3)
    assert seconds(shares.take_step()) == {"other": 1, "stall": 2}
    time.passes(4)
    shares.beat(101 * S, time.now, time.now + 1 * S)
    assert seconds(shares.take_step()) == {"stall": 4}


def test_no_time_has_no_shares(shares: StepShares):
    assert set(shares.take_step().values()) == {0.0}


def test_an_unknown_block_is_a_bug(shares: StepShares):
    with pytest.raises(KeyError):
        shares.span("lunch")


def test_what_is_quiet_is_what_was_not_left_without_an_error(time: Time, shares: StepShares):
    episode = shares.episode("a")
    time.passes(10)
    request = episode.span("generate")
    request.__enter__()
    time.passes(5)
    quiet_s, activity = shares.quiet()
    assert (quiet_s, activity["generate"].open, activity["generate"].quiet_s) == (15, 1, 5)
    request.__exit__(TimeoutError, TimeoutError(), None)
    assert shares.quiet()[0] == 15
    with episode.span("execute"):
        time.passes(1)
    assert shares.quiet()[0] == 0


Moves = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "enter", "leave", "run", "stop", "beat", "take"]),
        st.integers(0, 5),
        st.sampled_from(["lease", "generate", "execute", "tool"]),
        st.sampled_from(["take", "learn", "sync", "evaluate"]),
        st.integers(0, 50_000_000),
    ),
    max_size=60,
)


@given(Moves)
def test_whatever_happens_the_shares_add_up_to_one_and_the_steps_to_the_time(moves: list):
    time = Time()
    shares = StepShares(time)
    episodes, blocks, steps = [], [], []
    due = None
    for what, which, inner, outer, wait_ns in moves:
        match what:
            case "begin":
                episodes.append((shares.episode("e"), []))
            case "end" if episodes:
                episode, open_blocks = episodes.pop(which % len(episodes))
                for block in reversed(open_blocks):
                    block.__exit__(None, None, None)
                episode.end()
            case "enter" if episodes:
                episode, open_blocks = episodes[which % len(episodes)]
                open_blocks.append(episode.span(inner))
                open_blocks[-1].__enter__()
            case "leave" if episodes and episodes[which % len(episodes)][1]:
                episodes[which % len(episodes)][1].pop().__exit__(None, None, None)
            case "run":
                blocks.append(shares.span(outer))
                blocks[-1].__enter__()
            case "stop" if blocks:
                blocks.pop().__exit__(KeyError, KeyError(), None)
            case "beat":
                shares.beat(due or time.now, time.now, due := time.now + which * 5_000_000)
            case "take":
                steps.append(shares.take_step(Work(which, which // 2, which / 2, 1.0)))
        time.now += wait_ns
    steps.append(shares.take_step())
    assert sum(step["time/step_s"] for step in steps) == pytest.approx((time.now - Time.now) / S)
    for step in steps:
        parts = [step[f"share/{cause}"] for cause in CAUSES]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(1.0 if step["time/step_s"] else 0.0)
        assert step.keys() == {"time/step_s", *(f"share/{cause}" for cause in CAUSES)}
