"""Learning quality on the embedded world, where the true reward is known.

    python tests/bench/quality.py all output --out quality.jsonl       # output: of run_all.sh; resumes
    python tests/bench/quality.py tables --out quality.jsonl           # the tables of docs/quality.md
    python tests/bench/quality.py plot --out quality.jsonl             # docs/quality.png

reward    held-out accuracy of the reward model against its ceiling as the number of pairs grows
frontier  PPO at several KL coefficients against best-of-n
weak      PPO against a reward model of few pairs: where does true reward fall while its score rises?
objective E[r] - beta KL that PPO attains against the exact optimum beta log E_ref[exp(r / beta)]
text      the unsupervised mix on and off: perplexity of held-out text

Every run is train_rm.py or train_ppo.py as shipped, one thread each, as many at once as there are
cores; a row of the output is one run."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from tests.bench import cores  # noqa: E402

RM = """--data_split 2,5,3 --learning_rate 3e-4 --num_warmup_steps 20 --per_device_train_batch_size 8
    --per_device_eval_batch_size 64 --log_interval 1000000 --eval_interval 1000000"""
PPO = """--data_split 2,5,3 --lr_scheduler_type linear --num_warmup_steps 10 --actor_lr 3e-4
    --critic_lr 1e-3 --per_device_generation_batch_size 64 --per_device_training_batch_size 64
    --max_prompt_seq_len 32 --max_answer_seq_len 48 --log_interval 1000000"""
PAIRS = (100, 300, 1000, 3000, 10000)
SEEDS = (1, 2, 3, 4, 5)
COEFFICIENTS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BETAS = (0.5, 1.0, 2.0)
SIZES = [2**k for k in range(9)]  # n of best-of-n


def command(*words):
    """Run a script of ours with one thread; its failure ends this one."""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")


def metrics(folder):
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def reward(run, work, pairs, seed):
    """The reward model of so many pairs, two epochs of them (at least 100 steps)."""
    out = f"{work}/rm-{pairs}-{seed}"
    steps = ["--max_steps", max(100, pairs // 4)]
    if not Path(out, "config.json").exists():
        pairs_file = few(work, pairs, seed)
        command("train_rm.py", "--model_name_or_path", f"{run}/sft", "--output_dir", out, *RM.split(),
                "--data_path", pairs_file, "--data_split", "0,1,0", "--seed", seed, *steps)  # fmt: skip
    last = [row for row in metrics(out) if "eval_accuracy" in row][-1]
    known = [json.loads(line)["bayes"] for line in open(few(work, pairs, seed) / "test.jsonl")]
    ceiling = mean(max(p, 1 - p) for p in known)  # only --data_path toy would report it
    return {"accuracy": last["eval_accuracy"], "ceiling": ceiling}


def few(work, pairs, seed):
    """A folder with so many of the world's training pairs, and its held-out ones."""
    from rlhf import toy

    folder = Path(work, f"pairs-{pairs}-{seed}")
    if not Path(folder, "test.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        train, test = toy.rows(seed=seed)
        for name, rows in (("train", train[:pairs]), ("test", test)):
            with open(folder / f"{name}.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def fresh_prompts(run, work):
    """A folder with the prompts of step 3 of the run, which its SFT and reward model never saw: with
    another --seed, train_ppo.py would split the data otherwise."""
    folder = Path(work, "prompts")
    if not Path(folder, "train.jsonl").exists():
        import train_ppo
        from rlhf import data, models

        args = json.load(open(f"{run}/sft/args.json"))
        sys.argv = [
            "train_ppo.py",
            *PPO.split(),
            "--seed",
            str(args["seed"]),
            "--output_dir",
            str(work),
        ]
        tokenizer = models.load_tokenizer(f"{run}/sft")
        rows, _ = data.load(train_ppo.parse(), tokenizer, 3, 32)
        texts = [json.dumps({"prompt": tokenizer.decode(ids)}) + "\n" for ids in rows["prompt"]]
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, "test.jsonl").write_text("".join(texts[:8]))
        Path(folder, "train.jsonl").write_text("".join(texts[8:]))
    return folder


def ppo(run, out, seed, flags, reward_model=None):
    """-> the trained actor, every fifth iteration's samples."""
    prompts = ["--data_path", fresh_prompts(run, Path(out).parent), "--data_split", "0,0,1"]
    if not Path(out, "actor", "config.json").exists():
        command("train_ppo.py", "--actor_model_name_or_path", f"{run}/sft", "--output_dir", out,
                "--critic_model_name_or_path", reward_model or f"{run}/rm", *PPO.split(), "--seed",
                seed, "--print_answers_interval", 5, *prompts, *flags)  # fmt: skip
    return f"{out}/actor"


def frontier(run, work, coefficient, seed):
    actor = ppo(run, f"{work}/ppo-{coefficient}-{seed}", seed, ["--kl_coef", coefficient])
    return evaluated(run, work, actor, seed)


def evaluated(run, work, actor, seed, *flags):
    """True reward, score and KL of an actor on 512 held-out prompts, against the SFT model."""
    out = f"{actor}-evaluation"
    command("-m", "rlhf.evaluate", "--models", f"sft={run}/sft", f"ppo={actor}", "--reward_model",
            f"{run}/rm", "--output_dir", out, "--max_prompt_seq_len", 32, "--max_answer_seq_len", 48,
            "--batch_size", 512, "--data_split", "2,5,3", "--seed", seed, *flags)  # fmt: skip
    found = json.load(open(f"{out}/evaluation.json"))["models"]
    keys = ("true_reward", "true_reward_ci", "score", "kl", "kl_ci")
    return {key: found["ppo"][key] for key in keys}


def best_of(run, work, _, seed):
    """Best-of-n of the SFT model for n = 1..256, by the same reward model."""
    out = f"{work}/best-{seed}"
    if not Path(out, "evaluation.json").exists():
        command("-m", "rlhf.evaluate", "--models", f"sft={run}/sft", "--reward_model", f"{run}/rm",
                "--output_dir", out, "--max_prompt_seq_len", 32, "--max_answer_seq_len", 48,
                "--batch_size", 512, "--data_split", "2,5,3", "--seed", seed, "--best_of", *SIZES)  # fmt: skip
    found = json.load(open(f"{out}/evaluation.json"))["models"]
    keys = ("kl", "true_reward", "score")
    return {f"{n} {key}": found[f"sft, best of {n}"][key] for n in SIZES for key in keys}


def weak(run, work, pairs, seed):
    """PPO for three epochs, at a low price of the KL, against the reward model of few pairs."""
    from rlhf import toy

    reward(run, work, pairs, seed)
    out = f"{work}/weak-{pairs}-{seed}"
    flags = ["--kl_coef", 0.01, "--num_train_epochs", 3]
    ppo(run, out, seed, flags, f"{work}/rm-{pairs}-{seed}")
    curve = {}
    for line in open(f"{out}/samples.jsonl"):
        row = json.loads(line)
        judged = toy.judge(row["prompt"], row["response"].replace("<eos>", ""))["reward"]
        curve.setdefault(row["step"], []).append((row["score"], judged, row["kl"]))
    return {"curve": [[step, *map(mean, zip(*rows))] for step, rows in curve.items()]}


def objective(run, work, beta, seed, prompts=64, samples=1024):
    """beta log E_ref[exp(r / beta)] a prompt, from samples of the reference, and what PPO attains."""
    out = f"{work}/ppo-{beta}-{seed}"
    ppo(run, out, seed, ["--kl_coef", beta])
    import torch

    torch.set_num_threads(1)
    import train_ppo
    from rlhf import data, engine, evaluate, models

    sys.argv = ["train_ppo.py", *PPO.split(), "--output_dir", f"{work}/none"]
    args = train_ppo.parse()
    args.batch_size, args.seed = 512, seed
    tokenizer = models.load_tokenizer(f"{run}/sft")
    load = lambda path: engine.frozen(models.load_policy(path, tokenizer))
    reference, actor = load(f"{run}/sft"), load(f"{out}/actor")
    scorer = engine.frozen(models.load_scalar(f"{run}/rm", tokenizer))
    _, held_out = data.load(args, tokenizer, 1)
    rows = [row for row in held_out if len(row["prompt"]) <= 32][:prompts]

    def draw(policy, n):
        repeated = [row for row in rows for _ in range(n)]
        got = evaluate.respond(policy, reference, scorer, tokenizer, repeated, args)
        clip = args.clip_reward
        return got["score"].double().clamp(-clip, clip).view(len(rows), n), got["kl"].view(-1, n)

    reward_of, _ = draw(reference, samples)
    weights = (reward_of / beta).softmax(1)
    size = 1 / weights.square().sum(1)
    best = beta * (torch.logsumexp(reward_of / beta, 1) - math.log(samples))
    gained, kl = draw(actor, samples // 8)
    start, optimum = reward_of.mean().item(), best.mean().item()
    attained = (gained - beta * kl).mean().item()
    share = (attained - start) / (optimum - start)
    return {"reference": start, "optimum": optimum, "attained": attained, "share": share,
            "kl": kl.mean().item(), "effective_samples": size.median().item(),
            "effective_samples_min": size.min().item()}  # fmt: skip


def text(run, work, coefficient, seed):
    """PPO with the mix at this coefficient: perplexity of texts it has not seen."""
    import torch

    flags = (
        ["--unsup_coef", coefficient, "--unsupervised_dataset_name", "toy"] if coefficient else []
    )
    actor = ppo(run, f"{work}/text-{coefficient}-{seed}", seed, flags)
    from rlhf import engine, evaluate, models, toy
    from rlhf.batches import collate

    tokenizer = models.load_tokenizer(f"{run}/sft")
    unseen = [tokenizer(t)["input_ids"] for t in toy.texts(seed=10**6, n=256)]
    rows = [{"prompt": ids[:1], "chosen": ids[1:]} for ids in unseen]
    found = {}
    with torch.no_grad():
        for name, path in (("before", f"{run}/sft"), ("after", actor)):
            policy = engine.frozen(models.load_policy(path, tokenizer))
            pad = lambda rows: collate(tokenizer, rows)
            found[f"perplexity_{name}"] = evaluate.perplexity(policy, rows, pad, 128)
    return {**found, **evaluated(run, work, actor, seed)}


STUDIES = {
    "reward": (reward, PAIRS),
    "best_of": (best_of, (0,)),
    "frontier": (frontier, COEFFICIENTS),
    "weak": (weak, (100, 300)),
    "objective": (objective, BETAS),
    "text": (text, (0.0, 1.0)),
}


def ci(values):
    """mean ± half of the 95 % interval (Student's t)."""
    if len(values) < 2:
        return f"{mean(values):.3f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.6)
    half = f" ± {t * stdev(values) / len(values) ** 0.5:.3f}"
    return f"{mean(values):.3f}{half}"


def smooth(curve, width=10):
    """Means of so many points each: a maximum over single rollouts would be one over their noise."""
    parts = [curve[i : i + width] for i in range(0, len(curve) - width + 1, width)]
    return [[mean(values) for values in zip(*part)] for part in parts]


def best_of_at(kl, row):
    """True reward that best-of-n has at this KL, between the n that were drawn."""
    points = [(row[f"{n} kl"], row[f"{n} true_reward"]) for n in SIZES]
    for (a, before), (b, after) in zip(points, points[1:]):
        if a <= kl <= b:
            return before + (after - before) * (kl - a) / (b - a)
    return float("nan")


def tables(rows):
    """Markdown: of every study but weak, a row a setting, the mean over seeds and its interval."""
    drawn = {row["seed"]: row for row in rows if row["study"] == "best_of"}
    for row in rows:
        if row["study"] == "frontier" and drawn:
            same = drawn.get(row["seed"], next(iter(drawn.values())))
            row["less best of n's at this KL"] = row["true_reward"] - best_of_at(row["kl"], same)
    for study, (_, settings) in STUDIES.items():
        mine = [row for row in rows if row["study"] == study]
        if not mine or study in ("weak", "best_of"):
            continue
        names = [
            n for n in mine[0] if n not in ("study", "setting", "seed") and not n.endswith("_ci")
        ]
        print(f"\n**{study}**\n\n| setting | seeds | {' | '.join(names)} |")
        print("|---" * (len(names) + 2) + "|")
        for setting in settings:
            same = [row for row in mine if row["setting"] == setting]
            if same:
                cells = [ci([row[name] for row in same]) for name in names]
                print(f"| {setting} | {len(same)} | {' | '.join(cells)} |")
    best = [row for row in rows if row["study"] == "best_of"]
    if best:
        print("\n**best of n**\n\n| n | KL | true reward | score |\n|---|---|---|---|")
        for n in SIZES:
            cells = [ci([row[f"{n} {key}"] for row in best]) for key in ("true_reward", "score")]
            print(f"| {n} | {best[0][f'{n} kl']:.3f} | {' | '.join(cells)} |")
    weak_rows = [row for row in rows if row["study"] == "weak"]
    curves = sorted(weak_rows, key=lambda row: (row["setting"], row["seed"]))
    if curves:
        print("\n**weak** (means of ten rollouts: true reward at score and KL)\n\n| pairs | seed | at its "
              "best | at the end |\n|---|---|---|---|")  # fmt: skip
    for row in curves:
        points = smooth(row["curve"])
        cells = [
            f"{true:.2f} at {score:.2f}, {kl:.1f}"
            for _, score, true, kl in (max(points, key=lambda point: point[2]), points[-1])
        ]
        print(f"| {row['setting']} | {row['seed']} | {' | '.join(cells)} |")


def plot(rows, path):
    """Three panels: accuracy against pairs; true reward against KL; over-optimisation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.3), constrained_layout=True)
    of = lambda study: [row for row in rows if row["study"] == study]
    for setting in PAIRS:
        values = [row["accuracy"] for row in of("reward") if row["setting"] == setting]
        left.scatter([setting] * len(values), values, color="C0", s=14)
    ceilings = [row["ceiling"] for row in of("reward")]
    if ceilings:
        left.axhline(
            mean(ceilings), color="black", linestyle="--", linewidth=0.8, label="best possible"
        )
        left.set(xscale="log", xlabel="pairs", ylabel="held-out accuracy", title="reward model")
        left.legend()
    for i, row in enumerate(of("best_of")):
        xs, ys = ([row[f"{n} {key}"] for n in SIZES] for key in ("kl", "true_reward"))
        middle.plot(
            xs, ys, "s-", color="C1", markersize=3, linewidth=0.8, label="" if i else "best of n"
        )
    for i, row in enumerate(of("frontier")):
        middle.scatter(row["kl"], row["true_reward"], color="C0", s=16, label="" if i else "PPO")
    middle.set(xlabel="KL to the SFT model (nats a response)", ylabel="true reward")
    middle.set(title="PPO at several --kl_coef, best of 1 to 256")
    middle.legend()
    shown = set()
    for row in of("weak"):
        _, score, true, kl = zip(*smooth(row["curve"]))
        color, new = {100: "C2", 300: "C3"}[row["setting"]], row["setting"] not in shown
        shown.add(row["setting"])
        label = f"{row['setting']:.0f} pairs" if new else ""
        right.plot(kl, true, color=color, linewidth=1.2, label=label)
        right.plot(kl, score, "--", color=color, linewidth=0.7)
    right.set(xlabel="KL", ylabel="true reward (dashed: the score it is trained on)")
    right.set(title="PPO on reward models of few pairs")
    right.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("study", choices=[*STUDIES, "all", "tables", "plot"])
    add("run", nargs="?", default="output", help="the output folder of run_all.sh")
    add("--out", default="quality.jsonl")
    add(
        "--work",
        default="output/quality",
        help="takes the runs; a run that is there is not repeated",
    )
    add("--settings", nargs="+", type=float, help="only these")
    add("--seeds", nargs="+", type=int, default=SEEDS)
    add("--picture", default="docs/quality.png")
    add("--one", action="store_true", help="run the one setting and seed in this process")
    args = parser.parse_args()
    rows = [json.loads(line) for line in open(args.out)] if os.path.exists(args.out) else []
    if args.study == "tables":
        return tables(rows)
    if args.study == "plot":
        return plot(rows, args.picture)
    run, work = os.path.abspath(args.run), os.path.abspath(args.work)
    if args.one:
        study, settings = STUDIES[args.study]
        [setting] = [s for s in settings if s == args.settings[0]]
        found = study(run, work, setting, args.seeds[0])
        row = {"study": args.study, "setting": setting, "seed": args.seeds[0], **found}
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        return print({key: value for key, value in row.items() if key != "curve"})
    done = {(row["study"], row["setting"], row["seed"]) for row in rows}
    wanted = [
        (study, setting, seed)
        for seed in args.seeds
        for study, (_, settings) in STUDIES.items()
        if args.study in (study, "all")
        for setting in settings
        if not args.settings or setting in args.settings
        if (study, setting, seed) not in done
    ]

    if wanted:
        fresh_prompts(run, work)  # here, lest two runs make it at once

    def start(key):
        study, setting, seed = map(str, key)
        words = [
            study,
            run,
            "--out",
            args.out,
            "--work",
            work,
            "--settings",
            setting,
            "--seeds",
            seed,
        ]
        done = cores.run([sys.executable, __file__, *words, "--one"])
        print(done.stdout.strip().splitlines()[-1:] or done.stderr[-2000:], flush=True)

    cores.each(start, wanted)


if __name__ == "__main__":
    main()
