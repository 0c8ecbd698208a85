"""Saves a checkpoint again and again, each time in a process that is killed at some byte.

python tests/helpers/killed_save.py FOLDER SIZE...: one line for each SIZE, the signal that ended
the process that was saving FOLDER/SIZE.pt. It may write SIZE bytes to a file and no more: the
kernel's SIGXFSZ kills it in the middle of the write.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpoint.py"


def save_with_at_most(size, save, state, path):
    """Fork a process that saves; return the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
        save(state, path)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def main(folder, *sizes):
    """Kill the save of a training two steps on at every size."""
    example = runpy.run_path(str(EXAMPLE))
    training = example["Training"](Path(folder, "old.pt"))
    for _ in range(2):
        training.step()
    for size in sizes:
        path = Path(folder, f"{size}.pt")
        ended = save_with_at_most(int(size), example["save"], training.state(), path)
        sys.stdout.write(f"{ended}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
