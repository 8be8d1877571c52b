"""Step 3, PPO: raise the score of the policy's own responses, at a price for leaving the reference.

    python train_sft.py && python train_rm.py && python train_ppo.py         # the embedded world
    deepspeed --num_gpus 8 train_ppo.py --data_path Dahoas/rm-static --actor_lr 9.65e-6 \\
        --critic_lr 5e-6 --actor_zero_stage 2 --critic_zero_stage 2 --enable_ema

Four models: the actor is the policy that learns, the reference the actor as it was; the critic
predicts each token's return; the reward model (or --reward_fn) scores whole responses."""
import json, os, runpy, time
from functools import cache, partial
import torch
from rlhf import advice, args as flags, batches, checkpoint, data, engine, models
from rlhf.args import count, fraction, non_negative, open_fraction, positive, positive_int, share
from rlhf.ema import EMA
from rlhf.generate import sample, sample_compiled
from rlhf.log import Log, say, work
from rlhf.losses import (gae, kl_estimate, masked_mean, masked_moments, policy_loss,
                         shaped_rewards, value_loss, whiten)

def parse():
    parser = flags.Parser(__doc__, "output/ppo")
    add = parser.add_argument_group("models").add_argument
    add("--actor_model_name_or_path", default="output/sft", help="and reference: of step 1 [ours]")
    add("--critic_model_name_or_path", help="and reward: output/rm, with --reward_fn none [ours]")
    flags.add_frozen(add, "reference")
    flags.add_frozen(add, "reward")
    add("--enable_ema", action="store_true", help="keep and save an average of the actor [DSC]")
    add("--ema_decay", type=open_fraction, default=0.992, help="an optimizer step [DSC, constant]")
    add = parser.add_argument_group("rollout and reward").add_argument
    add("--per_device_generation_batch_size", type=positive_int, default=16, help="rows [DSC]")
    add("--generation_batches", type=positive_int, default=1, help="of them a rollout [DSC]")
    add("--generation_micro_batch_size", type=positive_int, default=64, help="read at once [ours]")
    add("--compiled_generation", action="store_true", help="static cache, CUDA graph [ours: off]")
    add("--max_prompt_seq_len", type=positive_int, default=256, help="or it is dropped [DSC]")
    add("--max_answer_seq_len", type=positive_int, default=256, help="tokens at most [DSC]")
    add("--temperature", type=positive, default=1.0, help="also of all log-probs [IGPT]")
    add("--top_p", type=share, default=1.0, help="nucleus; 1: all tokens [ours: unbiased]")
    add("--top_k", type=count, default=0, help="likeliest tokens; 0: all [ours: unbiased]")
    add("--print_answers_interval", type=count, default=50, help="iterations; 0: never [ours]")
    add("--kl_coef", type=non_negative, default=0.1, help="price of the KL [DSC, constant]")
    add("--target_kl", type=positive, help="nats a response to adapt --kl_coef to [ours: off]")
    add("--kl_estimator", choices=("k1", "k2", "k3"), default="k1", help="[DSC, constant]")
    add("--clip_reward", type=positive, default=5.0, help="of the score [DSC, constant]")
    add("--reward_fn", help="path.py:function of (prompts, responses, rows) -> scores [ours]")
    add("--reward_fn_weight", type=non_negative, default=1.0, help="of its scores [ours]")
    add("--missing_eos_penalty", type=non_negative, default=0.0, help="if cut [ours: DSC has none]")
    add("--kl_stop", type=non_negative, default=0.0, help="end above it; 0: never [ours: off]")
    add("--gamma", type=fraction, default=1.0, help="discount [DSC, constant]")
    add("--lam", type=fraction, default=0.95, help="GAE's lambda [GAE]")
    add("--no_whiten_advantages", action="store_true", help="as DSC [ours: whitened]")
    add = parser.add_argument_group("update").add_argument
    add("--per_device_training_batch_size", type=positive_int, default=16, help="rows [DSC]")
    add("--align_overflow", action="store_true", help="fp16: both skip a step, or none [DSC]")
    add("--ppo_epochs", type=positive_int, default=1, help="passes over a rollout [DSC]")
    add("--critic_warmup_steps", type=count, default=0, help="iterations it trains alone [ours]")
    add("--clip", type=positive, default=0.2, help="of the ratio, epsilon [PPO]")
    add("--value_clip", type=positive, default=0.2, help="of a value's move [DSC, constant]")
    add("--unsupervised_dataset_name", help="text to mix in: toy, .txt, or a column text [DSC]")
    add("--unsupervised_dataset_config_name", help="configuration of a hub id [DSC]")
    add("--unsup_coef", type=non_negative, default=27.8, help="weight of that text's loss [IGPT]")
    flags.add_trained(parser, "actor_", 9.65e-6)
    flags.add_trained(parser, "critic_", 5e-6)
    flags.add_training(parser, warmup=100)
    args = parser.parse_args()
    args.kl_now = args.kl_coef                      # --target_kl changes it
    if not args.reward_fn:
        args.critic_model_name_or_path = args.critic_model_name_or_path or "output/rm"
    args.rows = args.per_device_generation_batch_size * args.generation_batches
    args.step_rows = args.per_device_training_batch_size * args.gradient_accumulation_steps
    if args.align_overflow and args.dtype != "fp16": parser.error("--align_overflow is for fp16")
    if args.target_kl and not args.kl_coef: parser.error("--target_kl adapts a --kl_coef above 0")
    if args.rows % args.step_rows:
        parser.error(f"a rollout of {args.rows} rows (generation batch size x batches) does not "
                     f"divide into steps of {args.step_rows} (training batch size x accumulation)")
    args.updates = args.ppo_epochs * args.rows // args.step_rows    # optimizer steps an iteration
    return args

