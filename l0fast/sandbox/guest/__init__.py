"""The program inside a sandbox: standard library alone, Python 3.9 or newer, Linux on x86-64 or aarch64.

    zygote.py     one per shard: single thread, everything imported, forks a session per request, reaps, ends, removes
    session.py    one per agent: reads frames, runs cells, answers
    repl.py       what a cell means: output, last expression, traceback, time limit
    tools.py      the host's tools as Python functions
    frames.py     length + JSON on a stream socket
    output.py     a bounded stdout
    reserve.py    memory for what is said when a cell has taken all
    jail.py       the way from the zygote's rights to a session's: limits, uid, landlock.py, seccomp.py
    at_fork.py    random and threading, without what they do after every fork
    files.py      brings a task's files, collects an agent's, and removes a folder whatever its owner did to it

It is started as `python -S -s -B -c BOOT FOLDER WHERE`, with FOLDER the parent of this folder, so it needs no installation
and imports nothing of the host's package; WHERE is a descriptor of the control socket, or in a container its path. It trusts the host, and is not trusted by it.
"""
