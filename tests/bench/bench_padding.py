"""What is left to save of padding: an actor's forward and backward over rows of varying length, as they
are (padding on the left of the shorter ones), sorted by length into smaller micro-batches, and packed
into one row whose segments attend to themselves alone.

    python tests/bench/bench_padding.py --fixture DIR --model opt125

DIR is filled where it is empty (see bench_ppo.py).  Prints a Markdown row: padded positions over real
ones, seconds of the three (the median of the turns), and the first over the others.  Run nothing else
meanwhile."""

import os
import random
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AttentionInterface  # noqa: E402

from rlhf import batches, engine, models  # noqa: E402
from rlhf.losses import token_logprobs  # noqa: E402
from tests.bench.bench_ppo import common, make, shape  # noqa: E402


def padded(model, tokenizer, parts):
    """Every part is a micro-batch -> log-probs of all rows, row by row."""
    for rows in parts:
        batch = batches.collate(tokenizer, rows)
        logp = models.policy_logprobs(model, batch)
        logp[batch["mask"]].sum().backward()
        yield from (row[mask].detach() for row, mask in zip(logp, batch["mask"]))


def packed(model, rows):
    """One row of all of them -> the same."""
    lengths = [len(row["prompt"]) + len(row["chosen"]) for row in rows]
    ids = torch.tensor([[i for row in rows for i in row["prompt"] + row["chosen"]]])
    ends = torch.tensor(lengths).cumsum(0).tolist()
    said = [torch.arange(e - len(row["chosen"]), e) for e, row in zip(ends, rows)]
    said = torch.cat(said)

    def segments(module, query, key, value, mask, scaling=None, **_):
        parts = zip(*(x.split(lengths, 2) for x in (query, key, value)))
        outs = [F.scaled_dot_product_attention(*p, is_causal=True, scale=scaling) for p in parts]
        return torch.cat(outs, 2).transpose(1, 2), None

    AttentionInterface.register("segments", segments)
    model.set_attn_implementation("segments")
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = model(
        input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=said - 1
    ).logits
    logp = token_logprobs(logits, ids[:, said])
    logp.sum().backward()
    model.set_attn_implementation("sdpa")
    return logp[0].detach().split([len(row["chosen"]) for row in rows])


def main():
    parser = common(__doc__)
    parser.set_defaults(batch=16, turns=5)
    args = parser.parse_args()
    make(args.fixture, args.model)
    engine.prepare("error")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = f"{args.fixture}/{args.model}/actor"
    tokenizer = models.load_tokenizer(path)
    model = models.load_policy(path, tokenizer, args.dtype).eval()
    rng, words = random.Random(0), shape(args.model)[0]
    draw = lambda low: [rng.randrange(2, words) for _ in range(rng.randint(low, 128))]
    rows = [{"prompt": draw(8), "chosen": draw(16)} for _ in range(args.batch)]
    rows.sort(key=lambda row: len(row["prompt"]) + len(row["chosen"]))
    quarters = [rows[i : i + args.batch // 4] for i in range(0, args.batch, args.batch // 4)]
    ways = {
        "padded": lambda: list(padded(model, tokenizer, [rows])),
        "sorted": lambda: list(padded(model, tokenizer, quarters)),
        "packed": lambda: packed(model, rows),
    }
    seconds, found = {name: [] for name in ways}, {}
    for _ in range(args.turns + 1):
        for name, way in ways.items():
            model.zero_grad()
            start = time.perf_counter()
            found[name] = torch.cat([*way()])
            seconds[name].append(time.perf_counter() - start)
    worst = max((found[name] - found["padded"]).abs().max() for name in ways)
    assert worst < (1e-3 if args.dtype == "fp32" else 0.3), worst
    lengths = [len(row["prompt"]) + len(row["chosen"]) for row in rows]
    middle = [median(seconds[name][1:]) for name in ways]
    cells = [f"{args.model} {args.dtype}", f"{max(lengths) * len(lengths) / sum(lengths):.2f}"]
    cells += [f"{value:.3f}" for value in middle]
    cells += [f"{middle[0] / value:.2f}" for value in middle[1:]]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
