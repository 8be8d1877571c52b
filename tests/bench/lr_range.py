"""Does --lr_range_test suggest a good rate?  Its suggestion beside a sweep, on the embedded world.

    python tests/bench/lr_range.py output --out lr_range.jsonl         # output: of run_all.sh; resumes
    python tests/bench/lr_range.py output --out lr_range.jsonl --table # Markdown, of docs/quality.md

A sweep trains at five fixed rates, half a decade apart; what it is judged by is in SWEEPS.  One
thread a run, as many at once as there are cores; a row of the output is one run."""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from tests.bench import cores  # noqa: E402

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SHARED = "--data_split 2,5,3 --log_interval 1000000 --num_warmup_steps 10".split()
ROLLOUTS = """--per_device_generation_batch_size 64 --per_device_training_batch_size 64
    --max_prompt_seq_len 32 --max_answer_seq_len 48 --lr_scheduler_type linear""".split()
# step: its flags; the metric to judge by, over so many last rows that have it, and is more better?
SWEEPS = {
    "sft": ("--max_eval_rows 1000", ["lr"], "eval_perplexity", 1, -1),
    "rm": ("--max_eval_rows 4000 --per_device_train_batch_size 64", ["lr"], "eval_accuracy", 1, 1),
    "dpo": (
        "--max_eval_rows 1000 --max_steps 300 --beta 0.1 --eval_interval 1000",
        ["lr"],
        "eval_accuracy",
        1,
        1,
    ),
    "ppo": (" ".join(["--max_steps 100", *ROLLOUTS]), ["actor_lr", "critic_lr"], "reward", 20, 1),
}


def command(step, run, out, *flags):
    """The words of a run of one step, from what run_all.sh left in the folder `run`."""
    model = {
        "sft": (),
        "rm": ("--model_name_or_path", f"{run}/sft"),
        "dpo": ("--model_name_or_path", f"{run}/sft"),
        "ppo": ("--actor_model_name_or_path", f"{run}/sft", "--critic_model_name_or_path", f"{run}/rm"),
    }[step]  # fmt: skip
    words = [f"train_{step}.py", *model, "--output_dir", out, *SHARED, *flags]
    return [sys.executable, *map(str, words)]


def metrics(folder):
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("run", nargs="?", default="output", help="the output folder of run_all.sh")
    add("--out", default="lr_range.jsonl")
    add("--work", default="output/lr_range", help="takes the runs")
    add("--steps", nargs="+", default=[*SWEEPS], choices=SWEEPS)
    add("--table", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in open(args.out)] if os.path.exists(args.out) else []
    if args.table:
        return table(rows)
    run, work = os.path.abspath(args.run), os.path.abspath(args.work)
    done = {(row["step"], row["rate"]) for row in rows}
    keys = [(step, rate) for step in args.steps for rate in (0, *RATES)]

    def start(key):
        step, rate = key
        out = f"{work}/{step}-{rate}"
        flags, names, metric, last, _ = SWEEPS[step]
        flags = flags.split()
        if rate:
            flags += [word for name in names for word in (f"--{name}", rate)]
        else:
            flags += ["--lr_range_test"]
        finished = cores.run(command(step, run, out, *flags), cwd=ROOT)
        row = {"step": step, "rate": rate}
        if rate and finished.returncode:
            row["value"] = None
        elif rate:
            found = [row[metric] for row in metrics(out) if row.get(metric) is not None]
            row["value"] = mean(found[-last:])
        else:
            lines = finished.stdout.splitlines() + finished.stderr.splitlines()
            row["suggested"] = [line for line in lines if "steepest" in line]
        print(row, finished.stderr.strip()[-300:], flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")

    cores.each(start, [key for key in keys if key not in done])


def table(rows):
    """A row a step: the sweep's values, its best rate, the suggestions."""
    print(f"| step, judged by | {' | '.join(f'{rate:g}' for rate in RATES)} | suggested |")
    print("|---" * (len(RATES) + 2) + "|")
    for step, (*_, metric, last, sign) in SWEEPS.items():
        of = {row["rate"]: row for row in rows if row["step"] == step}
        values = {rate: of[rate]["value"] for rate in RATES if of.get(rate, {}).get("value")}
        best = max(values, key=lambda rate: sign * values[rate])
        cells = [f"{values[rate]:.3f}" if rate in values else "stopped" for rate in RATES]
        cells[RATES.index(best)] = f"**{cells[RATES.index(best)]}**"
        print(f"| {step}, {metric} | {' | '.join(cells)} | {'; '.join(of[0]['suggested'])} |")


if __name__ == "__main__":
    main()
