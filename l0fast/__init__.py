"""l0fast: reinforcement learning of code-writing agents in one process, on one event loop, on one box."""

__version__ = "0.1.0"
