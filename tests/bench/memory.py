"""--dry_run: the memory of a step on each rank, from the models' configurations, before it is paid.

Weights, gradients and optimizer states are counted, by what DeepSpeed keeps at each stage.
Activations and logits are measured: the training forward and backward run on fake tensors, which
have shapes and lifetimes but no contents, so that 66 billion parameters take a laptop seconds."""

import os
import weakref
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf import engine, lora, models

BUCKET, LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's reduce_bucket_size, max_live_parameters


class Model(NamedTuple):
    """A model of a run.  flags: what its flags begin with; None if it is only read."""

    name: str
    path: str
    flags: str | None
    rows: int  # in a micro-batch
    prompt: int  # tokens
    response: int
    scalar: bool = False
    stage: int = 0
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


def _computed(model, wanted, response, bucket):
    """Bytes of all that a forward and, of a trained model, a backward make, at their peak.  So many
    gradients are kept, each with a copy, before they are reduced."""
    mask = torch.ones(wanted.rows, response, dtype=torch.bool)
    prompt_mask = torch.ones(wanted.rows, wanted.prompt + wanted.response - response) > 0
    batch = {
        "prompt_ids": prompt_mask.long(),
        "prompt_mask": prompt_mask,
        "response_ids": mask.long(),
        "mask": mask,
    }
    kept = []

    def reduce(weight):
        kept.append((weight, weight.grad.clone()))
        if sum(copy.numel() for _, copy in kept) > bucket:
            for weight, _ in kept:
                weight.grad = None
            kept.clear()

    hooks = [
        weight.register_post_accumulate_grad_hook(reduce)
        for weight in model.parameters()
        if weight.requires_grad
    ]
    with torch.set_grad_enabled(bool(hooks)), Live(model.parameters()) as live:
        read = models.state_values if wanted.scalar else models.policy_logprobs
        out = read(model, batch).sum()
        if hooks:
            out.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return live.peak


def estimate(args, wanted, ranks):
    """Bytes on each rank; resident: from step to step; peak: at the worst moment of a step."""
    dtype, flags = engine.pick_dtype(args.dtype), wanted.flags
    stage, offload = wanted.stage, wanted.offload
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = models.skeleton(wanted.path, dtype, wanted.scalar).eval().requires_grad_(False)
        if flags is not None:
            stage, offload = engine.adapt(model.requires_grad_(True), args, flags), args.offload
        linears = (
            {id(layer.base.weight) for layer in lora.layers(model).values()}
            if flags != "critic_" and getattr(args, "load_in_4bit", False)
            else ()
        )
        sizes = [
            (p.numel(), 0.516 if id(p) in linears else p.element_size())  # nf4: 4.13 bits
            for p in model.parameters()
        ]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        reduced = BUCKET if stage >= 2 else float("inf")
        peak = _computed(model, wanted, wanted.response, reduced)
        kept, small = (_computed(model, wanted, n, 0) for n in (wanted.response, 1))
    shard, size, count = ranks if stage else 1, dtype.itemsize, sum(n for n, _ in sizes)
    found = {
        "parameters": count,
        "trained": trained,
        "weights": sum(n * bytes for n, bytes in sizes) / (ranks if stage == 3 else 1),
        "gradients": trained * size / (shard if stage >= 2 else 1),
        "optimizer": trained
        / shard
        * ((2.03 if args.optim == "adamw_8bit" else 8) + 4 * (stage > 0 or size < 4)),
        "activations": small,
        "logits": kept - small,
    }
    on_cpu = (found["optimizer"] + found["gradients"]) * offload * bool(trained) + found[
        "weights"
    ] * (offload and stage == 3)
    resident = found["weights"] + found["optimizer"] + found["gradients"] * (stage == 3) - on_cpu
    gathered = size * count if stage == 3 else 0
    config, heads = model.config, model.config.num_attention_heads
    cache = (
        2
        * config.num_hidden_layers
        * getattr(config, "num_key_value_heads", heads)
        * getattr(config, "head_dim", config.hidden_size // heads)
        * size
        * wanted.sampled
        * (wanted.prompt + wanted.response)
    )  # of keys and values
    peak = max(min(gathered, LIVE * size) + peak, (gathered + cache) * (wanted.sampled > 0))
    return {**found, "CPU": on_cpu, "resident": resident, "peak": resident + peak}


def report(args, *wanted):
    """Print the table of a run's models."""
    ranks = args.dry_run or int(os.environ.get("WORLD_SIZE", 1))
    found = {model.name: estimate(args, model, ranks) for model in wanted}
    resident = sum(row["resident"] for row in found.values())
    print(f"GiB on each of {ranks} ranks, {engine.pick_dtype(args.dtype)}".replace("torch.", ""))
    columns = ("weights", "gradients", "optimizer", "activations", "logits", "CPU", "peak")
    print(f"{'':12}{'parameters':>16}" + "".join(f"{column:>12}" for column in columns))
    for name, row in found.items():
        print(
            f"{name:12}{row['parameters']:>16,}"
            + "".join(f"{row[column] / 2**30:12.3f}" for column in columns)
        )
    peak = resident + max(row["peak"] - row["resident"] for row in found.values())
    print(f"peak of a step, all models in place: {peak / 2**30:.3f} GiB")
