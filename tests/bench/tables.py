"""Runs the benchmarks against TRL and writes their tables into docs/speed.md, with the commit that was
measured.  Half an hour on two cores; run nothing else meanwhile.

    python tests/bench/tables.py --fixture DIR --ppo TRL_PYTHON TRL_DRIVER --steps TRL_PYTHON

--ppo: as bench_ppo.py's --vs (TRL 1.12); --steps: as bench_trl.py's (TRL 1.16)."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "speed.md"
# heading of the table, script, runs
TABLES = {
    "ppo": ("| | generation |", "bench_ppo.py", (
        "--model opt125 --iters 3",
        "--model opt125 --iters 3 --dtype bf16",
        "--model tiny --iters 5",
        "--model tiny --iters 5 --varlen",
        "--model tiny --iters 5 --batch 16",
    )),
    "steps": ("| step | TRL over ours |", "bench_trl.py", (
        "--model tiny --steps 8",
        "--model opt125 --steps 3 --turns 2",
    )),
}  # fmt: skip


def output(command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measured(script, runs, fixture, peer):
    """The rows that a benchmark prints, without its heading."""
    lines = []
    for run in runs:
        command = [sys.executable, HERE / script, "--fixture", fixture, *run.split()]
        lines += output([*map(str, command), "--vs", *peer]).splitlines()
    return [line for line in lines if re.match(r"\| [^|]+ \| \d", line)]


def replaced(page, heading, rows):
    """The page with these rows under the first table that has this heading."""
    before, found, rest = page.partition(f"\n{heading}")
    if not found:
        raise ValueError(f"{PAGE} has no table that begins with {heading}")
    title, rule, after = rest.split("\n", 2)
    old = re.match(r"(\|.*\n)*", after)
    return before + found + "\n".join([title, rule, *rows, after[old.end() :]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fixture", required=True)
    parser.add_argument("--ppo", nargs=2, required=True, metavar=("PYTHON", "DRIVER"))
    parser.add_argument("--steps", nargs=1, required=True, metavar="PYTHON")
    args = parser.parse_args()
    commit = output(["git", "-C", str(HERE), "rev-parse", "--short=7", "HEAD"]).strip()
    page = PAGE.read_text()
    for name, (heading, script, runs) in TABLES.items():
        rows = measured(script, runs, args.fixture, getattr(args, name))
        print(*rows, sep="\n", flush=True)
        page = replaced(page, heading, rows)
    PAGE.write_text(re.sub(r"(range, at commit )\w+", rf"\g<1>{commit}", page))


if __name__ == "__main__":
    main()