@cache
def reward_function(spec):
    """path.py:name -> that function.  InputError if the file does not run, or has none."""
    path, _, name = os.path.abspath(spec).rpartition(":")
    return flags.opened(lambda p: runpy.run_path(p)[name], path or name, f"function {name} of")

def function_scores(batch, tokenizer, args):
    """--reward_fn's score of each response -> (B,) fp32.  It gets lists: prompts, responses (texts
    without special tokens), the data's rows (dicts).  InputError names the prompt it fails on."""
    def judged(*given):
        try:
            scores = torch.tensor([*map(float, reward_function(args.reward_fn)(*map(list, given)))])
            if len(scores) != len(given[0]) or not scores.isfinite().all():
                raise ValueError(f"{scores.tolist()} for {len(given[0])} responses")
            return scores.to(batch["mask"].device)
        except (Exception, SystemExit) as error:             # the function's own: on which row?
            for row in zip(*given) if len(given[0]) > 1 else (): judged(*([part] for part in row))
            raise flags.InputError(f"--reward_fn: {error!r} at {given[0]!r:.300}") from error
    return judged(models.texts(tokenizer, batch["prompt_ids"], batch["prompt_mask"]),
                  models.texts(tokenizer, batch["response_ids"], batch["mask"]),
                  [json.loads(row) for row in batch["rows"]])

@torch.no_grad()
def rollout(actor, reference, critic, reward_model, prompts, tokenizer, args):
    """Sample a response to every prompt, score it, estimate advantages -> experience, metrics.
    prompts: a list of batches.  The experience is one batch (see models.py) with old_logp,
    ref_logp, old_values, advantages, returns (B, R) fp32 and score, kl (B,)."""
    start, rows = time.perf_counter(), args.generation_micro_batch_size
    settings = (args.max_answer_seq_len, args.temperature, args.top_p, args.top_k)
    draw = partial(sample_compiled, room=args.max_prompt_seq_len + args.max_answer_seq_len) \
        if args.compiled_generation else partial(sample, rows=rows)
    with engine.whole(actor) as policy:
        parts = [draw(policy, batch, *settings) for batch in prompts]
    sampled = time.perf_counter()
    parts = [{name: x[i:i + rows] for name, x in batch.items()} for batch in parts
             for i in range(0, len(batch["mask"]), rows)]
    for batch in parts:
        batch["old_logp"] = models.policy_logprobs(actor, batch, args.temperature)          # (B, R)
        batch["ref_logp"] = models.policy_logprobs(reference, batch, args.temperature)      # (B, R)
        batch["old_values"] = models.state_values(critic, batch)                            # (B, R)
        batch["score"] = models.sequence_scores(reward_model, batch) if reward_model else 0.0
        if args.reward_fn:                                                                  # (B,)
            batch["score"] += args.reward_fn_weight * function_scores(batch, tokenizer, args)
    batch = models.stack(parts, tokenizer.pad_token_id)
    mask, logp, ref_logp, values = map(batch.get, ("mask", "old_logp", "ref_logp", "old_values"))
    score = batch["score"].clamp(-args.clip_reward, args.clip_reward)       # but not the penalty
    score = score - args.missing_eos_penalty * ~batch["ended"]
    rewards = shaped_rewards(score, logp, ref_logp, mask, args.kl_now, flags.INF, args.kl_estimator)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
    batch["advantages"] = advantages if args.no_whiten_advantages else whiten(advantages, mask)
    batch["returns"] = returns
    batch["kl"] = kl_estimate(logp, ref_logp).masked_fill(~mask, 0).sum(1)                  # (B,)
    return_mean, return_variance = masked_moments(returns, mask)
    error_variance = masked_moments(returns - values, mask)[1]
    score_variance = masked_moments(batch["score"], torch.ones_like(batch["ended"]))[1]
    return batch, {                       # in the order in which they depend on one another
        "entropy": masked_moments(-logp, mask)[0], "kl": batch["kl"].mean(), "kl_coef": args.kl_now,
        "score": batch["score"].mean(), "score_std": score_variance.sqrt(),
        "reward": rewards.sum(1).mean(), "return_mean": return_mean,
        "advantage_mean": masked_moments(advantages, mask)[0],
        "explained_variance": 1 - error_variance / return_variance.clamp(min=1e-8),
        "eos_rate": batch["ended"].double().mean(), "response_length": mask.sum(1).double().mean(),
        **work(parts, {actor: 2, reference: 1, critic: 1, reward_model: 1}),
        "seconds_generate": sampled - start, "seconds_score": time.perf_counter() - sampled}

