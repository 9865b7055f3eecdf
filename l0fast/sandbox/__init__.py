"""Persistent Python sessions for agents, that can't hurt this machine or one another."""

from l0fast.sandbox.selection import open_sandbox

__all__ = ["open_sandbox"]
