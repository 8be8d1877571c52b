"""A thousand PPO steps of the embedded world, with checkpoints: are memory, file handles and the time
of a step flat?

    python tests/bench/soak.py output/sft output/rm

A row every hundred steps: resident memory, open files, median seconds of those steps."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = """--num_train_epochs 3 --max_steps 1000 --enable_ema --save_interval 100 --log_interval 100
    --per_device_generation_batch_size 16 --per_device_training_batch_size 16 --data_split 2,5,3
    --max_prompt_seq_len 32 --max_answer_seq_len 48 --actor_lr 3e-5 --critic_lr 3e-4"""


def main():
    sft, rm = sys.argv[1:]
    with tempfile.TemporaryDirectory() as out:
        models = ["--actor_model_name_or_path", sft, "--critic_model_name_or_path", rm]
        command = [sys.executable, "train_ppo.py", *models, *FLAGS.split(), "--output_dir", out]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        metrics, seconds, memory = Path(out, "metrics.jsonl"), [], {}
        print("| step | MiB | open files | seconds a step |\n|---|---|---|---|")
        while run.poll() is None:
            time.sleep(0.05)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            for line in lines[len(seconds) :]:
                seconds.append(json.loads(line)["seconds"])
                if len(seconds) % 100 == 0:
                    status = Path(f"/proc/{run.pid}/status").read_text()
                    mib = int(status.partition("VmRSS:")[2].split()[0]) / 1024
                    memory[len(seconds)] = mib
                    files = len(os.listdir(f"/proc/{run.pid}/fd"))
                    print(
                        f"| {len(seconds)} | {mib:.0f} | {files} | {median(seconds[-100:]):.3f} |"
                    )
                    sys.stdout.flush()
    growth = memory[1000] / memory[100] - 1
    print(f"\nmemory at step 1,000 against step 100: {growth:+.1%}")
    return run.returncode or abs(growth) > 0.03


if __name__ == "__main__":
    sys.exit(main())
