"""Does it fit?  The memory of a training step on each rank, before it is paid, on any laptop.

    python tests/bench/memory.py 8 train_ppo.py --actor_model_name_or_path facebook/opt-13b \
        --critic_model_name_or_path facebook/opt-350m --dtype bf16 --actor_zero_stage 3
    python tests/bench/memory.py --table        # README's: OPT shapes, without network

The first number is of ranks; the rest is the command as it would be run.  Weights, gradients and
optimizer states are counted, by what DeepSpeed keeps at each stage.  Activations and logits are
measured: the shipped forward and its backward run on fake tensors, which have shapes and lifetimes
but no contents, so that 66 billion parameters take seconds.  tests/test_memory.py holds it against
real runs.  Left out: the unsupervised text, buckets that a --deepspeed_config sizes, and with
--align_overflow the critic's activations beside the actor's."""

import importlib
import os
import sys
import tempfile
import weakref
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OPTConfig,
)

from rlhf import engine, models, toy
from rlhf.args import opened, run

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size: gradients wait until so many are there
LIVE = 1_000_000_000  # its stage3_max_live_parameters: so many stay gathered
NF4 = 0.5 + (1 + 4 / 256) / 64  # bytes a weight: 64 have a scale of a byte, 256 of these one of 4
OPT = {  # width, layers, heads
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
}


class Model(NamedTuple):
    """A model of a run.  flags: what its flags begin with; None if it is only read."""

    name: str
    path: str
    flags: str | None
    rows: int  # in a micro-batch
    prompt: int  # tokens
    response: int
    scalar: bool = False
    stage: int = 0  # if it is only read
    offload: bool = False
    sampled: int = 0  # rows that are sampled at a time


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still referred to: now and at most."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage, size):
        self.seen.discard(storage)
        self.now -= size


def build(wanted, args):
    """-> the model, without contents; its ZeRO stage; is it offloaded?"""
    dtype = models.pick_dtype(args.dtype)
    if wanted.path == "toy":
        config = toy.model_config(toy.tokenizer())
    else:
        config = opened(AutoConfig.from_pretrained, wanted.path, "the configuration of")
    config.num_labels = 1
    kind = AutoModelForSequenceClassification if wanted.scalar else AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype)
    model = (models.ScalarModel(model) if wanted.scalar else model).eval()
    model.is_quantized = args.load_in_4bit and wanted.path != "toy" and not wanted.scalar
    if wanted.flags is None:
        return model.requires_grad_(False), 3 if wanted.offload else wanted.stage, wanted.offload

    def initialize(config, **_):  # the shipped train_engine, up to DeepSpeed's door
        return [SimpleNamespace(config=config)]

    with mock.patch.object(engine.deepspeed, "initialize", initialize):
        plain = SimpleNamespace(**{**vars(args), "optim": "adamw"})  # the other reads its numbers
        asked = engine.train_engine(model, plain, wanted.flags, wanted.rows, 1).config
    for layer in packed(model):
        layer.weight.requires_grad_(False)
    return model, asked["zero_optimization"]["stage"], args.offload


def packed(model):
    """The linear maps that --load_in_4bit quantises: all but the head."""
    if not model.is_quantized:
        return []
    head = model.get_output_embeddings()
    return [m for m in model.modules() if type(m) is nn.Linear and m is not head]


def computed(model, wanted, response, bucket):
    """Bytes of all that a forward and, of a trained model, a backward make, at their peak.  So many
    gradients are kept, each with a copy, before they are reduced."""
    mask = torch.ones(wanted.rows, response, dtype=torch.bool)
    prompt_mask = torch.ones(wanted.rows, wanted.prompt + wanted.response - response) > 0
    batch = {"prompt_ids": prompt_mask.long(), "prompt_mask": prompt_mask}
    batch.update(response_ids=mask.long(), mask=mask)
    kept = []

    def reduce(weight):
        kept.append((weight, weight.grad.clone()))
        if sum(copy.numel() for _, copy in kept) > bucket:
            for weight, _ in kept:
                weight.grad = None
            kept.clear()

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(reduce) for weight in trained]
    ids, seen = (
        torch.cat([batch[f"prompt_{n}"], batch[m]], 1).long()
        for n, m in (("ids", "response_ids"), ("mask", "mask"))
    )
    unpadded = mock.patch.object(models, "_flush_right", lambda _: (ids, seen, lambda x: x))
    with unpadded, torch.set_grad_enabled(bool(trained)), Live(model.parameters()) as live:
        read = models.state_values if wanted.scalar else models.policy_logprobs
        out = read(model, batch).sum()
        if trained:
            out.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return live.peak


