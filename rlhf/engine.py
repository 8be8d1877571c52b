"""DeepSpeed's engines, one global mean an optimizer step, and collectives that work just as well in
a process that no launcher started.  The only module that imports deepspeed."""
import atexit
import contextlib
import datetime
import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections import defaultdict
from functools import partial

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed
import datasets
import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf import lora, models
from rlhf.args import InputError, needed, opened

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def init(args):
    """Join the other processes, if any; seed everything, quieten the libraries."""
    quieten(args.log_level)
    if "RANK" not in os.environ:                              # python train_X.py
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT="0")
    if os.environ["WORLD_SIZE"] == "1" or not shutil.which(os.environ.get("CXX", "c++")):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False      # it would be compiled
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:                                                     # torchrun's name, or DeepSpeed's
        here = {"LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"} & os.environ.keys()
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // min(int(os.environ[name]) for name in here)))
    with hushed(args):
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False,
                                   timeout=datetime.timedelta(hours=4))   # rank 0 may tokenise
    atexit.register(_leave_group)
    transformers.set_seed(args.seed)


def _leave_group():
    """Lest gloo's threads outlive Python and abort.  After a failure others may wait: just go."""
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()


def seed_ranks(seed):
    """From here on every rank draws its own noise; models were built alike before."""
    transformers.set_seed(seed + 100003 * rank())


def quieten(level):
    """Let through only the libraries' messages of this level and above."""
    if level == "error":
        warnings.filterwarnings("ignore")
    if level in ("error", "warning"):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    for library in (transformers.utils.logging, datasets.utils.logging):
        library.set_verbosity(getattr(logging, level.upper()))
    for name in ("DeepSpeed", "torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(level.upper())


def hushed(args):
    """A context in which DeepSpeed's own print calls go nowhere."""
    return contextlib.redirect_stdout(io.StringIO()) if args.log_level == "error" \
        else contextlib.nullcontext()


def pick_dtype(name):
    """--dtype -> torch dtype."""
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return DTYPES[name]


def train_engine(model, args, name, micro_batch, total_steps):
    """A DeepSpeed engine with adapters, AdamW (no decay for biases and norms) and a Transformers
    schedule, as the flags say; name: what those of this model begin with (step 3: actor_, critic_).
    """
    of = lambda flag: getattr(args, name + flag)
    dtype, stage = pick_dtype(args.dtype), of("zero_stage")
    if args.offload and (not stage or args.optim != "adamw"):
        raise InputError(f"--offload moves shards of AdamW to the CPU: give --{name}zero_stage 1, 2 "
                         f"or 3, and no other --optim")
    if getattr(model, "is_loaded_in_4bit", False) and (stage == 3 or not of("lora_dim")):
        raise InputError(f"--load_in_4bit freezes a copy of the weights on every rank: give "
                         f"--{name}lora_dim, and --{name}zero_stage 0, 1 or 2")
    if dtype != torch.float32:     # at stage 0, DeepSpeed 0.19.8 divides fp16 gradients by a loss
        stage = max(stage, 1)      # scale that it never applied (its PR 8393); bf16 steps differ too
    if of("lora_dim"):
        lora.add(model, of("lora_dim"), args.lora_alpha, of("lora_module_name"),
                 args.only_optimize_lora)
    if of("gradient_checkpointing"):
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):    # its own way needs dropout's mode
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    groups = defaultdict(list)
    for weight_name, weight in model.named_parameters():
        if weight.requires_grad:
            rate = of("lora_learning_rate" if ".lora_" in weight_name else "learning_rate")
            groups[rate, of("weight_decay") if weight.ndim >= 2 else 0.0].append(weight)
    adam = deepspeed.ops.adam.DeepSpeedCPUAdam if args.offload else \
        needed("bitsandbytes", "--optim adamw_8bit").optim.AdamW8bit \
        if args.optim == "adamw_8bit" else partial(torch.optim.AdamW, fused=True)
    optimizer = adam([{"params": weights, "lr": rate, "weight_decay": decay}
                      for (rate, decay), weights in groups.items()], betas=(0.9, args.adam_beta2))
    schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps,
                                          total_steps)
    config = {"train_micro_batch_size_per_gpu": micro_batch,
              "gradient_accumulation_steps": args.gradient_accumulation_steps,
              "gradient_clipping": args.max_grad_norm, "steps_per_print": 1 << 31,
              "zero_allow_untested_optimizer": True, **_memory(dtype, stage, args.offload)}
    if args.enable_tensorboard:
        path = args.tensorboard_path or os.path.join(args.output_dir, "tensorboard")
        config["tensorboard"] = {"enabled": True, "output_path": path, "job_name": ""}
    if args.deepspeed_config:
        read = lambda path: {**json.loads(open(path).read())}
        _merge(config, opened(read, args.deepspeed_config, "the JSON object in"),
               args.deepspeed_config)
    with hushed(args):
        engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule,
                                      config=config)[0]
    engine.passes = 4 if of("gradient_checkpointing") else 3    # forward, backward of twice its cost
    return engine


