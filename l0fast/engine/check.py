"""What no engine can serve is refused in the driver: an id past the embedding would take an engine's process down."""

import numpy as np
from numpy.typing import NDArray

from l0fast.engine.base import Sampling


def check_request(prompt: NDArray[np.int64], sampling: Sampling, *, vocab_size: int, max_tokens: int) -> None:
    """Raise ValueError, saying what to change, for a request that does not fit a model or its context."""
    check_prompt(prompt, sampling.max_new_tokens, vocab_size=vocab_size, max_tokens=max_tokens)
    check_sampling(sampling, vocab_size=vocab_size)


def check_prompt(prompt: NDArray[np.int64], max_new_tokens: int, *, vocab_size: int, max_tokens: int) -> None:
    """The part of `check_request` that takes longer with a longer prompt."""
    if not len(prompt):
        raise ValueError("the prompt has no ids: send at least one")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        odd = int(prompt[(prompt < 0) | (prompt >= vocab_size)][0])
        raise ValueError(
            f"the prompt has id {odd}, but the model's ids are 0 to {vocab_size - 1}: is it from another model's tokenizer?"
        )
    if len(prompt) + max_new_tokens > max_tokens:
        raise ValueError(
            f"a prompt of {len(prompt)} ids and max_new_tokens = {max_new_tokens} do not fit in the engine's "
            f"{max_tokens} tokens: shorten the prompt or raise --agent.context-tokens"
        )


def check_sampling(sampling: Sampling, *, vocab_size: int) -> None:
    """The part of `check_request` that knows of no prompt."""
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {sampling.max_new_tokens}: ask for at least one")
    if not 0 <= sampling.temperature < float("inf"):
        raise ValueError(f"temperature = {sampling.temperature}: give 0 (greedy) or more")
    if any(not 0 <= stop < vocab_size for stop in sampling.stop_token_ids):
        raise ValueError(
            f"stop_token_ids = {sampling.stop_token_ids}, but the model's ids are 0 to {vocab_size - 1}: "
            "are they from another model's tokenizer?"
        )
