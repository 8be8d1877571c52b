"""How a PPO iteration grows: seconds of its phases and peak memory against batch, response length,
ranks, vocabulary, width and depth, one changed at a time, with the exponent from row to row.

    python tests/bench/growth.py --fixture DIR

The base is bench_ppo.py's tiny model (vocabulary 8,192, width 256, 4 layers), 4 prompts of 8 to 128
tokens a rank, 128 new ones each.  Prints Markdown rows.  Run nothing else meanwhile."""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from tests.bench import bench_ppo  # noqa: E402

LAUNCHER = ["deepspeed", "--quiet", "--num_gpus", "2", "--no_local_rank", "--master_port", "29533"]
AXES = {
    "batch": (1, 4, 16, 64),
    "response": (64, 128, 256, 512, 1024),
    "ranks": (1, 2),
    "vocabulary": (8192, 32768, 131072),
    "width": (256, 512, 1024),
    "layers": (4, 8, 16),
}
BASE = dict(batch=4, response=128, ranks=1, vocabulary=8192, width=256, layers=4)


def measured(fixture, batch, response, ranks, vocabulary, width, layers):
    """bench_ppo.py's row of this setting."""
    name = f"v{vocabulary}w{width}l{layers}"
    start = LAUNCHER if ranks > 1 else [sys.executable]
    flags = dict(fixture=fixture, model=name, batch=batch, response=response, iters=3)
    pairs = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    return bench_ppo.result([*start, bench_ppo.__file__, *pairs])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fixture", required=True)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=[*AXES])
    args = parser.parse_args()
    columns = [*bench_ppo.PHASES, "rss_gb"]
    titles = [*bench_ppo.PHASES.values(), "peak, GiB"]
    print("| | " + " | ".join(titles) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for axis in args.axes:
        before = None
        for value in AXES[axis]:
            row = measured(args.fixture, **{**BASE, axis: value})
            cells = []
            for name in columns:
                cell = f"{row[name]:.2f}"
                if before:
                    grown = math.log(row[name] / before[1][name]) / math.log(value / before[0])
                    cell += f" (^{grown:.2f})"
                cells.append(cell)
            print(f"| {axis} {value:,} | {' | '.join(cells)} |", flush=True)
            before = value, row


if __name__ == "__main__":
    main()
