"""Step 2, reward model: Bradley-Terry on the last-token scores of preferred and rejected responses.

    python train_rm.py                                       # the embedded world, one process
    deepspeed --num_gpus 8 train_rm.py --model_name_or_path facebook/opt-350m \\
        --data_path Dahoas/rm-static --learning_rate 5e-5 --weight_decay 0.1 --zero_stage 2"""
from functools import partial
from rlhf import advice, args as flags, batches, checkpoint, data, engine, models
from rlhf.evaluate import pair_statistics, preferences
from rlhf.log import Log, work
from rlhf.losses import bradley_terry_loss

def parse():
    parser = flags.Parser(__doc__, "output/rm")
    flags.add_training(parser, learning_rate=5e-5)
    return parser.parse_args()

def train_step(model, micro_batches):
    """One optimizer step.  Micro-batches hold equally many pairs: their mean is the global mean."""
    history = []
    for batch in micro_batches:
        chosen, rejected = models.sequence_scores(model, batch).chunk(2)
        loss = bradley_terry_loss(chosen, rejected)
        history.append({"loss": loss.detach(), "grad_norm": engine.step(model, loss),
                        **pair_statistics(chosen.detach(), rejected.detach(), "score")})
    return {**engine.summarise(history), **work(micro_batches, {model: model.passes})}

def main():
    args = engine.init(parse())
    saved, path = checkpoint.Checkpoints(args), args.model_name_or_path
    tokenizer = models.load_tokenizer(path, args)
    train, held_out = data.load(args, tokenizer, 2)
    to_batch = partial(batches.collate, tokenizer, responses=("chosen", "rejected"))
    cut, epoch, total = batches.plan(args, train)
    advice.check(args, "rm", total)

    model = models.load_scalar(path, tokenizer, args.dtype, args.max_seq_len, new_head=True)
    model = engine.train_engine(model, args, "", cut[0], total)
    model.eval()                              # no dropout: the scores of a pair are compared
    saved.restore({"model": model})
    log = Log(args, total, "loss accuracy margin lr tokens_per_second".split(), model, saved.step)
    evaluation = partial(preferences, partial(models.sequence_scores, model), held_out, to_batch,
                         args.per_device_eval_batch_size, "score")
    if not saved.step: log.evaluation(0, evaluation())
    for step, micro_batches in batches.steps(args, train, to_batch, cut, total, saved.step):
        lr, metrics = model.get_lr()[0], train_step(model, micro_batches)
        log.step(step, {**engine.reduce_metrics(metrics, step, args), "lr": lr})
        if step % (args.eval_interval or epoch) == 0 or step == total:
            log.evaluation(step, evaluation())
        saved.keep(step)
    engine.save(model, tokenizer, args.output_dir)

if __name__ == "__main__": flags.run(main)
