"""PPO on a GPU at DeepSpeed-Chat's published setting: an actor of OPT-1.3B's shape, critic and reward
model of OPT-350M's, random weights, 256 + 256 tokens, bf16.

    python tests/bench/bench_gpu.py --fixture DIR --batch 16
    python tests/bench/bench_gpu.py --fixture DIR --batch 16 --largest         # doubles it until it fails

DIR/MODEL is made where it is missing (see bench_ppo.py).  Prints Markdown rows, one a way to decode, each
from a process of its own: the shipped sample(), the shipped sample_compiled() (--compiled_generation),
and Transformers' plain generate; medians over the iterations.  Tokens a second are new ones in
generation, all in scoring and update.  The update's FLOP/s are Megatron's count over the rate of a
product of large matrices; a decoding step's bytes are those of the weights and of half of the keys and
values, over the rate of reading a gigabyte.  Run nothing else meanwhile."""

import argparse
import json
import random
import resource
import sys
import time
from pathlib import Path
from statistics import median
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from tests.bench.bench_ppo import make, model, result, started  # noqa: E402

DECODERS = ("ours", "compiled", "plain")
TITLES = {
    "generation": "generation, tokens/s",
    "bandwidth": "of the memory's speed",
    "scoring": "scoring, tokens/s",
    "update": "update, tokens/s",
    "flops": "of the products' rate",
    "iteration": "iteration, s",
    "peak": "peak, GiB",
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--fixture", required=True)
    add("--model", type=model, default="opt1.3b")
    add("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"))
    add("--batch", type=int, default=16)
    add("--prompt", type=int, default=256)
    add("--response", type=int, default=256)
    add("--iters", type=int, default=3)
    add("--warm", type=int, default=2)
    add("--decoder", nargs="+", choices=DECODERS, default=DECODERS)
    add("--largest", action="store_true", help="also with twice the batch, and so on")
    add("--extra", default="--actor_gradient_checkpointing", help="more flags of train_ppo.py")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def plain(policy, *given, **_):
    """sample_compiled(), but with the cache that generate takes by itself."""
    from rlhf.generate import sample_compiled

    generate, own = (
        policy.generate,
        ("cache_implementation", "max_cache_len", "remove_invalid_values"),
    )

    def dynamic(ids, **how):
        return generate(ids, **{name: value for name, value in how.items() if name not in own})

    with mock.patch.object(policy, "generate", dynamic):
        return sample_compiled(policy, *given, room=0)


def bytes_a_second(device):
    """Of reading a gigabyte, the best of five."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    x, best = torch.ones(1 << 28, device=device), float("inf")
    for _ in range(6):
        wait()
        start = time.perf_counter()
        x.sum()
        wait()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def measured(args):
    """{column: value} of one decoder, in this process."""
    import torch

    import train_ppo
    from rlhf import batches, engine

    folder, [decoder] = f"{args.fixture}/{args.model}", args.decoder
    more = args.extra.split() + ["--compiled_generation"] * (decoder == "compiled")
    flags, tokenizer, engines = started(
        folder, args.dtype, args.batch, args.prompt, args.response, more
    )
    actor, _, critic, _ = engines
    if decoder == "plain":
        train_ppo.sample = plain
    rng, words, found = random.Random(0), len(tokenizer), []
    read = bytes_a_second(engine.device())
    products = engine.products_rate(args.dtype)
    config = actor.module.config
    held = sum(weight.nbytes for weight in actor.module.parameters())
    size = next(actor.module.parameters()).itemsize
    held += (
        args.batch
        * (args.prompt + args.response / 2)
        * config.num_hidden_layers
        * (2 * config.hidden_size * size)
    )
    for _ in range(args.warm + args.iters):
        asked = [rng.randrange(2, words) for _ in range(args.batch * args.prompt)]
        given = [{"prompt": asked[i : i + args.prompt]} for i in range(0, len(asked), args.prompt)]
        batch = batches.collate(tokenizer, given, responses=())
        start = time.perf_counter()
        experience, made = train_ppo.rollout(*engines, [batch], tokenizer, flags)
        updated = train_ppo.ppo_update(actor, critic, experience, flags)
        seconds = time.perf_counter() - start
        new, steps = int(experience["mask"].sum()), experience["mask"].shape[1]
        whole = new + args.batch * args.prompt
        found.append(
            {
                "generation": new / made["seconds_generate"],
                "bandwidth": held * steps / made["seconds_generate"] / read,
                "scoring": whole / made["seconds_score"],
                "update": whole / updated["seconds_train"],
                "flops": float(updated["flops_total"]) / updated["seconds_train"] / products / 1e12,
                "iteration": seconds,
            }
        )
    gpu = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    )
    middle = {name: median(row[name] for row in found[args.warm :]) for name in found[0]}
    return {**middle, "peak": peak / 2**30}


def main():
    args = parse()
    make(args.fixture, args.model)
    if args.child:
        print("RESULT", json.dumps(measured(args)))
        return
    print("| decoding, batch | " + " | ".join(TITLES.values()) + " |\n" + "|---" * 8 + "|")
    for decoder in args.decoder:
        batch = args.batch
        while True:
            command = [sys.executable, __file__, *sys.argv[1:], "--child"]
            command += ["--decoder", decoder, "--batch", str(batch)]
            try:
                row = result(command)
            except SystemExit as error:  # no memory for it
                print(error, file=sys.stderr)
                break
            cells = [
                f"{row[name]:,.0f}" if row[name] > 100 else f"{row[name]:.2f}" for name in TITLES
            ]
            print(f"| {decoder}, {batch} | {' | '.join(cells)} |", flush=True)
            if not args.largest:
                break
            batch *= 2


if __name__ == "__main__":
    main()
