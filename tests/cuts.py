"""Run by the launcher: one optimizer step of every script on the same eight rows, cut and sharded in
every way.  cuts.py OUT POLICY REWARD_MODEL writes the steps to OUT.

The rows' lengths differ widely.  PPO is fed the same rollout.  Without adapters,
DPO's reference is another model than its policy.  In the step `naive` each micro-batch is averaged
over its own tokens, as one would write it first."""

import copy
import sys
from functools import partial

import torch

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import batches, engine, lora, models
from rlhf.ema import EMA
from tests.conftest import rows_of

ROWS = 8
LENGTHS = [
    (3, 1, 9),
    (9, 12, 1),
    (1, 5, 2),
    (7, 2, 4),
    (2, 20, 3),
    (5, 1, 11),
    (4, 3, 6),
    (8, 7, 2),
]
TEXTS = [
    tuple(" " + " ".join(f"w{(i + j * k) % 30}" for j in range(n)) for k, n in enumerate(row, 1))
    for i, row in enumerate(LENGTHS)
]
MODULES = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo, "dpo": train_dpo}


def parsed(module, **settings):
    sys.argv = ["train", *(f"--{name}={value}" for name, value in settings.items() if value != "")]
    sys.argv += [f"--{name}" for name, value in settings.items() if value == ""]
    return module.parse()


def mine(tokenizer, micro, responses):
    """This rank's micro-batches of the eight rows."""
    rows = rows_of(tokenizer, TEXTS)
    share = rows[engine.rank() :: engine.world_size()]
    cut = [share[i : i + micro] for i in range(0, len(share), micro)]
    return [batches.collate(tokenizer, part, responses) for part in cut]


def experience(tokenizer, micro):
    """The same rollout for everyone: made up, from each row's own seed."""
    batch = models.stack(mine(tokenizer, ROWS, ("chosen",)), tokenizer.pad_token_id)
    numbers = {}
    for name in ("old_logp", "advantages", "old_values", "returns"):
        numbers[name] = torch.zeros(batch["mask"].shape)
        for i in range(len(batch["mask"])):
            seed = 97 * (engine.rank() + i * engine.world_size()) + len(name)
            draw = torch.randn(32, generator=torch.Generator().manual_seed(seed))
            numbers[name][i] = draw[: batch["mask"].shape[1]] - 3.0 * (name == "old_logp")
    return {**batch, **numbers}


def other_policy(*loaded):
    model, noise = models.load_policy(*loaded), torch.Generator().manual_seed(2)
    for weight in model.parameters():
        weight.data += 0.5 * torch.randn(weight.shape, generator=noise)
    return model


