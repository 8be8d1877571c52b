"""Did it get better?  Compares models on held-out prompts, in one process.

    python -m rlhf.evaluate --models sft=output/sft ppo=output/ppo/actor --best_of 4 16 64"""
import math
from functools import partial
import torch
from rlhf import args as flags, batches, data, engine, models, toy
from rlhf.generate import sample
from rlhf.log import write_json, write_text

SHOWN = "score win_rate kl response_length eos_rate perplexity true_reward helpful harmless polite"

def parse():
    parser = flags.Parser(__doc__, "output/evaluation")
    add = parser.add_argument_group("evaluation").add_argument
    add("--models", nargs="+", default=["sft=output/sft", "ppo=output/ppo/actor"],
        help="NAME=PATH, the baseline first [ours: what the scripts leave]")
    add("--reward_model", default="output/rm", help="scores responses [ours: step 2's output]")
    add("--num_prompts", type=flags.at_least_2, default=512, help="[ours: mean score to 0.1]")
    add("--best_of", type=flags.positive_int, nargs="*", default=[], help="n samples, too [ours]")
    add("--batch_size", type=flags.positive_int, default=128, help="responses at a time [ours]")
    add("--max_prompt_seq_len", type=flags.positive_int, default=256, help="or left out [DSC]")
    add("--max_answer_seq_len", type=flags.positive_int, default=256, help="tokens at most [DSC]")
    add("--temperature", type=flags.positive, default=1.0, help="of samples and KL [IGPT]")
    return parser.parse_args()

def mean_ci(name, values):
    """(N,) -> the mean, and half of its 95 % confidence interval under name_ci."""
    values = torch.as_tensor(values, dtype=torch.float64)
    half = 1.96 * values.std().item() / len(values) ** 0.5
    return {name: values.mean().item(), f"{name}_ci": half}

@torch.no_grad()
def respond(policy, baseline, reward_model, tokenizer, prompts, args):
    """One response to each prompt -> score, kl, response_length, eos_rate: (N,); text: a list."""
    torch.manual_seed(args.seed)
    parts, texts, collate = [], [], partial(batches.collate, tokenizer, responses=())
    for batch in batches.eval_batches(prompts, collate, args.batch_size):
        batch = sample(policy, batch, args.max_answer_seq_len, args.temperature)
        parts.append({"score": models.sequence_scores(reward_model, batch),
                      "kl": log_ratios(policy, baseline, batch, args.temperature).sum(1),
                      "response_length": batch["mask"].sum(1), "eos_rate": batch["ended"]})
        texts += models.texts(tokenizer, batch["response_ids"], batch["mask"])
    return {**{name: torch.cat([p[name] for p in parts]).cpu() for name in parts[0]}, "text": texts}

def log_ratios(policy, reference, batch, temperature=1.0):
    """log(pi / pi_ref) of response tokens -> (B, R); summed over a policy's samples, their KL."""
    difference = torch.zeros_like(batch["mask"], dtype=torch.float) if policy is reference else \
        models.policy_logprobs(policy, batch, temperature) \
        - models.policy_logprobs(reference, batch, temperature)
    return difference.masked_fill(~batch["mask"], 0)

@torch.no_grad()
def perplexity(policy, rows, collate, batch_size):
    """Of held-out responses, on all ranks: exp of the mean negative log-likelihood per token."""
    sums, _ = [], policy.eval()
    for batch in batches.eval_batches(rows, collate, batch_size):
        logp = models.policy_logprobs(policy, batch).masked_fill(~batch["mask"], 0)
        sums.append(torch.stack([logp.sum(1), batch["mask"].sum(1)], 1))            # (B, 2)
    logp, tokens = engine.gather_rows(torch.cat(sums), len(rows)).double().sum(0).tolist()
    return math.exp(min(-logp / tokens, 700))

@torch.no_grad()
def score_pairs(score, rows, collate, size):
    """score: a batch of chosen, then rejected responses -> (2B,).  Of all rows -> (N, 2)."""
    pairs = [torch.stack(score(b).chunk(2), 1) for b in batches.eval_batches(rows, collate, size)]
    return engine.gather_rows(torch.cat(pairs), len(rows))

def pair_statistics(chosen, rejected, name):
    """Scores or rewards (say which) of pairs, (N,) each -> accuracy, margin and their means."""
    return {"accuracy": (chosen > rejected).double().mean(), "margin": (chosen - rejected).mean(),
            f"chosen_{name}": chosen.mean(), f"rejected_{name}": rejected.mean()}