def estimate(wanted, args, ranks):
    """Bytes on each rank; resident: from step to step; peak: at the worst moment of a step."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, stage, offload = build(wanted, args)
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        peak = computed(model, wanted, wanted.response, BUCKET if stage >= 2 else float("inf"))
        kept, small = (computed(model, wanted, n, 0) for n in (wanted.response, 1))
    size = models.pick_dtype(args.dtype).itemsize
    shard, moments = ranks if stage else 1, 2 if args.optim == "adamw_8bit" else 8
    four = [layer.weight.numel() for layer in packed(model)]
    peak += max(four, default=0) * size  # one at a time in full
    found = {
        "parameters": count,
        "weights": (count * size - sum(four) * (size - NF4)) / (ranks if stage == 3 else 1),
        "gradients": trained * size / (ranks if stage >= 2 else 1),
        # fp32 masters with ZeRO
        "optimizer": trained / shard * (moments + 4 * (stage > 0 or size < 4)),
        "activations": small,
        "logits": kept - small,
    }
    found["CPU"] = 0
    if offload:
        # with the moments and masters there: the gradients in fp32, and a buffer to bring them
        found["CPU"] = found["optimizer"] + found["gradients"] * (stage == 3)
        found["optimizer"] += 8 * trained / shard
        found["CPU"] += 8 * trained / shard
        found["CPU"] += found["weights"] * (stage == 3)
    if wanted.flags == "actor_" and args.enable_ema:  # an fp32 shadow of this rank's weights
        average = 4 * trained / (ranks if stage == 3 else 1)
        found["optimizer"] += average
        found["CPU"] += average * (stage == 3 and offload)
    held = found["gradients"] * (stage == 3)
    resident = found["weights"] + found["optimizer"] + held - found["CPU"]
    gathered = found["weights"] * ranks * (stage == 3)
    config, heads = model.config, model.config.num_attention_heads
    cache = 2 * size * wanted.sampled * (wanted.prompt + wanted.response)  # of keys and values
    cache *= config.num_hidden_layers * getattr(config, "num_key_value_heads", heads)
    cache *= getattr(config, "head_dim", config.hidden_size // heads)
    step = min(gathered, LIVE * size) + peak
    if size < 4:  # gradients, their copies and, for the masters, they again in fp32
        step = max(step, 2 * size * min(trained, BUCKET) + 4 * trained / shard)
    sampling = (gathered + cache) * (wanted.sampled > 0)
    return {**found, "resident": resident, "peak": resident + max(step, sampling)}


def plan(script, args):
    """What models a script's flags ask for."""

    def read_only(name, path, rows, cut, scalar, trained):
        own = getattr(args, f"{name}_zero_stage")
        stage = 3 if (trained if own is None else own) == 3 else 0
        offload = getattr(args, f"offload_{name}_model")
        return Model(name, path, None, rows, *cut, scalar, stage, offload)

    if script != "train_ppo.py":
        path, cut = args.model_name_or_path, (1, args.max_seq_len - 1)
        rows = args.per_device_train_batch_size * (1 if script == "train_sft.py" else 2)
        found = [Model("model", path, "", rows, *cut, script == "train_rm.py")]
        alone = script != "train_dpo.py" or args.precompute_ref_logp
        if not (alone or args.lora_dim and args.only_optimize_lora):
            found.append(read_only("reference", path, rows, cut, False, args.zero_stage))
        return found
    start, scores = args.actor_model_name_or_path, args.critic_model_name_or_path
    cut = (args.max_prompt_seq_len, args.max_answer_seq_len)
    train, sample = args.per_device_training_batch_size, args.per_device_generation_batch_size
    scored = min(sample, args.generation_micro_batch_size)
    found = [
        Model("actor", start, "actor_", train, *cut, sampled=sample),
        Model("critic", scores or start, "critic_", train, *cut, scalar=True),
    ]
    if scores:  # else --reward_fn is the reward
        found.append(read_only("reward", scores, scored, cut, True, args.critic_zero_stage))
    if not (args.actor_lora_dim and args.only_optimize_lora):
        found.append(read_only("reference", start, scored, cut, False, args.actor_zero_stage))
    return found


