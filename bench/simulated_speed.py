"""How many times faster than real time simulated engines are.

    python -m bench.simulated_speed [--seconds 240] [--out FOLDER]

    agents x engines x length of a response, each agent on to its next episode at once; all else as in bench/admission.py

Twice, with the same episodes at the same times: agents that are figures (engine/traffic.py), and agents that are coroutines
before the `Engine` protocol (engine/simulated.py), with prompts of ids, as a scheduler or an agent under test has them.

What costs time is a turn; an idle second costs nothing. So two figures belong together: turns that a second of the host
simulates, which depends little on the scene, and turns in a simulated second, which are fewer where responses take long.

    times real time = turns simulated a second / turns in a simulated second

`python -m bench.compiled bench.simulated_speed` measures the same engines compiled. The last line is JSON.
"""

import argparse
import asyncio
import itertools
import math
import statistics
import sys
import time
from array import array
from collections.abc import Sequence

from bench.admission import CAPACITIES, COMPILED, OFFERED, RESULTS, SPEED, simulate, traffic
from bench.at_least import at_least
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.results_folder import results_folder, write
from l0fast.engine.base import Engine, EngineLoad, Sampling
from l0fast.engine.gate import gated
from l0fast.engine.simulated import SimulatedClock, SimulatedEngine, Speed
from l0fast.engine.traffic import Episodes, Traffic
from l0fast.garbage import old_objects_aside
from l0fast.ids import Ids
from l0fast.rollout.admission import Admission

SCENES = tuple(itertools.product((300, 1500), (1, 8), (16, 128, 1024)))
"""(median response [tokens], engines, agents): L0's agents, and some that think longer."""
VOCAB_SIZE = 152_064
"""Qwen2.5's: ids below 257 are objects that Python has ready, and so cheaper than a model's."""
ROUNDS = 3
"""Of all scenes; the figures are medians."""


class Coroutines:
    """The same agents, each a coroutine that asks an engine with ids."""

    def __init__(
        self,
        asks: Traffic,
        *,
        speed: Speed,
        slots: int,
        kv_tokens: int,
        replicas: int = 1,
        admission: Admission | None = None,
    ):
        self.turns = 0
        """Ended so far."""
        self.clock = SimulatedClock()
        self._episodes, self._max_new_tokens, self._admission = Episodes(asks), asks.max_new_tokens, admission
        self._said = Ids(array("i", [VOCAB_SIZE - 1]) * asks.max_new_tokens)
        self._lengths: dict[str, int] = {}
        """By conversation, of what it says next."""
        self._engine: Engine = SimulatedEngine(
            vocab_size=VOCAB_SIZE,
            max_tokens=kv_tokens,
            slots=slots,
            kv_tokens=kv_tokens,
            replicas=replicas,
            speed=speed,
            script=self._say,
            forgets=False,
            clock=self.clock,
        )

    def play(self, agents: int, seconds: float) -> tuple[float, EngineLoad]:
        """Returns how long that took [s], and what the engines say in the end."""

        async def main() -> tuple[float, EngineLoad]:
            engine = self._engine
            began = time.perf_counter()
            if self._admission is not None:
                # who waits is to be seen, not cut off
                self._engine = await gated(engine, self._admission, timeout_s=math.inf, clock=self.clock)
            async with asyncio.TaskGroup() as tg:
                tasks = [tg.create_task(self._agent()) for _ in range(agents)]
                await self.clock.sleep(seconds)
                load, wall_s = await engine.load(), time.perf_counter() - began
                for task in tasks:
                    task.cancel()
            return wall_s, load

        with old_objects_aside():
            return self.clock.run(main())

    def _say(self, prompt_ids: Sequence[int], sampling: Sampling, conversation: str) -> Ids:
        return self._said[: self._lengths[conversation]]

    async def _agent(self) -> None:
        while True:
            name, prompt_tokens, turns = self._episodes.next()
            prompt = Ids(array("i", [VOCAB_SIZE - 2]) * prompt_tokens)
            sampling = Sampling(max_new_tokens=self._max_new_tokens, stop_token_ids=(), seed=int(name))
            for response_tokens, output_tokens, tool_s in reversed(turns):
                self._lengths[name] = response_tokens
                sampled = await self._engine.generate(prompt, sampling, conversation=name)
                self.turns += 1
                prompt = prompt + sampled.response_ids + array("i", [VOCAB_SIZE - 2]) * output_tokens
                await self.clock.sleep(tool_s)
            self._engine.forget(name)
            del self._lengths[name]


def main(argv: list[str] | None = None) -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulated_speed",
        description="How many times faster than real time engines are simulated.",
    )
    parser.add_argument("--seconds", type=at_least(1), default=240, help="simulated time of each scene [s]")
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args(argv)
    name, kv_tokens = next(iter(CAPACITIES.items()))
    print(f"{machine()}; engines {'compiled' if COMPILED else 'interpreted'}")
    print(f"{args.seconds:,d} simulated seconds a scene, median of {ROUNDS}; each engine with {name}")
    scenes: dict[tuple[int, int, int], list[tuple[float, int, float, int]]] = {scene: [] for scene in SCENES}
    for _ in range(ROUNDS):
        for (response, engines, agents), runs in scenes.items():
            figures = simulate(kv_tokens, agents, args.seconds, replicas=engines, median_response=response)
            coroutines = Coroutines(
                traffic(response), speed=SPEED, slots=OFFERED, kv_tokens=kv_tokens, replicas=engines
            )
            wall_s, _ = coroutines.play(agents, args.seconds)
            runs.append((figures.wall_s, figures.turns, wall_s, coroutines.turns))
    print(
        f"\n{'':>39} {'as figures':^22} {'as coroutines':^22}\n{'response':>9} {'engines':>8} {'agents':>7} {'turns/s':>12} "
        f"{'simulated/s':>11} {'x real':>10} {'simulated/s':>11} {'x real':>10}"
    )
    rows = []
    for (response, engines, agents), runs in scenes.items():
        wall_s, coroutines_wall_s = (statistics.median(run[i] for run in runs) for i in (0, 2))
        _, turns, _, coroutines_turns = runs[0]
        row = {
            "median_response_tokens": response,
            "engines": engines,
            "agents": agents,
            "turns_in_simulated_s": turns / args.seconds,
            "turns_a_s": turns / wall_s,
            "times_real_time": args.seconds / wall_s,
            "turns_a_s_coroutines": coroutines_turns / coroutines_wall_s,
            "times_real_time_coroutines": args.seconds / coroutines_wall_s,
        }
        rows.append(row)
        print("{:9,d} {:8d} {:7,d} {:12.2f} {:11,.0f} {:10,.0f} {:11,.0f} {:10,.0f}".format(*row.values()))
    result = {
        "bench": "simulated_speed",
        "machine": machine(),
        "compiled": COMPILED,
        "simulated_s": args.seconds,
        "rows": rows,
    }
    write(result, args.out, "simulated_speed_compiled.json" if COMPILED else "simulated_speed.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