def _memory(dtype, stage, offload):
    """Where a model's weights, gradients and optimizer lie, and in what precision."""
    zero = {"stage": stage}
    for name in ("offload_optimizer", "offload_param")[:(stage + 1) // 2 if offload else 0]:
        zero[name] = {"device": "cpu"}
    return {"zero_optimization": zero,
            **{name: {"enabled": dtype == DTYPES[name]} for name in ("bf16", "fp16")}}


def _merge(config, given, path, where=""):
    """--deepspeed_config into what the flags say.  InputError where they disagree."""
    for key, value in given.items():
        ours = config.setdefault(key, value)
        if key in ("optimizer", "scheduler", "train_batch_size"):
            raise InputError(f"{path}: {key} is for the flags to choose: remove it")
        if isinstance(ours, dict) and isinstance(value, dict):
            _merge(ours, value, path, f"{where}{key}.")
        elif value not in (ours, "auto"):
            raise InputError(f"{path}: {where}{key} is {value}, but the flags make it {ours}: "
                             f"change one of them")


def frozen(model, args=None, name=None, stage=0):
    """A model that is only read: reference, reward.  Sharded if offloaded, or at ZeRO-3: its own, or
    else that of the trained one."""
    own, offload = (getattr(args, flag, None) for flag in (f"{name}_zero_stage", f"offload_{name}_model"))
    model.eval().requires_grad_(False)
    if (stage if own is None else own) < 3 and not offload:
        return model.to(device())
    config = {"train_micro_batch_size_per_gpu": 1, **_memory(pick_dtype(args.dtype), 3, offload)}
    with hushed(args):
        return deepspeed.initialize(model=model, config=config)[0]


def global_denom(masks):
    """What the sums of each micro-batch of a step are divided by: (valid tokens of all `masks` on
    all ranks) / (micro-batches x ranks).  DeepSpeed averages gradients over these two, so that the
    step follows the mean over all tokens."""
    tokens = torch.stack([mask.sum() for mask in masks]).sum().float()
    return all_sum(tokens) / (len(masks) * world_size())


def step(engine):
    """engine.step() -> the gradient's norm before clipping; None where it only accumulates."""
    last = engine.is_gradient_accumulation_boundary()
    norm = None
    if last and engine.optimizer is engine.basic_optimizer:      # fp32, ZeRO 0: no norm is kept
        norm = torch.nn.utils.get_total_norm(
            p.grad for p in engine.module.parameters() if p.grad is not None)
    engine.step()
    vars(engine.optimizer).pop("has_overflow", None)                   # align_overflow's
    if not last:                                     # DeepSpeed still has the step's before
        return None
    return float(engine.get_global_grad_norm() if norm is None else norm)


def align_overflow(*engines):
    """Where the fp16 gradients of one overflow, let all skip their next step."""
    if engines[0].fp16_enabled() and engines[0].is_gradient_accumulation_boundary():
        overflow = any([engine.optimizer.has_overflow() for engine in engines])
        for engine in engines:
            engine.optimizer.has_overflow = lambda *_, **__: overflow


@contextlib.contextmanager
def whole(engine):
    """The engine's plain module with all parameters in place, gathered once under ZeRO-3."""
    if engine.zero_optimization_stage() < 3:
        yield engine.module
        return
    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for hook in offload.forward_hooks + offload.backward_hooks:   # they would free parameters
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        for parameter in engine.module.parameters():
            parameter.ds_active_sub_modules.clear()
        yield engine.module
        offload._register_deepspeed_module(offload.module)


def save(engine, tokenizer, path, start=None):
    """Save an engine's model in the Hugging Face layout; rank 0 writes.  start: see models.py."""
    sharded = engine.zero_optimization_stage() == 3
    weights = engine._zero3_consolidated_16bit_state_dict() if sharded else None
    on_rank_zero(lambda: models.save_model(engine.module, tokenizer, path, weights, start))


rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1


def device():
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def all_sum(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(tensor):
    """One tensor of the same shape from every rank -> (ranks, ...)."""
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    if not dist.is_initialized():
        return tensor[None]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def gather_rows(values, total):
    """Per-row values of all ranks' eval_batches -> (total, ...) in the data set's order."""
    return gather(values).transpose(0, 1).flatten(0, 1)[:total]


def _by_name(columns, total=torch.mean):
    """{name: (N,)} -> {name: scalar}: the max, min, total of names that end so, else the mean."""
    how = {"max": torch.amax, "min": torch.amin, "total": total}
    return {name: how.get(name.rpartition("_")[2], torch.mean)(values.double())
            for name, values in columns.items()}


def summarise(history):
    """The dicts of several micro-batches -> one; where one has None, it is left out."""
    return _by_name({name: torch.stack([torch.as_tensor(metrics[name]) for metrics in history
                                        if metrics[name] is not None]) for name in history[0]})


def reduce_metrics(metrics):
    """This rank's {name: scalar} -> all ranks'."""
    values = [torch.as_tensor(v, dtype=torch.float64, device=device()) for v in metrics.values()]
    everyone = gather(torch.stack(values).detach()).unbind(1)                # a (ranks,) each name
    return {name: value.item()
            for name, value in _by_name(dict(zip(metrics, everyone)), torch.sum).items()}


def on_rank_zero(function, every_node=False):
    """Rank 0 (or each node's first) calls the function, the others wait; its error ends all."""
    error = None
    if (int(os.environ.get("LOCAL_RANK", 0)) if every_node else rank()) == 0:
        try:
            function()
        except Exception as caught:                  # raised below, when the others have heard
            error = caught
    if all_sum(torch.tensor(float(error is not None), device=device())):
        raise error or InputError("another rank stopped")