def ppo_update(actor, critic, experience, args, ema=None, text=None, both=True):
    """--ppo_epochs passes over the experience, each in new minibatches of micro-batches that are
    alike in length -> metrics.  The critic and, if `both`, the actor take a step a minibatch.  New
    log-probs come from the old ones' forward, in its mode: the first ratio is 1 up to rounding."""
    start, history = time.perf_counter(), []
    length = (experience["prompt_mask"].sum(1) + experience["mask"].sum(1)).cpu()           # (B,)
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(args.rows).split(args.step_rows):
            alike = rows[length[rows].argsort()].split(args.per_device_training_batch_size)
            micro_batches = [{name: x[part] for name, x in experience.items()} for part in alike]
            blocks = next(text) if text else [None] * len(alike)
            denom = engine.global_denom(micro_batches)
            text_denom = engine.global_denom(blocks) if text else None
            for batch, block in zip(micro_batches, blocks):
                with torch.set_grad_enabled(both):
                    logp = models.policy_logprobs(actor, batch, args.temperature)           # (B, R)
                    actor_loss, metrics = policy_loss(logp, batch["old_logp"], batch["advantages"],
                                                      batch["mask"], args.clip, denom)
                    metrics["policy_loss"] = actor_loss.detach()
                    if block:              # Ouyang et al. 2022 (arXiv:2203.02155) eq. 2, last term
                        unsup = models.policy_logprobs(actor, block)     # differs: texts are apart
                        unsup = -masked_mean(unsup, block["mask"], text_denom)
                        actor_loss = actor_loss + args.unsup_coef * unsup
                        metrics["unsup_loss"] = unsup.detach()
                together = both and args.align_overflow
                norm = engine.step(actor, actor_loss) if both and not together else 0.0
                values = models.state_values(critic, batch)                                 # (B, R)
                critic_loss, stats = value_loss(values, batch["old_values"], batch["returns"],
                                                batch["mask"], args.value_clip, denom)
                norms = engine.step_together((actor, actor_loss), (critic, critic_loss)) \
                    if together else (norm, engine.step(critic, critic_loss))
                history.append({**metrics, "value_loss": critic_loss.detach(),
                                "value_clip_frac": stats["clip_frac"],
                                "actor_grad_norm": norms[0], "critic_grad_norm": norms[1]})
            if ema is not None and both and actor.was_step_applied(): ema.update()
    first = history[:args.gradient_accumulation_steps]             # before anything has moved
    errors = [abs(m[name] - 1) for m in first for name in ("ratio_min", "ratio_max")]
    passes = {actor: actor.passes if both else 1, critic: critic.passes}
    return {**engine.summarise(history), **work([experience] * args.ppo_epochs, passes),
            "first_ratio_error_max": max(errors), "seconds_train": time.perf_counter() - start}

