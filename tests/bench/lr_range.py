"""Does --lr_range_test suggest a good rate?  Its suggestions beside sweeps, on the embedded world.

    python tests/bench/lr_range.py output --out lr_range.jsonl           # output: of run_all.sh; resumes
    python tests/bench/lr_range.py output --out lr_range.jsonl --table   # Markdown, for docs/quality.md

A sweep trains at fixed rates and is judged by the metric in SWEEPS.  One thread a run, as many at
once as there are cores; a row of the output is one run (rate 0: a ramp)."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from tests.bench import cores  # noqa: E402

SHARED = "--data_split 2,5,3 --log_interval 1000000 --num_warmup_steps 10"
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
# step: its flags, its rates' flags, the rates, the metric, over how many last rows, is more better?
SWEEPS = {
    "sft": ("--max_eval_rows 1000", ["lr"], (*RATES, 2e-3, 1e-2), "eval_perplexity", 1, -1),
    "rm": ("--per_device_train_batch_size 64", ["lr"], RATES, "eval_accuracy", 1, 1),
    "dpo": (
        "--max_eval_rows 1000 --max_steps 300 --beta 0.1 --eval_interval 1000",
        ["lr"],
        RATES,
        "eval_accuracy",
        1,
        1,
    ),
    "ppo": (
        """--per_device_generation_batch_size 64 --per_device_training_batch_size 64 --max_steps 100
        --max_prompt_seq_len 32 --max_answer_seq_len 48 --lr_scheduler_type linear""",
        ["actor_lr", "critic_lr"],
        RATES,
        "reward",
        20,
        1,
    ),
}


def command(step, run, out, *flags):
    """The words of a run of one step, from what run_all.sh left in the folder `run`."""
    sft = ("--model_name_or_path", f"{run}/sft")
    actor = ("--actor_model_name_or_path", f"{run}/sft")
    models = {"sft": (), "rm": sft, "dpo": sft}
    models["ppo"] = (*actor, "--critic_model_name_or_path", f"{run}/rm")
    words = (f"train_{step}.py", *models[step], "--output_dir", out, *SHARED.split(), *flags)
    return [sys.executable, *map(str, words)]


def one(step, rate, run, work):
    """A run of a sweep, or a ramp -> its row."""
    out = f"{work}/{step}-{rate}"
    flags, names, _, metric, last, _ = SWEEPS[step]
    rates = (
        [word for name in names for word in (f"--{name}", rate)] if rate else ["--lr_range_test"]
    )
    done = cores.run(command(step, run, out, *flags.split(), *rates), cwd=ROOT)
    row = {"step": step, "rate": rate}
    if not rate:
        said = dict(re.findall(r"the most, at --(\S+) (\S+)", done.stdout))
        return {**row, "suggested": said, "ended": done.stderr.strip()[-200:]}
    if done.returncode:
        return {**row, "value": None, "ended": done.stderr.strip()[-200:]}
    found = [json.loads(line).get(metric) for line in open(f"{out}/metrics.jsonl")]
    return {**row, "value": mean([value for value in found if value is not None][-last:])}


def table(rows):
    """A row a step: the sweep's values, the best of them in bold, the ramp's suggestions."""
    rates = sorted({rate for *_, rates, _, _, _ in SWEEPS.values() for rate in rates})
    print(f"| step, judged by | {' | '.join(f'{rate:g}' for rate in rates)} | suggested |")
    print("|---" * (len(rates) + 2) + "|")
    for step, (*_, metric, _, sign) in SWEEPS.items():
        of = {row["rate"]: row for row in rows if row["step"] == step}
        values = {rate: row["value"] for rate, row in of.items() if row.get("value") is not None}
        best = max(values, key=lambda rate: sign * values[rate])
        shown = {rate: f"{value:.3f}" for rate, value in values.items()}
        shown[best] = f"**{shown[best]}**"
        cells = [shown.get(rate, "stopped" if rate in of else "") for rate in rates]
        said = ", ".join(f"`--{name}` {rate}" for name, rate in of[0]["suggested"].items())
        print(f"| {step}, {metric} | {' | '.join(cells)} | {said} |")


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
    done = {(row["step"], row["rate"]) for row in rows}
    keys = [(step, rate) for step in args.steps for rate in (0, *SWEEPS[step][2])]

    def start(key):
        row = one(*key, os.path.abspath(args.run), os.path.abspath(args.work))
        print(row, flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")

    cores.each(start, [key for key in keys if key not in done])


if __name__ == "__main__":
    main()
