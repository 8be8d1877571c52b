"""Seconds of an optimizer step of SFT, reward model and DPO: the shipped train_step() against TRL's
trainers, in turn, on the same random models and rows (prompts of 96 tokens, responses of 160).

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0         # a scratch environment
    python tests/bench/bench_trl.py --fixture DIR --model opt125 --vs trl/bin/python

DIR is filled where it is empty (see bench_ppo.py).  Prints Markdown rows: TRL's time over ours, the
median of the turns and their range.  Run nothing else meanwhile."""

import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from tests.bench.bench_ppo import common, make, ratio, result, shape  # noqa: E402

METHODS = {"sft": "actor", "rm": "critic_seqcls", "dpo": "actor"}
TITLES = {"sft": "SFT", "rm": "reward model", "dpo": "DPO"}


def parse():
    parser = common(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=5)
    add("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    add("--vs", metavar="PYTHON", help="TRL's; without it, time --side here")
    add("--side", choices=("ours", "trl"), default="ours")
    return parser.parse_args()


def pairs(args):
    """Rows of words, one token each, for every step and one to warm up."""
    rng, words = random.Random(0), shape(args.model)[0]
    text = lambda n: " ".join(f"w{rng.randrange(3, words)}" for _ in range(n))
    count = args.batch * (args.steps + 1)
    return [
        {"prompt": text(96), "chosen": " " + text(160), "rejected": " " + text(160)}
        for _ in range(count)
    ]


def ours(method, args, folder):
    """-> seconds of each step."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import train_dpo
    import train_rm
    import train_sft
    from rlhf import batches, engine, models, render

    script = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo}[method]
    path = f"{args.fixture}/{args.model}/{METHODS[method]}"
    sys.argv = [f"train_{method}.py", "--model_name_or_path", path, "--dtype", args.dtype]
    sys.argv += ["--output_dir", folder, "--per_device_train_batch_size", str(args.batch)]
    sys.argv += ["--lr", "1e-5", "--lr_scheduler_type", "constant"]
    flags = script.parse()
    engine.init(flags)
    tokenizer = models.load_tokenizer(path, flags)
    load = models.load_scalar if method == "rm" else models.load_policy
    model = load(path, tokenizer, args.dtype)
    trained = engine.train_engine(model, flags, "", args.batch, 1000)
    more = ()
    if method == "dpo":
        again = lambda: load(path, tokenizer, args.dtype)
        more = (engine.reference(trained, again, flags, ""), flags)
    if method != "sft":
        trained.eval()
    columns = {
        name: [row[name] for row in pairs(args)] for name in ("prompt", "chosen", "rejected")
    }
    rows = render.tokenise(tokenizer, columns, 512)
    rows = [dict(zip(rows, values)) for values in zip(*rows.values())]
    responses = ("chosen",) if method == "sft" else ("chosen", "rejected")
    seconds = []
    for i in range(0, len(rows), args.batch):
        start = time.perf_counter()
        batch = batches.collate(tokenizer, rows[i : i + args.batch], responses)
        if method == "dpo":
            script.train_step(trained, more[0], [batch], flags)
        else:
            script.train_step(trained, [batch])
        seconds.append(time.perf_counter() - start)
    return seconds


def theirs(method, args, folder):
    """-> seconds of each step, by TRL's trainer."""
    os.environ.update(ACCELERATE_USE_CPU="true", TOKENIZERS_PARALLELISM="false")
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers import AutoTokenizer, TrainerCallback

    path = f"{args.fixture}/{args.model}/{METHODS[method]}"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    kind = AutoModelForSequenceClassification if method == "rm" else AutoModelForCausalLM
    load = lambda: kind.from_pretrained(path, dtype=dtype)
    rows = pairs(args)
    if method == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    names = {"sft": "SFT", "rm": "Reward", "dpo": "DPO"}
    settings = dict(per_device_train_batch_size=args.batch, max_steps=args.steps + 1)
    settings.update(output_dir=folder, learning_rate=1e-5, lr_scheduler_type="constant")
    settings.update(report_to="none", use_cpu=True, bf16=False, save_strategy="no", seed=0)
    settings.update(gradient_checkpointing=False, disable_tqdm=True, logging_steps=1)
    settings.update(max_length=512)
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    more = {"ref_model": load()} if method == "dpo" else {}
    trainer = getattr(trl, f"{names[method]}Trainer")(
        model=load(),
        args=getattr(trl, f"{names[method]}Config")(**settings),
        processing_class=AutoTokenizer.from_pretrained(path),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
        **more,
    )
    trainer.train()
    return seconds


def main():
    args = parse()
    make(args.fixture, args.model)
    if not args.vs:
        [method] = args.methods
        with tempfile.TemporaryDirectory() as folder:
            seconds = {"ours": ours, "trl": theirs}[args.side](method, args, folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print("RESULT", json.dumps({"seconds": median(seconds[1:]), "gib": round(peak, 2)}))
        return
    print(
        "| step | TRL over ours | TRL, s | ours, s | TRL, GiB | ours, GiB |\n|---|---|---|---|---|---|"
    )
    names = ("fixture", "model", "dtype", "batch", "steps")
    same = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    for method in args.methods:
        found = {"trl": [], "ours": []}
        for _ in range(args.turns):
            for side, python in (("trl", args.vs), ("ours", sys.executable)):
                command = [python, __file__, *same, "--methods", method, "--side", side]
                found[side].append(result(command))
        cells = [f"{TITLES[method]}, {args.model} {args.dtype}", ratio(found, "seconds")]
        cells[0] += f" ({args.turns} turns)" * (args.turns != 3)
        cells += [f"{median(row['seconds'] for row in found[side]):.3f}" for side in found]
        cells += [f"{max(row['gib'] for row in found[side]):.2f}" for side in found]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