def guard(step, metrics, args):
    """Stop before training on garbage.  metrics are of all ranks, so that all stop together."""
    kl, ratio = metrics.get("kl", 0), metrics.get("ratio_mean", 1)
    rows = 0 if args.reward_fn else args.rows * engine.world_size()     # a rule may praise nothing
    for wrong, reason in ((rows > 1 and metrics.get("score_std", 1) < 1e-6,
             "the reward model scores all responses alike: is it trained, and for such data?"),
            (args.kl_stop and kl > args.kl_stop,
             f"the KL is {kl:.1f}, above --kl_stop: lower --actor_lr or raise --kl_coef"),
            (ratio > 10, f"the mean ratio is {ratio:.1f}, above 10: lower --actor_lr")):
        if wrong: raise flags.InputError(f"step {step}: {reason}")
    if metrics.get("eos_rate") == 0:
        say(f"step {step}: no response ended: raise --max_answer_seq_len or --missing_eos_penalty")
    return metrics

def load_models(args, tokenizer, steps):
    """-> actor and critic (engines with optimizers), reference, reward model or None (frozen)."""
    common = (tokenizer, args.dtype, args.max_prompt_seq_len + args.max_answer_seq_len)
    policy = partial(models.load_policy, args.actor_model_name_or_path, *common, args.load_in_4bit)
    given = args.critic_model_name_or_path
    scalar = partial(models.load_scalar, given or args.actor_model_name_or_path, *common, not given)
    rows, waits = args.per_device_training_batch_size, args.critic_warmup_steps * args.updates
    actor = engine.train_engine(policy(), args, "actor_", rows, steps - waits)
    critic = engine.train_engine(scalar(), args, "critic_", rows, steps)
    actor.eval(), critic.eval()             # no dropout: old and new log-probs must be comparable
    return actor, critic, engine.reference(actor, policy, args, "actor_"), \
        engine.frozen(scalar(), args, "reward", args.critic_zero_stage) if given else None

def main():
    args = engine.init(parse())
    saved, path = checkpoint.Checkpoints(args), args.actor_model_name_or_path
    tokenizer = models.load_tokenizer(path, args)
    models.check_same_vocabulary(path, tokenizer, args.critic_model_name_or_path)
    if args.reward_fn: reward_function(args.reward_fn)      # before anything else is loaded
    train, _ = data.load(args, tokenizer, 3, args.max_prompt_seq_len)
    to_batch = partial(batches.collate, tokenizer, responses=())
    cut, _, total = batches.plan(args, train, "generation", args.generation_batches)
    if args.critic_warmup_steps >= (1 if args.lr_range_test else total):
        raise flags.InputError(f"--critic_warmup_steps: below {total} steps, 0 in a range test")
    advice.check(args, "ppo", total * args.updates)
    text = batches.text_stream(args, tokenizer, saved.step)

    actor, critic, reference, reward_model = load_models(args, tokenizer, total * args.updates)
    ema = EMA(actor.module, args.ema_decay) if args.enable_ema else None
    saved.restore({"actor": actor, "critic": critic}, ema)
    shown = "score kl response_length eos_rate ratio_max clip_frac explained_variance seconds"
    log = Log(args, total, shown.split(), actor, saved.step)
    for step, prompts in batches.steps(args, train, to_batch, cut, total, saved.step):
        both = step > args.critic_warmup_steps
        lrs = {"actor_lr": actor.get_lr()[0], "critic_lr": critic.get_lr()[0]}
        experience, made = rollout(actor, reference, critic, reward_model, prompts, tokenizer, args)
        made = guard(step, engine.reduce_metrics(made, step), args)
        if args.target_kl and both:        # as PPO's penalty does (arXiv:1707.06347, section 4)
            off, least = made["kl"] / args.target_kl, args.kl_coef / 100
            args.kl_now = max(least, args.kl_now * (1.5 if off > 2 else 0.8 if off < 0.5 else 1))
        updated = ppo_update(actor, critic, experience, args, ema, text, both)
        updated = engine.reduce_metrics(updated, step, args)
        made["flops_total"] += updated["flops_total"]
        log.step(step, {**updated, **made, **lrs})
        guard(step, updated, args)
        if args.print_answers_interval and (step - 1) % args.print_answers_interval == 0:
            log.samples(step, tokenizer, experience)
        saved.keep(step)
    engine.save(actor, tokenizer, f"{args.output_dir}/actor")
    engine.save(critic, tokenizer, f"{args.output_dir}/critic")
    if ema is not None:
        ema.load()
        engine.save(actor, tokenizer, f"{args.output_dir}/actor_ema")

if __name__ == "__main__": flags.run(main)
