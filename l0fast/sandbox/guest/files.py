"""Removes a folder whatever its owner did to it: no rights, links, ten thousand levels.

A tree is flattened on the way: a folder inside a folder moves up to the top before it is looked into, so paths stay
short and nothing recurses. Links are unlinked, never followed. Nothing may still write there.
"""

from __future__ import annotations

import os
import stat


def remove_tree(path: str) -> None:
    """Remove `path`; a path that isn't there is fine. Raises OSError where the file system says no."""
    try:
        # the usual case: an empty folder
        os.rmdir(path)
        return
    except FileNotFoundError:
        return
    except OSError:
        os.chmod(path, 0o700)
    moved = 0
    while True:
        names = os.listdir(path)
        if not names:
            os.rmdir(path)
            return
        for name in names:
            child = os.path.join(path, name)
            if not _is_folder(child):
                os.unlink(child)
                continue
            os.chmod(child, 0o700)
            for inner in os.listdir(child):
                grandchild = os.path.join(child, inner)
                if _is_folder(grandchild):
                    # moving a folder rewrites its "..", which takes the right to write in it
                    os.chmod(grandchild, 0o700)
                    while True:
                        moved += 1
                        target = os.path.join(path, f".{moved}")
                        if not os.path.lexists(target):
                            break
                    os.rename(grandchild, target)
                else:
                    os.unlink(grandchild)
            os.rmdir(child)


def _is_folder(path: str) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)
