"""Several single-core processes at once: two that share their cores slow each other many times over."""

import os
import queue
import subprocess
from concurrent.futures import ThreadPoolExecutor

CORES = queue.SimpleQueue()
for number in sorted(os.sched_getaffinity(0)):
    CORES.put(number)


def run(command, **options):
    """Run a command on a core of its own, as soon as one is free."""
    core = CORES.get()
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            **options,
        )
    finally:
        CORES.put(core)


def each(function, keys):
    """function(key) for all keys, as many at once as there are cores."""
    with ThreadPoolExecutor(CORES.qsize()) as pool:
        list(pool.map(function, keys))
