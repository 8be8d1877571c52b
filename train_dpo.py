"""The other road from step 1, DPO: fit the policy to the pairs themselves, no reward model.

    python train_sft.py && python train_dpo.py                # the embedded world, one process
    deepspeed --num_gpus 8 train_dpo.py --data_path Dahoas/rm-static --zero_stage 2

The loss is step 2's, on the reward that the policy implies: beta * log(pi / what it was)."""
from functools import partial
import torch
from datasets import Dataset, load_from_disk
from rlhf import advice, args as flags, batches, checkpoint, data, engine, models
from rlhf.evaluate import log_ratios, pair_statistics, preferences, score_pairs
from rlhf.generate import sample
from rlhf.log import Log, work
from rlhf.losses import dpo_loss

def parse():
    parser = flags.Parser(__doc__, "output/dpo")
    add = parser.add_argument_group("DPO; its recipe sets other groups' defaults too").add_argument
    add("--beta", type=flags.positive, default=0.5, help="price of leaving the reference [recipe]")
    add("--label_smoothing", type=flags.fraction, default=0.0, help="share of wrong labels [DSC]")
    add("--loss_type", choices=("sigmoid", "ipo", "hinge"), default="sigmoid", help="[DPO]")
    add("--length_normalized", action="store_true", help="log-probs a token [ours: off, as DPO]")
    add("--max_prompt_seq_len", type=flags.positive_int, default=256, help="its end [recipe]")
    add("--precompute_ref_logp", action="store_true", help="and need no reference [ours: off]")
    flags.add_frozen(add, "reference")
    add("--eval_kl_prompts", type=flags.count, default=64, help="to sample for eval_kl [ours]")
    flags.add_training(parser, learning_rate=2e-6, warmup=10)
    parser.set_defaults(model_name_or_path="output/sft", weight_decay=0.01, max_seq_len=256,
                        lr_scheduler_type="linear")
    return parser.parse_args()

def response_logprobs(model, batch, args):
    """log pi(y | x) of whole responses -> (rows,) fp32; --length_normalized: their tokens' mean.
    Without a model: the reference's, as they were computed before training."""
    if model is None: return batch["ref_logp"]
    logp = models.policy_logprobs(model, batch).masked_fill(~batch["mask"], 0).sum(1)
    return logp / batch["mask"].sum(1) if args.length_normalized else logp

def train_step(policy, reference, micro_batches, args):
    """One optimizer step.  Micro-batches hold equally many pairs: their mean is the global mean."""
    history = []
    for batch in micro_batches:
        with torch.no_grad():
            ref_chosen, ref_rejected = response_logprobs(reference, batch, args).chunk(2)   # (B,)
        chosen, rejected = response_logprobs(policy, batch, args).chunk(2)
        loss, rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta,
                                 args.label_smoothing, args.loss_type)
        history.append({"loss": loss.detach(), "grad_norm": engine.step(policy, loss),
                        "chosen_logp": chosen.detach().mean(),
                        "rejected_logp": rejected.detach().mean(),
                        **pair_statistics(*rewards.values(), "reward")})
    passes = policy.passes + (reference is not None)
    return {**engine.summarise(history), **work(micro_batches, {policy: passes})}

@torch.no_grad()
def evaluate(policy, reference, rows, collate, tokenizer, args):
    """The implicit rewards of the held-out pairs and, with a reference, KL(policy || reference) in
    nats a response, on the policy's own samples for --eval_kl_prompts of their prompts."""
    size, room = args.per_device_eval_batch_size, args.max_seq_len // 2
    reward = lambda batch: args.beta * (response_logprobs(policy, batch, args)
                                        - response_logprobs(reference, batch, args))
    found = preferences(reward, rows, collate, size, "reward")
    prompts = [row for row in rows.select_columns("prompt") if len(row["prompt"]) <= room]
    if reference is not None and (prompts := prompts[:args.eval_kl_prompts]):
        collate = partial(batches.collate, tokenizer, responses=())
        with engine.whole(policy) as model:
            drawn = [sample(model, p, room) for p in batches.eval_batches(prompts, collate, size)]
        kl = [log_ratios(policy, reference, batch).sum(1) for batch in drawn]
        found["eval_kl"] = engine.gather_rows(torch.cat(kl), len(prompts)).mean().item()
    return found

def precomputed(policy, rows, collate, tokenizer, args):
    """The rows with the untrained policy's log-probs of both responses, computed once, cached."""
    compute = partial(score_pairs, partial(response_logprobs, policy, args=args), rows, collate,
                      args.per_device_eval_batch_size)
    identity = [rows["twin"][:], args.max_seq_len, args.max_prompt_seq_len, args.length_normalized,
                data.fingerprint(args.model_name_or_path), policy.module.config, args.seed]
    keep = lambda to, pairs: Dataset.from_dict({"ref_logp": pairs.tolist()}).save_to_disk(to)
    folder = data.cached(args, tokenizer, identity, partial(keep), compute)   # it hashes its code
    return rows.add_column("ref_logp", load_from_disk(folder)["ref_logp"][:])

def main():
    args = engine.init(parse())
    saved, path = checkpoint.Checkpoints(args), args.model_name_or_path
    tokenizer = models.load_tokenizer(path, args)
    train, held_out = data.load(args, tokenizer, 2, args.max_prompt_seq_len)
    to_batch = partial(batches.collate, tokenizer, responses=("chosen", "rejected"))
    cut, _, total = batches.plan(args, train)
    advice.check(args, "dpo", total)

    load = partial(models.load_policy, path, tokenizer, args.dtype, args.max_seq_len,
                   args.load_in_4bit)
    policy = engine.train_engine(load(), args, "", cut[0], total)
    policy.eval()                             # no dropout: policy and reference are compared
    reference = None if args.precompute_ref_logp else engine.reference(policy, load, args, "")
    if reference is None:
        train, held_out = [precomputed(policy, rows, to_batch, tokenizer, args)
                           for rows in (train, held_out)]
    saved.restore({"policy": policy})
    log = Log(args, total, "loss accuracy margin lr tokens_per_second".split(), policy, saved.step)
    evaluation = partial(evaluate, policy, reference, held_out, to_batch, tokenizer, args)
    if not saved.step: log.evaluation(0, evaluation())
    for step, micro_batches in batches.steps(args, train, to_batch, cut, total, saved.step):
        lr, metrics = policy.get_lr()[0], train_step(policy, reference, micro_batches, args)
        log.step(step, {**engine.reduce_metrics(metrics, step, args), "lr": lr})
        if step % (args.eval_interval or -(-total // 5)) == 0 or step == total:
            log.evaluation(step, evaluation())
        saved.keep(step)
    engine.save(policy, tokenizer, args.output_dir)

if __name__ == "__main__": flags.run(main)
