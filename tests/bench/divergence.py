"""What DeepSpeed-Chat's faults do to PPO, by number of epochs: switched on one at a time and together
by patching our code from outside.

    python tests/bench/divergence.py output/sft output/rm        # an hour on two cores; resumes
    python tests/bench/divergence.py --table divergence.jsonl

Each cell is one run of train_ppo.py on the embedded world and then, with nothing patched, an
evaluation of the actor it leaves: true reward and KL of samples, true reward of argmaxes.  The guards
that would end a run are off."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from tests.bench import cores  # noqa: E402

RUN = """--lr_scheduler_type linear --num_warmup_steps 10 --per_device_generation_batch_size 64
    --max_prompt_seq_len 32 --max_answer_seq_len 48 --data_split 2,5,3 --print_answers_interval 0
    --log_interval 1000 --actor_lr 3e-4 --critic_lr 1e-3"""
PROMPTS = 256
KEYS = """true_reward true_reward_of_argmax kl first_ratio_error last_first_ratio_error
    largest_first_ratio_error ratio_max clip_frac approx_kl""".split()


def greedy(patch, **_):
    """Rollouts are argmaxes, not samples."""
    patch("generate.draw", lambda logits, *_: logits.argmax(1))


def pads_attended(patch, modules, **_):
    """Rollouts see the padding on the left as text (its tokens, shifted positions); training does not."""
    plain = modules["train_ppo"].sample

    def sample(model, prompts, *rest, **more):
        seen = prompts["prompt_mask"] | True
        return {**plain(model, {**prompts, "prompt_mask": seen}, *rest, **more), **prompts}

    patch("train_ppo.sample", sample)


def eos_suppressed(patch, modules, **_):
    """Rollouts cannot end before the limit; the log-probs do not know that."""
    plain = modules["generate"].draw

    def draw(logits, *rest):
        logits = logits.clone()
        logits[:, 1] = -float("inf")  # the embedded world's <eos>
        return plain(logits, *rest)

    patch("generate.draw", draw)


def first_token_masked(patch, modules, **_):
    """The first token of a prompt (for OPT its bos) is hidden in training, but not in rollouts."""
    plain = modules["models"]._flush_right

    def flush_right(batch):
        seen = batch["prompt_mask"]
        first = (seen.cumsum(1) == 1) & seen
        return plain({**batch, "prompt_mask": seen & ~first})

    patch("models._flush_right", flush_right)


def dropout(patch, modules, **_):
    """Dropout of 0.1 behind attention and MLP of actor and critic, in old and new forwards alike."""
    import torch

    load, state = modules["train_ppo"].load_models, {"on": False}

    def load_models(*args):
        parts = load(*args)
        for trained in parts[:2]:
            for name, module in trained.module.named_modules():
                if name.endswith(("o_proj", "down_proj")):
                    module.register_forward_hook(
                        lambda *seen: torch.nn.functional.dropout(seen[2], 0.1, state["on"])
                    )
        return parts

    patch("train_ppo.load_models", load_models)
    for name in ("policy_logprobs", "state_values"):
        plain = getattr(modules["models"], name)

        def noisy(model, *rest, plain=plain):
            state["on"] = hasattr(model, "module") and hasattr(model, "optimizer")
            try:
                return plain(model, *rest)
            finally:
                state["on"] = False

        patch(f"models.{name}", noisy)


def after_the_end(patch, modules, **_):
    """KL and values behind a response's end flow back through GAE into its tokens."""
    import torch

    shaped, gae = modules["train_ppo"].shaped_rewards, modules["train_ppo"].gae
    kl = modules["train_ppo"].kl_estimate

    def shaped_rewards(score, logp, ref_logp, mask, kl_coef, *rest):
        behind = -kl_coef * kl(logp, ref_logp).masked_fill(mask, 0)
        return shaped(score, logp, ref_logp, mask, kl_coef, *rest) + behind

    patch("train_ppo.shaped_rewards", shaped_rewards)
    patch("train_ppo.gae", lambda r, v, mask, *rest: gae(r, v, torch.ones_like(mask), *rest))


