"""Signs of progress at the grain of a layer, so that a rank that is stuck can be told from one that has much to do.

    "forward of the policy, layer 12 of 28, pack 3 of 7"      written by hooks, before each layer and before its gradient
    "optimizer step"                                          written by whoever starts something else that takes long

A sign also says how long it may be until the next. That is `stall_s`, 10 s by default: on a GPU a layer takes
milliseconds, and the host is never further ahead than the GPU's queue of launches is long. Two things take longer and
get `slow_s`: an optimizer step, and all of the first step, in which kernels are compiled. A large model on a CPU may take
longer at each layer; four times the longest silence of the step before is fine, too, up to `slow_s`.

In collectives ranks wait for each other at every layer. So when one is stuck the others fall silent with it, at that
layer or the next: the one that gave the fewest signs is where to look.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")

PACE = 4
"""Times the longest silence of the step before that is still no reason to worry."""


class Progress:
    """What this process is doing, said to `tell(doing, limit_s)`; to nobody until `report_to`."""

    def __init__(self) -> None:
        self._tell: Callable[[str, float], object] = lambda doing, limit_s: None
        self._stall_s = self._slow_s = 0.0
        self._pack = ""
        self._backward = False
        self._first_step = True
        self._last = time.monotonic()
        self._longest = self._longest_before = 0.0
        """Silences within packs, of this step and of the one before [s]."""

    def report_to(self, tell: Callable[[str, float], object], stall_s: float, slow_s: float) -> None:
        self._tell, self._stall_s, self._slow_s = tell, stall_s, max(stall_s, slow_s)

    def watch(self, root: nn.Module, name: str) -> None:
        """Have the layers of `root.model.model` say when a pack gets to them, forward and back."""
        layers: Any = root.model.model.layers  # pyright: ignore[reportAttributeAccessIssue]
        for number, layer in enumerate(layers, 1):
            self._watch_layer(layer, f"of the {name}, layer {number} of {len(layers)}")

        def on_forward(*_: object) -> None:
            self._backward = False
            self._in_pack(f"forward of the {name}, embedding")

        root.register_forward_pre_hook(on_forward, prepend=True)
        layers[-1].register_forward_hook(lambda *_: self._in_pack(f"forward of the {name}, head"))

    def packs(self, packs: Sequence[T]) -> Iterator[T]:
        """The packs one by one, each for as long as the loop's body runs."""
        self._last = time.monotonic()
        for number, pack in enumerate(packs, 1):
            self._pack = f", pack {number} of {len(packs)}"
            yield pack
            self._in_pack("passed")

    def say(self, doing: str, limit_s: float | None = None) -> None:
        """It is at something else, which takes `limit_s` at most; None: no longer than a layer; 0: it is not known."""
        self._tell(doing, self._stall_s if limit_s is None else limit_s)

    def optimizer_step(self, of: str = "") -> None:
        self.say(f"optimizer step{of}", self._slow_s)

    def step_taken(self) -> None:
        """Silences are compared with those of this step from now on."""
        self._first_step = False
        self._longest_before, self._longest = self._longest, 0.0

    def _watch_layer(self, layer: nn.Module, which: str) -> None:
        forward, backward = f"forward {which}", f"backward {which}"

        def before(*_: object) -> None:
            # a checkpointed layer runs again in the backward pass
            self._in_pack(backward if self._backward else forward)

        def before_gradient(_: Tensor) -> None:
            self._backward = True
            self._in_pack(backward)

        def after(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(before_gradient)

        # first of all: FSDP's own hook waits for the other ranks
        layer.register_forward_pre_hook(before, prepend=True)
        layer.register_forward_hook(after)

    def _in_pack(self, doing: str) -> None:
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        limit_s = self._slow_s
        if not self._first_step:
            limit_s = min(max(self._stall_s, PACE * self._longest, PACE * self._longest_before), self._slow_s)
        self._tell(doing + self._pack, limit_s)
