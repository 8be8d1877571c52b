"""Step 2, reward model: Bradley-Terry on the last-token scores of preferred and rejected responses.

    python train_rm.py                                       # the embedded world, one process
    deepspeed --num_gpus 8 train_rm.py --model_name_or_path facebook/opt-350m \\
        --data_path Dahoas/rm-static --learning_rate 5e-5 --weight_decay 0.1 --zero_stage 2
"""
from functools import partial

import torch

from rlhf import args as flags
from rlhf import batches, data, engine, models
from rlhf.log import Log, count_tokens, forward_flops
from rlhf.losses import bradley_terry_loss

def parse():
    parser = flags.Parser(__doc__)
    flags.add_data(parser)
    flags.add_training(parser, learning_rate=5e-5)
    flags.add_run(parser, "output/rm")
    return parser.parse_args()

def statistics(chosen, rejected):
    """Scores of pairs, (N,) each -> accuracy, mean scores, margin."""
    return {"accuracy": (chosen > rejected).double().mean(), "chosen_score": chosen.mean(),
            "rejected_score": rejected.mean(), "margin": (chosen - rejected).mean()}

def train_step(model, micro_batches):
    """One optimizer step.  Micro-batches hold equally many pairs: their mean is the global mean."""
    model.eval()                              # no dropout: the scores of a pair are compared
    history = []
    for batch in micro_batches:
        chosen, rejected = models.sequence_scores(model, batch).chunk(2)
        loss = bradley_terry_loss(chosen, rejected)
        model.backward(loss)
        history.append({"loss": loss.detach(), "grad_norm": engine.step(model),
                        **statistics(chosen.detach(), rejected.detach())})
    return {**engine.summarise(history), "tokens_total": count_tokens(micro_batches),
            "flops_total": model.passes * forward_flops(model, micro_batches)}

@torch.no_grad()
def evaluate(model, rows, collate, batch_size):
    """The statistics of the held-out pairs and, where it is known, the best accuracy possible."""
    model.eval()
    pairs = torch.cat([torch.stack(models.sequence_scores(model, batch).chunk(2), 1)
                       for batch in batches.eval_batches(rows, collate, batch_size)])
    found = statistics(*engine.gather_rows(pairs, len(rows)).unbind(1))
    if "bayes" in rows.column_names and None not in rows["bayes"]:
        found["accuracy_ceiling"] = sum(max(p, 1 - p) for p in rows["bayes"]) / len(rows)
    return {f"eval_{name}": float(value) for name, value in found.items()}

def main():
    args = parse()
    engine.init(args)

    tokenizer = models.load_tokenizer(args.model_name_or_path, args)
    train, held_out = data.load(args, tokenizer, 2)
    to_batch = partial(batches.collate, tokenizer, responses=("chosen", "rejected"))
    cut, epoch, total = batches.plan(args, train)

    model = models.load_scalar(args.model_name_or_path, tokenizer, engine.pick_dtype(args.dtype),
                               args.max_seq_len, new_head=True)
    model = engine.train_engine(model, args, "", cut[0], total)

    log = Log(args, total, ("loss", "accuracy", "margin", "lr", "tokens_per_second"), model)
    evaluation = partial(evaluate, model, held_out, to_batch, args.per_device_eval_batch_size)
    log.evaluation(0, evaluation())
    for step, micro_batches in batches.optimizer_steps(train, to_batch, *cut, args.seed, total,
                                                       args.group_by_length):
        lr, metrics = model.get_lr()[0], train_step(model, micro_batches)
        log.step(step, {**engine.reduce_metrics(metrics), "lr": lr})
        if step % (args.eval_interval or epoch) == 0 or step == total:
            log.evaluation(step, evaluation())

    engine.save(model, tokenizer, args.output_dir)
    log.close()

if __name__ == "__main__":
    flags.run(main)
