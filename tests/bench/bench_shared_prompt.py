"""Would DPO be faster if a prompt were encoded once for both of its responses?  Forward and backward of
the shipped way (two rows a pair) against one row a pair, in which the responses do not see each other.

    python tests/bench/bench_shared_prompt.py

OPT-125M shape, 4 pairs, fp32; prints whether the log-probs are equal and the ratio of times."""

import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from transformers import AutoModelForCausalLM, OPTConfig  # noqa: E402

from rlhf import models  # noqa: E402
from rlhf.losses import token_logprobs  # noqa: E402

PAIRS, VOCABULARY = 4, 50272


def shipped(model, prompt, chosen, rejected):
    """Two rows a pair -> log-probs of the responses' tokens (2B, R)."""
    answers = torch.cat([chosen, rejected])
    batch = {"prompt_ids": torch.cat([prompt, prompt]), "response_ids": answers}
    batch.update(prompt_mask=batch["prompt_ids"] >= 0, mask=answers >= 0)
    return models.policy_logprobs(model, batch)


def shared(model, prompt, chosen, rejected):
    """One row a pair: prompt, chosen, rejected; the rejected response starts again behind the prompt."""
    P, R = prompt.shape[1], chosen.shape[1]
    at = torch.arange(P + 2 * R)
    positions = torch.where(at < P + R, at, at - R)
    second = at >= P + R
    seen = (at[:, None] >= at) & ~(second[:, None] & ~second & (at >= P))
    mask = torch.zeros(1, 1, len(at), len(at)).masked_fill(~seen, torch.finfo(torch.float32).min)
    ids = torch.cat([prompt, chosen, rejected], 1)
    rows = len(ids)
    hidden = model.model.decoder(
        input_ids=ids,
        attention_mask=mask.expand(rows, -1, -1, -1),
        position_ids=positions.expand(rows, -1),
        use_cache=False,
    )[0]
    wanted = [
        torch.cat([hidden[:, P - 1 : P], part[:, :-1]], 1) for part in hidden[:, P:].split(R, 1)
    ]
    logits = model.lm_head(torch.cat(wanted))
    return token_logprobs(logits, torch.cat([chosen, rejected]))


def main():
    torch.manual_seed(0)
    shape = dict(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12)
    config = OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=768, dropout=0.0, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    print("| prompt + response | largest difference | two rows, s | one row, s | ratio |")
    print("|---|---|---|---|---|")
    for P, R in ((64, 192), (128, 128), (192, 64)):
        draw = lambda n: torch.randint(4, VOCABULARY, (PAIRS, n))
        texts = draw(P), draw(R), draw(R)
        with torch.no_grad():
            difference = (shipped(model, *texts) - shared(model, *texts)).abs().max().item()
        seconds = {shipped: [], shared: []}
        for _ in range(4):
            for way, times in seconds.items():
                start = time.perf_counter()
                way(model, *texts).sum().backward()
                times.append(time.perf_counter() - start)
                model.zero_grad()
        two, one = (median(times[1:]) for times in seconds.values())
        print(f"| {P} + {R} | {difference:.1e} | {two:.2f} | {one:.2f} | {two / one:.2f} |")


if __name__ == "__main__":
    main()
