"""PPO on real text: a small language model of children's stories learns to write happy ones.

    python tests/bench/stories.py stories260K output/stories

The model's own samples are labelled by a rule (happy words less sad ones), the pairs train a reward
model, and PPO raises its score.  Afterwards, on held-out openings: the rule's and the reward model's
reward, KL, perplexity of the stories under the start model, and stories before and after.  A third
policy learns from the rule itself, by --reward_fn, without a reward model."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
HAPPY = (
    "happy smile smiled smiles laugh laughed love loved fun hug hugged joy glad proud nice friends"
)
SAD = "sad cry cried cries hurt scared afraid angry mad lost sorry bad mean broke pain worried"
PARTS = ("prompt_ids", "prompt_mask", "response_ids", "mask")
OPENING, STORY, ROWS = 24, 48, 4000
SHARED = f"--max_prompt_seq_len {OPENING} --max_answer_seq_len {STORY} --eval_fraction 0.1"
RM = """--learning_rate 1e-3 --num_warmup_steps 20 --per_device_train_batch_size 32 --max_steps 250
    --data_split 0,1,0 --eval_interval 1000 --log_interval 50 --max_seq_len 128 --eval_fraction 0.1"""
PPO = """--actor_lr 3e-4 --critic_lr 1e-3 --lr_scheduler_type linear --num_warmup_steps 5 --max_steps 100
    --per_device_generation_batch_size 64 --per_device_training_batch_size 64 --data_split 0,0,1
    --kl_coef 0.05 --print_answers_interval 0"""


def rule(text):
    """Happy words less sad ones."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum((word in HAPPY.split()) - (word in SAD.split()) for word in words)


def reward(prompts, responses, rows):
    """The rule as --reward_fn."""
    return [rule(response) for response in responses]


def train(script, out, *flags):
    command = [sys.executable, script, "--output_dir", out, *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main():
    start, out = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).absolute()
    import torch

    from rlhf import batches, engine, evaluate, generate, models

    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(start)
    policy = engine.frozen(models.load_policy(start, tokenizer))

    def draw(prompts, tokens, model=policy):
        """Lists of ids -> one batch of continuations."""
        parts = []
        for i in range(0, len(prompts), 250):
            rows = [{"prompt": prompt} for prompt in prompts[i : i + 250]]
            batch = batches.collate(tokenizer, rows, responses=())
            parts.append(generate.sample(model, batch, tokens))
        return models.stack(parts, tokenizer.pad_token_id)

    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)

    def texts(batch):
        """Responses with the space before them, which a tokenizer drops at the start of a text."""
        found = []
        for prompt, seen, ids, mask in zip(*(batch[n] for n in PARTS)):
            start = decode(prompt[seen])
            found.append(decode([*prompt[seen], *ids[mask]])[len(start) :])
        return found

    data = out / "pairs"
    if not (data / "train.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        openings = draw([[tokenizer.bos_token_id]] * ROWS, OPENING - 4)
        kept = openings["mask"].all(1).nonzero()[:, 0].tolist()
        prompts = [tokenizer.decode(openings["response_ids"][i]).strip() for i in kept]
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        pairs = []
        both = [texts(draw(ids, STORY)) for _ in range(2)]
        for prompt, first, second in zip(prompts, *both):
            if rule(first) != rule(second):
                better, worse = sorted((first, second), key=rule, reverse=True)
                pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
        random.Random(0).shuffle(pairs)
        with open(data / "train.jsonl", "w") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        print(f"{len(pairs)} pairs of {len(prompts)} openings")
    if not (out / "rm" / "config.json").exists():
        train(
            "train_rm.py",
            out / "rm",
            "--model_name_or_path",
            start,
            "--data_path",
            data,
            *RM.split(),
        )
    last = [json.loads(line) for line in open(out / "rm" / "metrics.jsonl") if "eval_acc" in line][
        -1
    ]
    print(f"reward model: {last['eval_accuracy']:.1%} of held-out pairs")
    if not (out / "ppo" / "actor" / "config.json").exists():
        train("train_ppo.py", out / "ppo", "--actor_model_name_or_path", start, "--data_path", data,
              "--critic_model_name_or_path", out / "rm", *PPO.split(), *SHARED.split())  # fmt: skip
    if not (out / "direct" / "actor" / "config.json").exists():
        train("train_ppo.py", out / "direct", "--actor_model_name_or_path", start, "--data_path", data,
              "--reward_fn", f"{__file__}:reward", *PPO.split(), *SHARED.split())  # fmt: skip
    scorer = engine.frozen(models.load_scalar(f"{out}/rm", tokenizer))
    torch.manual_seed(1)
    openings = draw([[tokenizer.bos_token_id]] * 512, OPENING - 4)
    whole = openings["response_ids"][openings["mask"].all(1)].tolist()  # none that ended already
    prompts = [[tokenizer.bos_token_id, *ids] for ids in whole]
    print(
        "\n| model | rule | score | KL | perplexity under the start model |\n|---|---|---|---|---|"
    )
    shown = {}
    for name, path in (
        ("start", start),
        ("PPO", f"{out}/ppo/actor"),
        ("PPO on the rule", f"{out}/direct/actor"),
    ):
        model = engine.frozen(models.load_policy(path, tokenizer))
        torch.manual_seed(2)
        batch = draw(prompts, STORY, model)
        stories = texts(batch)
        shown[name] = stories
        with torch.no_grad():
            ratio = evaluate.log_ratios(model, policy, batch).sum(1)
            logp = models.policy_logprobs(policy, batch).masked_fill(~batch["mask"], 0)
            score = models.sequence_scores(scorer, batch)
        cells = [evaluate.mean_ci("x", [rule(story) for story in stories])]
        cells += [evaluate.mean_ci("x", score), evaluate.mean_ci("x", ratio)]
        cells = [f"{cell['x']:.2f} ± {cell['x_ci']:.2f}" for cell in cells]
        perplexity = math.exp(-(logp.sum() / batch["mask"].sum()).item())
        print(f"| {name} | {' | '.join(cells)} | {perplexity:.2f} |")
    for i in range(3):
        opening = tokenizer.decode(prompts[i], skip_special_tokens=True)
        print(f"\n**{opening}**\n")
        for name, stories in shown.items():
            print(f"- {name}: {stories[i]}")


if __name__ == "__main__":
    main()
