"""A launcher that imports DeepSpeed once and forks the ranks of a script, where that of DeepSpeed
makes an interpreter for each: for tests of what a script does, not of how it is launched.
"""

import atexit
import gc
import os
import runpy
import signal
import sys
from pathlib import Path

from moe_locality.demo.launch import free_port
from tests.launch import preload

ROOT = Path(__file__).parents[1]


def forked_command(num_ranks: int, script: Path, arguments: list[str]) -> list[str]:
    """The command line that stands for that of ``demo.launch.launch_command``."""
    code = (
        f"import sys; sys.path.insert(1, {str(ROOT)!r}); import tests.fork_launcher as f; f.main()"
    )
    return [sys.executable, "-c", code, str(num_ranks), str(free_port()), str(script), *arguments]


def main() -> None:
    """Fork, run the script in every rank with what it registered for its exit, and end with the
    worst.
    """
    num_ranks, port, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    preload(deepspeed=True, transformers="transformers" in Path(script).read_text())
    gc.freeze()
    ranks = []
    for rank in range(int(num_ranks)):
        if not (process := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
            os.environ.update(WORLD_SIZE=num_ranks, LOCAL_SIZE=num_ranks, MASTER_PORT=port)
            os.environ.update(CROSS_RANK="0", CROSS_SIZE="1")
            runpy.run_path(script, run_name="__main__")
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(0)  # taking apart all that was imported takes a rank seconds
        ranks.append(process)
    failed = 0
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status and not failed:
            failed = abs(os.waitstatus_to_exitcode(status))
            for process in ranks:
                os.kill(process, signal.SIGTERM)
    sys.exit(failed)
