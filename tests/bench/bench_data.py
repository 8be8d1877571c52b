"""What the data pipeline costs: memory against rows, the second start, tokenising, packing.

    python tests/bench/bench_data.py [--model FOLDER --instructions FILE]

prints one JSON object.  Every figure is taken in a process of its own, one after the other; the
packing comparison trains the model given on the instructions given, padded and packed in turn."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
WORDS = "the of and to in is you that it he was for on are as with his they at be this".split()


def write_rows(path, n):
    """Preference pairs of about 150 words, no prompt twice."""
    with open(path, "w") as file:
        for i in range(n):
            text = [WORDS[(i * 7 + j * j + i // 97) % len(WORDS)] for j in range(150)]
            row = {"prompt": f"\n\nHuman: {i} {' '.join(text[:50])}?\n\nAssistant:"}
            row.update(chosen=" " + " ".join(text[50:100]), rejected=" " + " ".join(text[100:]))
            file.write(json.dumps(row) + "\n")


def settings(path, cache, workers=2):
    usual = dict(data_split="0,1,0", seed=1, eval_fraction=0.1, max_eval_rows=1000, max_seq_len=512)
    usual.update(dedup_prompts=True, data_path=[path], data_output_path=cache)
    return argparse.Namespace(preprocessing_num_workers=workers, **usual)


def mebibytes(field):
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith(field)]
    return int(line.split()[1]) // 1024


def start(path, cache):
    """One start of a run: load the rows, then read all of them as batches."""
    from rlhf import batches, data, engine, models

    engine.prepare("error")  # on CPUs, freed memory stays
    tokenizer = models.load_tokenizer("toy")
    before, clock = mebibytes("RssAnon"), time.perf_counter()
    train, _ = data.load(settings(path, cache), tokenizer, 2)
    steps = batches.steps(settings(path, cache), train, list, (16, 1), len(train) // 16)
    next(steps)
    first = time.perf_counter() - clock
    for _ in steps:
        pass
    found = {"rows": len(train), "seconds_to_first_batch": round(first, 2)}
    found.update(mib_before=before, mib_after=mebibytes("RssAnon"), mib_peak=mebibytes("VmHWM"))
    print(json.dumps(found))


def tokenising(path):
    """Rows a second: the shipped function on batches and processes, and a loop over rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from rlhf import data, render

    n = 60_000
    rows = load_dataset("json", data_files=path, split="train").select(range(n))
    for column in data.COLUMNS.keys() - {*rows.column_names, "length", "cut"}:
        rows = rows.add_column(column, [0] * n)
    tokenizer = AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])
    speeds = {"batched, 2 processes": [], "batched, 1 process": [], "a loop over rows": []}
    for _ in range(3):
        for name, workers in (("batched, 2 processes", 2), ("batched, 1 process", 1)):
            clock = time.perf_counter()
            function = lambda texts: render.tokenise(tokenizer, texts, 512)
            data.tokenised(rows, function, settings(path, "", workers), **data.COLUMNS)
            speeds[name].append(n / (time.perf_counter() - clock))
        clock = time.perf_counter()
        for row in rows.select(range(10_000)):
            render.tokenise(tokenizer, {name: [value] for name, value in row.items()}, 512)
        speeds["a loop over rows"].append(10_000 / (time.perf_counter() - clock))
    print(json.dumps({name: round(statistics.median(found)) for name, found in speeds.items()}))


def child(*arguments, **environment):
    command = [sys.executable, __file__, *map(str, arguments)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env={**env, **environment}, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


def packing(model, instructions, folder):
    """Median tokens a second of train_sft.py, padded, grouped by length and packed, in turn."""
    speeds = {"": [], "--group_by_length": [], "--packing": []}
    for _ in range(3):
        for flag, found in speeds.items():
            out = os.path.join(folder, "sft")
            flags = ["--model_name_or_path", model, "--data_path", instructions]
            flags += [
                "--output_dir",
                out,
                "--data_split",
                "1,0,0",
                "--max_steps",
                "15",
                "--max_eval_rows",
                "16",
            ]
            command = [sys.executable, "train_sft.py", *flags, *flag.split()]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            with open(os.path.join(out, "metrics.jsonl")) as file:
                rows = [json.loads(line) for line in file]
            found += [row["tokens_per_second"] for row in rows if "loss" in row][3:]
    medians = {name or "padded": statistics.median(values) for name, values in speeds.items()}
    return {
        name: {"tokens_per_second": round(value), "ratio": round(value / medians["padded"], 2)}
        for name, value in medians.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--instructions")
    args = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in (10_000, 100_000, 200_000):
            path, cache = os.path.join(folder, f"{n}.jsonl"), os.path.join(folder, f"cache-{n}")
            write_rows(path, n)
            report[f"{n} rows, first start"] = child("start", path, cache)
            report[f"{n} rows, second start"] = child("start", path, cache)
        if args.model:
            report["rows tokenised a second"] = child("tokenising", path, BENCH_MODEL=args.model)
            report["packing"] = packing(args.model, args.instructions, folder)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        start(*sys.argv[2:])
    elif sys.argv[1:2] == ["tokenising"]:
        tokenising(*sys.argv[2:])
    else:
        main()
