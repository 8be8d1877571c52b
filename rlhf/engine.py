"""DeepSpeed's engines, one global mean an optimizer step, and collectives that work just as well in
a process that no launcher started.  The only module that imports deepspeed."""
import atexit
import contextlib
import datetime
import io
import logging
import os
import shutil
import sys
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed
import datasets
import torch
import torch.distributed as dist
import transformers

from rlhf import models
from rlhf.args import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def init(args):
    """Join the other processes, if any; seed everything, quieten the libraries."""
    quieten(args.log_level)
    if "RANK" not in os.environ:                              # python train_X.py
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT="0")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if os.environ["WORLD_SIZE"] == "1" or not compiler:       # DeepSpeed would compile collectives
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    with hushed(args):
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False,
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
    for name in ("DeepSpeed", "torch.distributed"):
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


def train_engine(model, args, learning_rate, weight_decay, zero_stage, micro_batch, total_steps):
    """A DeepSpeed engine with AdamW (no decay for biases and norms) and a Transformers schedule."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, (0.9, args.adam_beta2), fused=True)
    schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps,
                                          total_steps)
    dtype = pick_dtype(args.dtype)
    config = {"train_micro_batch_size_per_gpu": micro_batch,
              "gradient_accumulation_steps": args.gradient_accumulation_steps,
              "gradient_clipping": args.max_grad_norm, "steps_per_print": 1 << 31,
              "zero_optimization": {"stage": zero_stage},
              **{name: {"enabled": dtype == DTYPES[name]} for name in ("bf16", "fp16")}}
    if args.enable_tensorboard:
        path = args.tensorboard_path or os.path.join(args.output_dir, "tensorboard")
        config["tensorboard"] = {"enabled": True, "output_path": path, "job_name": ""}
    with hushed(args):
        return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule,
                                    config=config)[0]


def frozen(model):
    """A model that is only read: reference, reward model."""
    return model.to(device()).eval().requires_grad_(False)


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
    if not last:                                     # DeepSpeed still has the step's before
        return None
    return float(engine.get_global_grad_norm() if norm is None else norm)


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


def save(engine, tokenizer, path):
    """Save an engine's model in the Hugging Face layout; rank 0 writes."""
    sharded = engine.zero_optimization_stage() == 3
    weights = engine._zero3_consolidated_16bit_state_dict() if sharded else None
    on_rank_zero(lambda: models.save_model(engine.module, tokenizer, path, weights))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


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
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
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
