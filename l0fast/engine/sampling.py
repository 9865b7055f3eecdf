"""Random numbers that belong to a request, not to a batch.

    u(seed, position) = top 24 bits of mix(mix(seed) + position * golden) / 2**24        in [0, 1)

`mix` is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). There
is no generator state: whatever shares the batch, and however often a request is sent again, its tokens see the same numbers.
24 bits, so that every u is exact in fp32.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) per (seed, position) pair, element by element. Shapes broadcast."""
    mixed = _mix(_mix(seeds) + positions.astype(np.uint64) * _GOLDEN)
    return ((mixed >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # arrays wrap silently; numpy warns about scalars only
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
