"""Does TRL's last public PPO trainer learn faster than train_ppo.py?  Same models, prompts, number of
episodes, learning rates and coefficients on the embedded world; true reward of the rollouts against
episodes.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.12.0     # a scratch environment
    python tests/bench/learn_vs_trl.py output trl/bin/python --seeds 1 2    # output: of run_all.sh

Both: 64 episodes an iteration, one pass, KL 0.1 (k1), clip 0.2, gamma 1, lambda 0.95, AdamW at 3e-4
with a linear schedule, fp32.  TRL has one rate for actor and critic; --vf is its vf_coef."""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = 64


def theirs(job):
    """In TRL's environment: train, record every rollout's texts."""
    os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", ACCELERATE_USE_CPU="true")
    import torch

    torch.set_num_threads(1)
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    run = job["run"]
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/sft", padding_side="left")
    scalar = lambda: AutoModelForSequenceClassification.from_pretrained(f"{run}/rm", num_labels=1)
    policy = lambda: AutoModelForCausalLM.from_pretrained(f"{run}/sft")
    config = PPOConfig(
        output_dir=job["out"],
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        response_length=48,
        temperature=1.0,
        local_rollout_forward_batch_size=ROWS,
        total_episodes=ROWS * job["iterations"],
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        num_sample_generations=0,
        stop_token="eos",
        learning_rate=job["lr"],
        lr_scheduler_type="linear",
        warmup_steps=10,
        kl_coef=0.1,
        vf_coef=job["vf"],
        adam_beta2=0.95,
        eval_strategy="no",
        seed=job["seed"],
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"input_ids": job["prompts"]})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=data,
        eval_dataset=data.select(range(ROWS)),
    )
    texts, generate = [], module.batch_generation

    def recorded(model, queries, *rest):
        found = generate(model, queries, *rest)
        width = queries.shape[1]
        decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        responses = []
        for ids in found[0][:, width:].tolist():
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            responses.append(decode(ids[:end]))
        texts.append(
            [[decode(q[q != tokenizer.pad_token_id]), r] for q, r in zip(queries, responses)]
        )
        return found

    module.batch_generation = recorded
    trainer.train()
    json.dump(texts, open(f"{job['out']}/texts.json", "w"))
    trainer.model.policy.save_pretrained(f"{job['out']}/actor")
    tokenizer.save_pretrained(f"{job['out']}/actor")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("run")
    add("python", help="of an environment that has TRL")
    add("--seeds", nargs="+", type=int, default=[1])
    add("--iterations", type=int, default=150)
    add("--lr", type=float, default=3e-4)
    add("--vf", type=float, default=0.1)
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return theirs(json.load(open(args.job)))
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"
    from rlhf import models, toy
    from tests.bench import quality

    run = os.path.abspath(args.run)
    tokenizer = models.load_tokenizer(f"{run}/sft")
    work = tempfile.mkdtemp()
    prompts = quality.fresh_prompts(run, work)
    asked = [json.loads(line)["prompt"] for line in open(prompts / "train.jsonl")]
    judge = lambda rows: mean(toy.judge(prompt, text)["reward"] for prompt, text in rows)
    curves = {"ours": [], "TRL": []}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            job = {"run": run, "out": folder, "seed": seed, "iterations": args.iterations}
            job.update(
                lr=args.lr,
                vf=args.vf,
                prompts=tokenizer(random.Random(seed).sample(asked, len(asked)))["input_ids"],
            )
            json.dump(job, open(f"{folder}/job.json", "w"))
            command = [args.python, __file__, run, args.python, "--job", f"{folder}/job.json"]
            subprocess.run(command, check=True, capture_output=True)
            texts = json.load(open(f"{folder}/texts.json"))
            curves["TRL"].append([judge(rows) for rows in texts])
            extra = ["--max_steps", args.iterations, "--critic_lr", args.lr, "--actor_lr", args.lr]
            out = f"{folder}/ours"
            extra += ["--data_path", prompts, "--data_split", "0,0,1"]
            same = ["--seed", seed, "--print_answers_interval", 1, *extra]
            quality.command("train_ppo.py", "--actor_model_name_or_path", f"{run}/sft", "--output_dir", out,
                            "--critic_model_name_or_path", f"{run}/rm", *quality.PPO.split(), *same)  # fmt: skip
            samples = {}
            for line in open(f"{out}/samples.jsonl"):
                row = json.loads(line)
                answer = row["response"].replace("<eos>", "")
                samples.setdefault(row["step"], []).append((row["prompt"], answer))
            curves["ours"].append([judge(rows) for rows in samples.values()])
        print(
            {name: [round(x, 2) for x in found[-1][::10]] for name, found in curves.items()},
            flush=True,
        )
    print("\n| episodes | ours | TRL |\n|---|---|---|")
    for start in range(0, args.iterations, 15):
        cells = [
            mean(x for curve in curves[name] for x in curve[start : start + 15]) for name in curves
        ]
        print(f"| {start * ROWS} to {(start + 15) * ROWS} | {cells[0]:.2f} | {cells[1]:.2f} |")


if __name__ == "__main__":
    main()
