"""Make a small policy from nothing: a tokenizer, demonstrations that really ran, supervised learning.

    python -m l0fast.warm_start --out DIR

The demonstrations mix good and bad moves about half and half, so the policy that comes out knows the format, can copy a
name out of a search result, and is wrong most of the time: what reinforcement learning then has to mend.
"""