def total(script, args, ranks):
    """-> {model: its bytes}, the peak of a step with all models in place."""
    found = {model.name: estimate(model, args, ranks) for model in plan(script, args)}
    resident = sum(row["resident"] for row in found.values())
    return found, resident + max(row["peak"] - row["resident"] for row in found.values())


def parsed(script, arguments):
    with mock.patch.object(sys, "argv", [script, *arguments]):
        return importlib.import_module(script.removesuffix(".py")).parse()


def report(ranks, script, *arguments):
    found, peak = total(script, parsed(script, arguments), ranks)
    columns = ("weights", "gradients", "optimizer", "activations", "logits", "CPU", "peak")
    print(f"GiB on each of {ranks} ranks")
    print(f"{'':10}{'parameters':>16}" + "".join(f"{column:>12}" for column in columns))
    for name, row in found.items():
        cells = "".join(f"{row[column] / 2**30:12.2f}" for column in columns)
        print(f"{name:10}{row['parameters']:>16,}{cells}")
    print(f"peak of a step, all models in place: {peak / 2**30:.2f} GiB")


def table():
    """DeepSpeed-Chat's setting: a 350M critic, 256 + 256 tokens, 4 rows a rank, bf16, 8 ranks."""
    checkpointing = ("--actor_gradient_checkpointing", "--critic_gradient_checkpointing")
    ways = {
        "ZeRO-2": ("--actor_zero_stage=2", "--critic_zero_stage=2"),
        "ZeRO-3": ("--actor_zero_stage=3", "--critic_zero_stage=3"),
        "ZeRO-3, checkpointing": ("--actor_zero_stage=3", "--critic_zero_stage=3", *checkpointing),
        "the same, offload": (
            "--actor_zero_stage=3",
            "--critic_zero_stage=3",
            *checkpointing,
            "--offload",
            "--offload_reference_model",
        ),
        "ZeRO-3, LoRA 64": ("--actor_zero_stage=3", "--critic_zero_stage=3", "--actor_lora_dim=64"),
        "4 bits, LoRA 64": (
            "--load_in_4bit",
            "--actor_lora_dim=64",
            "--critic_zero_stage=2",
            *checkpointing,
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, layers, heads) in OPT.items():
            OPTConfig(
                vocab_size=50272,
                hidden_size=width,
                ffn_dim=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                word_embed_proj_dim=width,
            ).save_pretrained(os.path.join(folder, name))
        common = [f"--critic_model_name_or_path={folder}/350m", "--dtype=bf16"]
        common += ["--per_device_generation_batch_size=4", "--per_device_training_batch_size=4"]
        print("| actor | " + " | ".join(ways) + " |\n" + "|---" * (len(ways) + 1) + "|")
        for name in [*OPT][1:]:
            peaks = []
            for way in ways.values():
                path = f"--actor_model_name_or_path={folder}/{name}"
                peaks.append(
                    total("train_ppo.py", parsed("train_ppo.py", (path, *common, *way)), 8)[1]
                )
            print(
                f"| {name} | " + " | ".join(f"{peak / 2**30:.0f}" for peak in peaks) + " |",
                flush=True,
            )


if __name__ == "__main__":
    engine.prepare("error")
    if sys.argv[1:] == ["--table"]:
        table()
    else:
        run(lambda: report(int(sys.argv[1]), *sys.argv[2:]))
