"""What --precompute_ref_logp saves: seconds a step and peak memory of train_dpo.py with and without, in
turn, on an OPT-125M-shaped model with random weights.

    python -m tests.bench.bench_dpo"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.conftest import ROOT, WORDS, make_model, write_jsonl

SHAPE = dict(vocab_size=50272, hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072)
SHAPE.update(num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512)
FLAGS = """--per_device_train_batch_size 4 --max_steps 5 --max_eval_rows 4 --eval_kl_prompts 0
    --eval_interval 100 --data_split 0,1,0 --precompute_ref_logp"""


def run(folder, name, flags):
    """-> median seconds of a step, but the first; peak GiB."""
    out = f"{folder}/{name}"
    paths = ["--model_name_or_path", f"{folder}/model", "--data_path", f"{folder}/pairs.jsonl"]
    paths += ["--data_output_path", f"{folder}/cache", "--output_dir", out]
    # a process of its own between: its children's peak is this one run's
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); " + (
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, "train_dpo.py", *paths, *flags]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    steps = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    seconds = [row["seconds"] for row in steps if "seconds" in row][1:]
    return median(seconds), int(said.split()[-1]) / 2**20


def main():
    found = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"), "opt", **SHAPE)
        text = " ".join(WORDS * 2)
        rows = [
            {"prompt": f"w{i % 30} {text}", "chosen": f" w1 {text}", "rejected": f" w2 {text}"}
            for i in range(40)
        ]
        write_jsonl(
            Path(folder, "pairs.jsonl"),
            [{**r, "prompt": f"w{i} {r['prompt']}"} for i, r in enumerate(rows)],
        )
        for turn in range(2):
            for precomputed in (True, False):
                flags = FLAGS.split()[: None if precomputed else -1]
                found[precomputed].append(run(folder, f"{turn}{precomputed}", flags))
    print("| reference | seconds a step | peak GiB |\n|---|---|---|")
    for precomputed, name in ((False, "a second model"), (True, "precomputed")):
        seconds, peak = map(median, zip(*found[precomputed]))
        print(f"| {name} | {seconds:.2f} | {peak:.2f} |")
    ratios = [a[0] / b[0] for a, b in zip(found[False], found[True])]
    print("time, second model / precomputed, each turn:", *(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
