"""The field's rules of thumb as checks on the flags: what is unusual, and who says so."""
from rlhf import engine, log
from rlhf.args import InputError

WHOSE, DSC, FIELD = ("", "actor_", "critic_"), "DeepSpeed-Chat's recipe", "common practice"
RULES = {                                                         # what, from, to, by whom
    "sft": (("learning_rate", 9.65e-6, 5e-5, FIELD), ("effective_batch", 32, 128, FIELD),
            ("lora_learning_rate", 5e-5, 5e-4, "rank 8-16: 1e-4 to 5e-4, 32-64: 5e-5 to 2e-4"),
            ("weight_decay", 0, 0, DSC), ("num_train_epochs", 2, 16, DSC)),
    "rm": (("learning_rate", 3e-6, 5e-5, FIELD), ("effective_batch", 32, 64, FIELD),
           ("weight_decay", 0.1, 0.1, DSC), ("num_train_epochs", 1, 1, DSC)),
    "dpo": (("learning_rate", 2e-6, 2e-5, FIELD), ("lora_learning_rate", 5e-5, 2e-4, FIELD),
            ("beta", 0.01, 0.5, "clean pairs 0.1-0.3, AI labels 0.05-0.1, noisy 0.01-0.05"),
            ("effective_batch", 16, 64, FIELD)),
    "ppo": (("actor_learning_rate", 1e-6, 1e-5, FIELD), ("critic_learning_rate", 5e-6, 1e-4, FIELD),
            ("actor_lora_learning_rate", 1e-5, 5e-5, FIELD), ("effective_batch", 16, 64, FIELD),
            ("kl_coef", 0.01, 2, "0.01 loose, 0.5 to 2 tight"), ("rollout_batches", 1, 1, DSC),
            ("actor_weight_decay", 0, 0, DSC), ("critic_weight_decay", 0, 0, DSC),
            ("num_train_epochs", 1, 1, DSC), ("ppo_epochs", 1, 1, DSC), ("enable_ema", 1, 1, DSC))}
COMMON = (("warmup_share", 0.05, 0.1, FIELD), ("max_grad_norm", 0.5, 1, FIELD), *(
    (whose + name, *rule) for whose in WHOSE for name, *rule in (
        ("lora_dim", 4, 64, FIELD), ("lora_alpha_over_rank", 2, 2, "QLoRA"))))

def check(args, step, total):
    """Say the effective batch of a run of `total` optimizer steps and which RULES it breaks: none
    on the embedded world, a thousand times smaller.  InputError for any with --strict_advice."""
    of, idle = vars(args).get, ["num_train_epochs"] * bool(args.max_steps)    # has nothing to say
    rows = of("step_rows") or args.per_device_train_batch_size * args.gradient_accumulation_steps
    batch, judged = rows * engine.world_size(), args.data_path != ["toy"] and not args.lr_range_test
    lrs = {n: r * engine.lr_scale(args, batch) for n, r in vars(args).items() if "_rate" in n}
    values = dict(vars(args), **lrs, effective_batch=batch, rollout_batches=of("rows", rows) / rows,
                  warmup_share=args.num_warmup_steps / total)
    for whose in WHOSE:
        if rank := of(f"{whose}lora_dim"):
            values[f"{whose}lora_alpha_over_rank"] = (args.lora_alpha or 2 * rank) / rank
            scalar = step == "rm" or whose == "critic_"               # its head trains at that rate
            idle += [f"{whose}learning_rate"] * (args.only_optimize_lora and not scalar)
        else:
            idle += [f"{whose}lora_learning_rate", f"{whose}lora_dim"]
    found = [f"{name} is {values[name]:g}, usual: {low:g}{f' to {high:g}' * (low < high)} ({who})"
             for name, low, high, who in (RULES[step] + COMMON) * judged
             if name not in idle and not low <= values.get(name, low) <= high]
    log.say("\nadvice: ".join([f"effective batch {batch}, {total} optimizer steps", *found]))
    if found and args.strict_advice: raise InputError(f"--strict_advice: {'; '.join(found)}")
