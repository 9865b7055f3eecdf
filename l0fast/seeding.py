"""Seeds that depend on what they are for, and on nothing else: not on order, concurrency or the hash of the day."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 48-bit seed for the thing named by `parts`, e.g. `derive_seed(run_seed, "episode", group, index)`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "little")
