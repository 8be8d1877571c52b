"""Step 1, supervised fine-tuning: maximise the log-likelihood of demonstrations.

    python train_sft.py                                      # the embedded world, one process
    deepspeed --num_gpus 8 train_sft.py --model_name_or_path facebook/opt-1.3b \\
        --data_path Dahoas/rm-static --learning_rate 9.65e-6 --num_train_epochs 16 --zero_stage 2"""
from functools import partial
from rlhf import advice, args as flags, batches, checkpoint, data, engine, models
from rlhf.evaluate import perplexity
from rlhf.log import Log, work
from rlhf.losses import masked_mean

def parse():
    parser = flags.Parser(__doc__, "output/sft")
    add = parser.add_argument_group("SFT").add_argument
    add("--train_on_prompt", action="store_true", help="as DSC does [ours: responses only]")
    add("--packing", action="store_true", help="rows share sequences [ours: off]")
    add("--sft_only_data_path", nargs="*", default=[], help="without pairs, used whole [DSC]")
    flags.add_training(parser, learning_rate=1e-3)
    args = parser.parse_args()
    if args.packing and args.group_by_length:
        parser.error("--packing leaves no padding for --group_by_length to save: choose one")
    return args

def train_step(policy, micro_batches):
    """One optimizer step down the mean negative log-likelihood of its response tokens."""
    policy.train()
    denom, history = engine.global_denom(micro_batches), []
    for batch in micro_batches:
        loss = -masked_mean(models.policy_logprobs(policy, batch), batch["mask"], denom)
        history.append({"loss": loss.detach(), "grad_norm": engine.step(policy, loss)})
    return {**engine.summarise(history), **work(micro_batches, {policy: policy.passes})}

def main():
    args = engine.init(parse())
    saved, path = checkpoint.Checkpoints(args), args.model_name_or_path
    tokenizer = models.load_tokenizer(path, args)
    train, held_out = data.load(args, tokenizer, 1)
    to_batch = to_eval_batch = partial(batches.collate, tokenizer)
    if args.packing:
        train = batches.Packs(train, args.max_seq_len)
        to_batch = partial(batches.collate_packs, tokenizer)
    cut, epoch, total = batches.plan(args, train)
    advice.check(args, "sft", total)

    policy = models.load_policy(path, tokenizer, args.dtype, args.max_seq_len, args.load_in_4bit)
    policy = engine.train_engine(policy, args, "", cut[0], total)
    saved.restore({"policy": policy})
    log = Log(args, total, "loss grad_norm lr tokens_per_second".split(), policy, saved.step)
    evaluation = lambda: {"eval_perplexity": perplexity(
        policy, held_out, to_eval_batch, args.per_device_eval_batch_size)}
    if not saved.step: log.evaluation(0, evaluation())
    for step, micro_batches in batches.steps(args, train, to_batch, cut, total, saved.step):
        lr, metrics = policy.get_lr()[0], train_step(policy, micro_batches)
        log.step(step, {**engine.reduce_metrics(metrics, step, args), "lr": lr})
        if step % (args.eval_interval or epoch) == 0 or step == total:
            log.evaluation(step, evaluation())
        saved.keep(step)
    engine.save(policy, tokenizer, args.output_dir)

if __name__ == "__main__": flags.run(main)