def step(kind, paths, stage, micro, dtype="fp32", lora_dim=0, **more):
    """-> metrics, the weights before and after, and the average with decay 0.5."""
    accumulation = ROWS // engine.world_size() // micro
    common = dict(gradient_accumulation_steps=accumulation, dtype=dtype, max_grad_norm=0.3)
    common.update(lr_scheduler_type="constant", **more)
    torch.manual_seed(1)
    tokenizer = models.load_tokenizer(paths[0])
    if kind == "ppo":
        rows = dict(
            per_device_generation_batch_size=micro * accumulation,
            per_device_training_batch_size=micro,
            num_warmup_steps=0,
        )
        rates = dict(actor_lr=1e-3, critic_lr=1e-3, actor_lora_dim=lora_dim)
        stages = dict(actor_zero_stage=stage, critic_zero_stage=stage)
        texts = dict(unsupervised_dataset_name=f"{paths[0]}/texts.txt", unsup_coef=3)
        texts.update(
            max_prompt_seq_len=4, max_answer_seq_len=8, data_output_path=f"{paths[0]}/cache"
        )
        args = parsed(train_ppo, **rows, **rates, **stages, **texts, **common)
        actor = models.load_policy(paths[0], tokenizer, dtype)
        critic = models.load_scalar(paths[1], tokenizer, dtype)
        actor, critic = (
            engine.train_engine(model, args, name, micro, 10)
            for model, name in ((actor, "actor_"), (critic, "critic_"))
        )
        actor.eval(), critic.eval()
        engines, train = [actor, critic], partial(train_ppo.ppo_update, actor, critic)
        batch = experience(tokenizer, micro)
        run = partial(train, batch, args, text=batches.text_stream(args, tokenizer))
    else:
        module = MODULES[kind]
        args = parsed(module, lr=1e-3, zero_stage=stage, lora_dim=lora_dim, **common)
        if kind == "rm":
            model = models.load_scalar(paths[1], tokenizer, dtype)
        else:
            model = models.load_policy(paths[0], tokenizer, dtype)
        responses = ("chosen",) if kind == "sft" else ("chosen", "rejected")
        engines = [engine.train_engine(model, args, "", micro, 10)]
        rows = mine(tokenizer, micro, responses)
        run = partial(module.train_step, engines[0], rows)
        if kind == "dpo":
            load = partial(other_policy, paths[0], tokenizer, dtype)
            reference = engine.reference(engines[0], load, args, "")
            run = partial(module.train_step, engines[0], reference, rows, args)
    before = full(engines[0])
    ema = EMA(engines[0].module, 0.5)
    found = engine.reduce_metrics(run())
    if kind != "ppo" or engines[0].was_step_applied():
        ema.update()
    after = [full(e) for e in engines]
    ema.load()
    average = full(engines[0])
    return {"metrics": found, "before": before, "after": after, "average": average}


def full(trained):
    """Rank 0: every weight of an engine, in fp32; others: nothing."""
    sharded = trained.zero_optimization_stage() == 3
    state = trained._zero3_consolidated_16bit_state_dict() if sharded else None
    if engine.rank() != 0:
        return None
    state = copy.deepcopy(state or trained.module.state_dict())
    if lora.layers(trained.module):
        state = lora.merge(trained.module, state)
    return {name: weight.float() for name, weight in state.items()}


def main():
    out, *paths = [text for text in sys.argv[1:] if not text.startswith("--local_rank")]
    engine.init(parsed(train_sft))
    if engine.rank() == 0:  # of PPO's loss of text: packs of 3 to 12 tokens
        with open(f"{paths[0]}/texts.txt", "w") as file:
            file.write("\n\n".join(chosen.strip() for _, chosen, _ in TEXTS for _ in range(3)))
    many, one = {1: [8, 1], 2: [4, 2]}[engine.world_size()]
    take, steps = partial(step, paths=paths), {}
    alone = engine.world_size() == 1
    for kind in MODULES:
        for stage in (0, 3) if alone else range(4):
            for micro in (many, one) if stage == 0 else (many,):
                steps[kind, stage, micro] = take(kind, stage=stage, micro=micro)
    for kind in ("sft", "ppo", "dpo"):
        for stage in (0,) if alone else (0, 3):
            steps[kind, stage, "lora"] = take(kind, stage=stage, micro=many, lora_dim=2)
    for stage in (0, 1, 3):
        steps["sft", stage, "bf16"] = take("sft", stage=stage, micro=many, dtype="bf16")
    for stage in () if alone else (2, 3):
        steps["sft", stage, "offload"] = take("sft", stage=stage, micro=many, offload="")
    for stage in (0,) if alone else (0, 3):
        name, flag = "checkpointing", {"gradient_checkpointing": ""}
        steps["sft", stage, name] = take("sft", stage=stage, micro=many, **flag)
    masked_mean = train_sft.masked_mean
    train_sft.masked_mean = lambda x, mask, denom: masked_mean(x, mask)
    steps["sft", 0, "naive"] = take("sft", stage=0, micro=many)
    if engine.rank() == 0:
        torch.save(steps, out)


if __name__ == "__main__":
    main()