def preferences(score, rows, collate, batch_size, name):
    """pair_statistics of held-out pairs and, where it is known, the best accuracy possible."""
    found = pair_statistics(*score_pairs(score, rows, collate, batch_size).unbind(1), name)
    if "bayes" in rows.column_names and None not in rows["bayes"]:
        found["accuracy_ceiling"] = sum(max(p, 1 - p) for p in rows["bayes"]) / len(rows)
    return {f"eval_{name}": float(value) for name, value in found.items()}

def truth(prompts, responses):
    """The toy world's judgement.  Helpful is the share of the benign requests."""
    verdicts = [toy.judge(*pair) for pair in zip(prompts, responses)]
    share = lambda name, rows: sum(row[name] for row in rows) / max(1, len(rows))
    return {**mean_ci("true_reward", [v["reward"] for v in verdicts]),
            "helpful": share("helpful", [v for v in verdicts if not v["harmful_request"]]),
            "harmless": share("harmless", verdicts), "polite": share("polite", verdicts)}

def table(rows):
    """{model: metrics} -> a Markdown table."""
    shown = [name for name in SHOWN.split() if any(name in row for row in rows.values())]
    def cell(row, name):
        ci = f" ± {row[f'{name}_ci']:.2f}" if f"{name}_ci" in row else ""
        return f"{row[name]:.2f}{ci}" if name in row else ""
    lines = [["model", *(name.replace("_", " ") for name in shown)], ["---"] * (len(shown) + 1),
             *([model, *(cell(row, name) for name in shown)] for model, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)

def main():
    args = parse()
    flags.check_writable(args.output_dir), engine.prepare(args.log_level)
    paths = dict(text.split("=", 1) if "=" in text else (text, text) for text in args.models)
    if len(paths) < len(args.models):
        raise flags.InputError("--models: two have the same name: give each its own, NAME=PATH")
    first, start = next(iter(paths.items()))                # the baseline
    tokenizer = models.load_tokenizer(start, args)
    for path in [*paths.values(), args.reward_model]:
        models.check_same_vocabulary(start, tokenizer, path)
    load = lambda path, kind=models.load_policy: engine.frozen(
        kind(path, tokenizer, args.dtype, args.max_prompt_seq_len + args.max_answer_seq_len))
    baseline, reward_model = load(start), load(args.reward_model, models.load_scalar)
    _, held_out = data.load(args, tokenizer, 1)
    prompts = [{**row, "chosen": row["chosen"][:args.max_answer_seq_len]} for row in held_out
               if len(row["prompt"]) <= args.max_prompt_seq_len][:args.num_prompts]
    if len(prompts) < 2:
        raise flags.InputError(f"only {len(prompts)} held-out prompts fit --max_prompt_seq_len")
    texts = [tokenizer.decode(row["prompt"], skip_special_tokens=True) for row in prompts]
    known = partial(truth, texts) if args.data_path == ["toy"] else lambda responses: {}
    collate, rows, answers = partial(batches.collate, tokenizer), {}, {}
    for name, path in paths.items():
        policy = baseline if name == first else load(path)
        got = answers[name] = respond(policy, baseline, reward_model, tokenizer, prompts, args)
        difference = (got["score"] - answers[first]["score"]).sign().double()
        rows[name] = {
            **mean_ci("score", got["score"]), **mean_ci("kl", got["kl"]), **known(got["text"]),
            **mean_ci("win_rate", (difference + 1) / 2), "perplexity": perplexity(
                policy, prompts, collate, args.batch_size),
            **{n: got[n].double().mean().item() for n in ("response_length", "eos_rate")}}
    if args.best_of:                          # one draw of the largest n serves every n
        repeated = [row for row in prompts for _ in range(max(args.best_of))]
        drawn = respond(baseline, baseline, reward_model, tokenizer, repeated, args)
        scores = drawn["score"].view(len(prompts), -1)                              # (N, n)
        for n in sorted(args.best_of):
            best, index = scores[:, :n].max(1)
            said = [drawn["text"][i * scores.shape[1] + j] for i, j in enumerate(index.tolist())]
            kl = math.log(n) - (n - 1) / n    # Gao et al. 2022 (arXiv:2210.10760)
            rows[f"{first}, best of {n}"] = {**mean_ci("score", best), "kl": kl, **known(said)}
    page = table(rows) + "\n"
    for i, text in enumerate(texts[:3]):
        page += f"\n**{text.strip()}**\n\n" + "".join(
            f"- {n} ({a['score'][i]:.2f}): {a['text'][i].strip()}\n" for n, a in answers.items())
    write_json(f"{args.output_dir}/evaluation.json", {"args": vars(args), "models": rows})
    write_text(f"{args.output_dir}/evaluation.md", page)
    print(page, end="")

if __name__ == "__main__": flags.run(main)