def eos_masked(patch, modules, **_):
    """The end-of-sequence action carries the score, but neither it nor its value is trained."""
    plain = modules["train_ppo"].rollout

    def rollout(*args):
        experience, metrics = plain(*args)
        mask = experience["mask"]
        last = mask.sum(1, keepdim=True) - 1
        trained = mask.scatter(1, last, ~experience["ended"][:, None])
        return {**experience, "mask": trained}, metrics

    patch("train_ppo.rollout", rollout)


def half(patch, modules, one_side=False, **_):
    """Log-probs of the actor, old and new, and the reference's are computed in bfloat16."""
    import torch

    plain = modules["models"].token_logprobs

    def token_logprobs(logits, ids, temperature=1.0):
        if one_side and not torch.is_grad_enabled():
            return plain(logits, ids, temperature)
        narrow = (logits.bfloat16() / temperature).log_softmax(2)
        return narrow.gather(2, ids[..., None])[..., 0].float()

    patch("models.token_logprobs", token_logprobs)


def half_one_side(patch, **modules):
    """Old and reference log-probs in fp32, the new ones in bfloat16."""
    half(patch, one_side=True, **modules)


def not_whitened(patch, modules, **_):
    """Raw advantages."""
    patch("train_ppo.whiten", lambda advantages, mask: advantages)


FAULTS = {
    "none": (),
    "greedy rollouts": (greedy,),
    "dropout": (dropout,),
    "raw advantages": (not_whitened,),
    "eos action masked": (eos_masked,),
    "first token masked in training": (first_token_masked,),
    "KL and values behind the end": (after_the_end,),
    "bf16 log-probs": (half,),
    "bf16 on one side": (half_one_side,),
    "padding attended in rollouts": (pads_attended,),
    "eos suppressed in rollouts": (eos_suppressed,),
}
TODAY = "greedy dropout not_whitened eos_masked first_token_masked half"
FAULTS["all of DeepSpeed-Chat today"] = tuple(globals()[name] for name in TODAY.split())
LEFT_OUT = {
    f"today, but {text}": tuple(
        f for f in FAULTS["all of DeepSpeed-Chat today"] if f is not without
    )
    for text, without in {
        "sampled": greedy,
        "without dropout": dropout,
        "whitened": not_whitened,
        "eos trained": eos_masked,
        "first token seen": first_token_masked,
        "fp32 log-probs": half,
    }.items()
}
FAULTS.update(LEFT_OUT)
THEN = "greedy dropout not_whitened after_the_end pads_attended eos_suppressed half"
FAULTS["all of its April 2023"] = tuple(globals()[name] for name in THEN.split())


def cell(sft, rm, fault, flags, seed, iterations):
    """Train with the fault, in this process, then evaluate without it -> one dict."""
    import torch

    torch.set_num_threads(1)
    import train_ppo
    from rlhf import data, engine, evaluate, generate, models, toy
    from rlhf.args import InputError

    modules = {"train_ppo": train_ppo, "generate": generate, "models": models}
    undo = contextlib.ExitStack()

    def patch(path, value):
        module, name = path.split(".")
        undo.callback(setattr, modules[module], name, getattr(modules[module], name))
        setattr(modules[module], name, value)

    patch("train_ppo.guard", lambda step, metrics, args: metrics)
    for switch_on in FAULTS[fault]:
        switch_on(patch, modules=modules)
    with tempfile.TemporaryDirectory() as out:
        sys.argv = ["train_ppo.py", "--actor_model_name_or_path", sft, "--output_dir", out]
        sys.argv += [
            "--critic_model_name_or_path",
            rm,
            *RUN.split(),
            "--max_steps",
            str(iterations),
        ]
        sys.argv += ["--seed", str(seed), *flags.split()]
        stopped = ""
        try:
            train_ppo.main()
        except InputError as error:
            stopped = str(error)
        undo.close()
        rows = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
        found = {
            "fault": fault,
            "flags": flags,
            "seed": seed,
            "stopped": stopped,
            "steps": len(rows),
        }
        known = lambda name: [row[name] for row in rows if row.get(name) is not None]
        errors = known("first_ratio_error_max")
        found.update(first_ratio_error=errors[0], last_first_ratio_error=errors[-1])
        found["largest_first_ratio_error"] = max(errors)
        found["ratio_max"] = max(known("ratio_max"))
        found["clip_frac"] = max(known("clip_frac"))
        found["approx_kl"] = max(known("approx_kl"))
        found["seconds"] = sum(known("seconds"))
        if not stopped:
            args = train_ppo.parse()
            tokenizer = models.load_tokenizer(sft)
            load = lambda path: engine.frozen(models.load_policy(path, tokenizer))
            base, scorer = load(sft), engine.frozen(models.load_scalar(rm, tokenizer))
            _, held_out = data.load(args, tokenizer, 1)
            prompts = [row for row in held_out if len(row["prompt"]) <= 32][:PROMPTS]
            asked = [tokenizer.decode(row["prompt"], skip_special_tokens=True) for row in prompts]
            args.batch_size = 128

            def judged(policy):
                got = evaluate.respond(policy, base, scorer, tokenizer, prompts, args)
                return mean(toy.judge(*pair)["reward"] for pair in zip(asked, got["text"])), got

            actor = load(f"{out}/actor")
            found["true_reward"], got = judged(actor)
            found["start"], _ = judged(base)
            found.update(kl=got["kl"].mean().item(), score=got["score"].mean().item())
            greedy(patch)  # as the faulty rollouts are drawn, and as a demonstration would be
            found["true_reward_of_argmax"], _ = judged(actor)
            found["start_of_argmax"], _ = judged(base)
            undo.close()
    return found


