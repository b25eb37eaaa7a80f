"""`python tests/helpers/killed.py WHEN NUMBER COUNT MODULE ARGUMENTS...`: a command that is killed.

SIGKILL "before" or "after" its rename of that number, from 1: after it, nothing is flushed yet. A
command that ends before writes the number of its renames into the file COUNT.
"""

import os
import pathlib
import runpy
import signal
import sys


def main(when: str, number: str, count: str, module: str, *arguments: str) -> None:
    done = 0

    def wrap(function):
        def renamed(*args, **kwargs):
            nonlocal done
            done += 1
            hit = done == int(number)
            if hit and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            function(*args, **kwargs)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)

        return renamed

    os.rename, os.replace = wrap(os.rename), wrap(os.replace)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        pathlib.Path(count).write_text(str(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
