"""Seconds of a PPO iteration, by phase: the shipped rollout() and ppo_update() on random models, and
TRL's last public PPO trainer on the same work.

    python tests/bench/bench_ppo.py --fixture DIR --model opt125 --dtype fp32
    python tests/bench/bench_ppo.py --fixture DIR --model opt125 --vs TRL_PYTHON TRL_DRIVER

DIR/MODEL holds an actor, a scalar model critic_seqcls and prompts.json, lists of ids; it is made where
it is missing.  Prints one JSON row, medians over the iterations.  --vs runs TRL_DRIVER (with the same flags) in turn with ours
and prints the median of TRL's time over ours, and its range.  Run nothing else meanwhile."""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
SHAPES = {  # vocabulary; width, layers, heads of the actor, and of critic and reward model
    "tiny": (8192, (256, 4, 4), (256, 2, 4)),
    "opt125": (50272, (768, 12, 12), (768, 4, 12)),
    "opt1.3b": (50272, (2048, 24, 32), (1024, 24, 16)),
}
PHASES = {"gen": "generation", "exp": "scoring", "train": "update", "total": "iteration"}


def shape(name):
    """tiny, opt125, opt1.3b or v<N>w<N>l<N> -> as in SHAPES."""
    if name in SHAPES:
        return SHAPES[name]
    if not (found := re.fullmatch(r"v(\d+)w(\d+)l(\d+)", name)):
        raise ValueError(name)
    vocabulary, width, layers = map(int, found.groups())
    return vocabulary, (width, layers, width // 64), (width, layers // 2, width // 64)


def model(name):
    """A model's name, as a flag."""
    return shape(name) and name


def common(doc):
    """A parser of what all benchmarks against TRL share."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    add = parser.add_argument
    add("--fixture", required=True)
    add("--model", type=model, default="tiny", help="tiny, opt125, opt1.3b or, say, v8192w256l4")
    add("--dtype", default="fp32", choices=("fp32", "bf16"))
    add("--batch", type=int, default=4)
    add("--turns", type=int, default=3)
    return parser


def result(command):
    """The JSON row that a benchmark's process prints; its failure ends this one."""
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not rows:
        sys.exit(f"{command} failed:\n{done.stderr[-2000:]}")
    return json.loads(rows[0].removeprefix("RESULT"))


def ratio(found, name):
    """TRL's over ours, turn by turn: the median and the range."""
    ratios = sorted(a[name] / b[name] for a, b in zip(found["trl"], found["ours"]))
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def parse():
    parser = common(__doc__)
    add = parser.add_argument
    add("--iters", type=int, default=4)
    add("--warm", type=int, default=1)
    add("--varlen", action="store_true", help="responses end after 16 to 128 tokens, not at 128")
    add("--response", type=int, default=128)
    add("--extra", default="", help="more flags of train_ppo.py")
    add("--vs", nargs=2, metavar=("PYTHON", "DRIVER"))
    args = parser.parse_args()
    if args.vs and (args.extra or args.response != 128):
        parser.error("--vs compares at 128 new tokens, without --extra")
    return args


def make(fixture, name):
    """Random OPT models, a tokenizer of one word a token, 256 prompts of 8 to 128 tokens, unless
    they are there."""
    folder = f"{fixture}/{name}"
    if os.path.exists(folder):
        return
    vocabulary, *shapes = shape(name)
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    kinds = {"actor": OPTForCausalLM, "critic_seqcls": OPTForSequenceClassification}
    config = dict(vocab_size=vocabulary, max_position_embeddings=2048, dropout=0.0, num_labels=1)
    config.update(pad_token_id=0, bos_token_id=1, eos_token_id=1)
    for (name, kind), (width, layers, heads) in zip(kinds.items(), shapes):
        config.update(hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width)
        config.update(num_hidden_layers=layers, num_attention_heads=heads)
        kind(OPTConfig(**config)).save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")
    rng = random.Random(0)
    draw = lambda: [rng.randrange(2, vocabulary) for _ in range(rng.randint(8, 128))]
    with open(f"{folder}/prompts.json", "w") as file:
        json.dump([draw() for _ in range(256)], file)


def started(folder, dtype, batch, prompt, response, more):
    """Step 3's flags, its tokenizer, and actor, reference, critic and reward model, as shipped."""
    import train_ppo
    from rlhf import engine, models

    actor, critic, rows = f"{folder}/actor", f"{folder}/critic_seqcls", str(batch)
    sys.argv = ["train_ppo.py", "--actor_model_name_or_path", actor, "--dtype", dtype]
    sys.argv += ["--critic_model_name_or_path", critic, "--output_dir", tempfile.mkdtemp()]
    sys.argv += ["--actor_lr", "1e-5", "--per_device_generation_batch_size", rows]
    sys.argv += ["--per_device_training_batch_size", rows, "--max_prompt_seq_len", str(prompt)]
    sys.argv += ["--max_answer_seq_len", str(response), *more]
    flags = train_ppo.parse()
    engine.init(flags)
    tokenizer = models.load_tokenizer(actor, flags)
    actor, critic, reference, reward = train_ppo.load_models(flags, tokenizer, 1000)
    return flags, tokenizer, (actor, reference, critic, reward)


def ours(args):
    """One JSON row in this process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    import train_ppo
    from rlhf import batches, engine, generate

    folder, more = f"{args.fixture}/{args.model}", args.extra.split()
    flags, tokenizer, engines = started(folder, args.dtype, args.batch, 128, args.response, more)
    actor, _, value, _ = engines
    rng, draw = random.Random(7), getattr(generate, "draw", None)
    eos = tokenizer.eos_token_id
    state = {}

    def drawn(logits, uniform, *rest):
        """generate.draw, but no response ends before its length, and there it does."""
        if state["t"] == 0:
            state["ends"] = torch.tensor(
                [rng.randint(min(16, args.response), args.response) for _ in logits]
            )
        logits, ends = logits.clone(), state["ends"]
        logits[:, eos] = -1e9
        over = ends <= state["t"]
        logits[over] = -1e9
        logits[over, eos] = 0
        state["t"], state["ends"] = state["t"] + 1, ends[~over]
        return draw(logits, uniform, *rest)

    if args.varlen:
        generate.draw = drawn
    prompts = json.load(open(f"{folder}/prompts.json"))
    rows = []
    for i in range(args.warm + args.iters):
        chosen = prompts[i * args.batch : (i + 1) * args.batch]
        batch = batches.collate(tokenizer, [{"prompt": p} for p in chosen], responses=())
        start, state["t"] = time.perf_counter(), 0
        experience, metrics = train_ppo.rollout(*engines, [batch], tokenizer, flags)
        sampled = time.perf_counter()
        train_ppo.ppo_update(actor, value, experience, flags)
        end = time.perf_counter()
        new, real = int(experience["mask"].sum()), int(experience["prompt_mask"].sum())
        generation = metrics["seconds_generate"]
        row = {"gen": generation, "exp": sampled - start - generation, "train": end - sampled}
        rows.append({**row, "total": end - start, "new": new, "real": new + real})
    middle = {name: median(row[name] for row in rows[args.warm :]) for name in rows[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    settings = {name: getattr(args, name) for name in ("model", "dtype", "batch", "varlen")}
    seconds = {name: round(middle[name], 4) for name in PHASES}
    speed = {"new_tok_per_s": round(middle["new"] / middle["total"], 1)}
    speed["gen_tok_per_s"] = round(middle["new"] / middle["gen"], 1)
    speed["real_tok_per_s"] = round(middle["real"] / middle["total"], 1)
    row = json.dumps({"peer": "rlhf", **settings, **seconds, **speed, "rss_gb": round(peak, 2)})
    if engine.rank() == 0:  # of two, lines would run into each other
        print("RESULT", row)


def against(args):
    """TRL and ours in turn -> a Markdown row of ratios, TRL's seconds over ours."""
    names = ("fixture", "model", "dtype", "batch", "iters", "warm")
    same = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    same += ["--varlen"] * args.varlen
    python, driver = args.vs
    found = {"trl": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.turns):
            theirs = [python, driver, *same, "--out", folder]
            for name, command in (("trl", theirs), ("ours", [sys.executable, __file__, *same])):
                found[name].append(result(command))
                print(name, found[name][-1], file=sys.stderr)
    cells = [f"{args.model} {args.dtype}{', varying lengths' * args.varlen}"]
    cells[0] += f", batch {args.batch}" * (args.batch != 4)
    cells += [ratio(found, phase) for phase in PHASES]
    cells += [f"{median(row['total'] for row in found[name]):.2f}" for name in ("trl", "ours")]
    cells += [f"{max(row['rss_gb'] for row in found[name]):.2f}" for name in ("trl", "ours")]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    arguments = parse()
    make(arguments.fixture, arguments.model)
    against(arguments) if arguments.vs else ours(arguments)