def table(path, keys=KEYS):
    """A table a metric: a row a fault, a column a setting; the mean over the seeds."""
    rows = [json.loads(line) for line in open(path)]
    settings = list(dict.fromkeys(row["flags"] for row in rows))
    short = lambda flags: flags.removeprefix("--per_device_training_batch_size 64 ").replace(
        "--", ""
    )
    for key in keys:
        print(f"\n**{key}**\n\n| fault | {' | '.join(map(short, settings))} |")
        print("|---" * (len(settings) + 1) + "|")
        for fault in FAULTS:
            same = [[r for r in rows if (r["fault"], r["flags"]) == (fault, s)] for s in settings]
            values = [[r[key] for r in cell if key in r] for cell in same]
            cells = [f"{mean(v):.3g}" if v else "stopped" * bool(c) for v, c in zip(values, same)]
            if any(cells):
                print(f"| {fault} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("models", nargs="*", metavar="SFT RM")
    add(
        "--out",
        default="divergence.jsonl",
        help="one JSON object a cell; those there are not run again",
    )
    usual = [fault for fault in FAULTS if fault not in LEFT_OUT]
    add(
        "--faults",
        nargs="+",
        default=usual,
        choices=FAULTS,
        metavar="FAULT",
        help=", ".join(FAULTS),
    )
    add("--epochs", nargs="+", type=int, default=[1, 2, 4, 8])
    add(
        "--flags",
        nargs="+",
        default=["--per_device_training_batch_size 64"],
        help="of train_ppo.py",
    )
    add("--seeds", nargs="+", type=int, default=[1])
    add("--iterations", type=int, default=25)
    add("--cell", nargs=3, metavar=("FAULT", "FLAGS", "SEED"), help="run one, in this process")
    add("--table", metavar="FILE")
    args = parser.parse_args()
    if args.table:
        return table(args.table)
    if args.cell:
        fault, flags, seed = args.cell
        print("CELL", json.dumps(cell(*args.models, fault, flags, int(seed), args.iterations)))
        return
    done = set()
    if os.path.exists(args.out):
        kept = [json.loads(line) for line in open(args.out)]
        done = {(row["fault"], row["flags"], row["seed"]) for row in kept}
    wanted = [
        (fault, f"{flags} --ppo_epochs {epochs}", seed)
        for seed in args.seeds
        for flags in args.flags
        for epochs in args.epochs
        for fault in args.faults
    ]

    def run(key):
        command = [sys.executable, __file__, *args.models, "--iterations", str(args.iterations)]
        command += ["--cell", *map(str, key)]
        done = cores.run(command, cwd=ROOT)
        lines = [line for line in done.stdout.splitlines() if line.startswith("CELL")]
        if not lines:
            print(f"{key} failed:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
            return
        with open(args.out, "a") as file:
            file.write(lines[0].removeprefix("CELL ") + "\n")
        print(lines[0], flush=True)

    cores.each(run, [key for key in wanted if key not in done])


if __name__ == "__main__":
    main()
