"""DeepSpeed's engines, one global mean an optimizer step, and collectives that work just as well in
a process that no launcher started.  The only module that imports deepspeed."""
import atexit, contextlib, ctypes, datetime, importlib.util, io, json, logging, os, sys, warnings
from collections import defaultdict
from functools import partial
# Large tensors on huge pages: the system hands over, and clears, 512 times fewer of them.
os.environ.update({"TOKENIZERS_PARALLELISM": "false", "THP_MEM_ALLOC_ENABLE": "1", **os.environ})
with contextlib.redirect_stdout(io.StringIO()): import deepspeed
import datasets, torch, transformers
from torch import distributed as dist, nn, optim
from torch.utils import benchmark, checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from rlhf import lora, models
from rlhf.args import InputError, check_writable, cores, opened, writing

MODELS = {"score": "reward model", "kl": "reference", "value": "critic", "return": "critic"}
rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1
device = lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
lr_scale = lambda a, n: (n / a.base_batch_size) ** dict(none=0, sqrt=.5, linear=1)[a.lr_scaling]
anywhere = lambda fact: bool(gather(torch.tensor(float(fact), device=device())).any())
# Per-row values of all ranks' eval_batches -> (total, ...) in the data set's order.
gather_rows = lambda values, total: gather(values).transpose(0, 1).flatten(0, 1)[:total]

def init(args):
    """Join the other processes, if any; seed everything -> args."""
    args.output_dir += "/lr_range_test" if args.lr_range_test else ""  # models of a ramp are ruins
    check_writable(args.output_dir)
    if (args.load_in_4bit or "8bit" in args.optim) and not importlib.util.find_spec("bitsandbytes"):
        raise InputError("--load_in_4bit and --optim adamw_8bit need pip install -e '.[4bit]'")
    prepare(args.log_level)
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update({} if "RANK" in os.environ else alone)               # python train_X.py
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False      # a lock outlives kills
    deepspeed.get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    sizes = filter(None, map(os.environ.get, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")))
    torch.set_num_threads(max(1, cores() // min(map(int, sizes))))
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(hours=4))  # to tokenise
    deepspeed.comm.configure(enabled=args.profile, prof_all=args.profile)
    # Lest gloo's threads outlive Python and abort.  After a failure others may wait: just go.
    atexit.register(lambda: os._exit(1) if hasattr(sys, "last_value") else dist.is_initialized()
                    and dist.destroy_process_group())
    transformers.set_seed(args.seed)
    return args

def prepare(level):
    """Let through only the libraries' messages of this level and above.  On CPUs, keep freed memory
    and take oneDNN's fp32 products, on AMD's twice MKL's speed, unless (AMX) they are in bf16."""
    if not torch.cuda.is_available():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)                   # of glibc
        mallopt(-1, -1), mallopt(-4, 0)         # M_TRIM_THRESHOLD, M_MMAP_MAX: clearing takes time
        torch.set_float32_matmul_precision("medium")
        x = torch.full((768, 768), 1 + 2 ** -12)                                      # 1 in bf16
        torch.set_float32_matmul_precision("medium" if (x @ x).min() > 768.3 else "highest")
    if level == "error":
        warnings.filterwarnings("ignore")
        datasets.disable_progress_bars(), transformers.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "torch.distributed", "transformers", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(level.upper())

def communicated():
    """The seconds of DeepSpeed's collectives on this rank since the last call (--profile)."""
    deepspeed.comm.comm.comms_logger.comms_dict.clear()             # its times are running totals
    return sum(timer.elapsed() for timer in deepspeed.comm.comm.timers.timers.values()) / 1000

def products_rate(dtype):
    """TFLOP/s of products of matrices of 2048 x 2048 on this rank: what a step could reach."""
    x = torch.ones(2048, 2048, dtype=models.pick_dtype(dtype), device=device())
    timer = benchmark.Timer("x @ x", globals=locals(), num_threads=torch.get_num_threads())
    return 2 * 2048 ** 3 / timer.timeit(8).mean / 1e12                          # it warms up first

def train_engine(model, args, name, micro_batch, steps):
    """A DeepSpeed engine with adapters, AdamW (no decay for biases and norms) and a Transformers
    schedule, as the flags say; name: what this model's begin with (step 3: actor_, critic_)."""
    transformers.set_seed(args.seed)                              # adapters are alike on all ranks
    of = lambda flag: getattr(args, name + flag)
    dtype, stage = models.pick_dtype(args.dtype), of("zero_stage")
    if args.offload and not stage:
        raise InputError(f"--offload moves shards to the CPU: give --{name}zero_stage 1, 2 or 3")
    if dtype != torch.float32:   # at stage 0, DeepSpeed 0.19.8 divides fp16 gradients by a loss
        stage = max(stage, 1)    # scale that it never applied (its PR 8393); bf16 steps differ too
    if dim := of("lora_dim"):
        if args.only_optimize_lora and args.add_eot_token:
            raise InputError("--add_eot_token's row would not train: give --no-only_optimize_lora")
        lora.add(model, dim, args.lora_alpha, of("lora_module_name"), args.only_optimize_lora)
    if args.load_in_4bit and name != "critic_" and (
            stage == 3 or not dim or not getattr(model, "is_quantized", False)):
        raise InputError(f"--load_in_4bit needs a trained policy, --{name}lora_dim, a stage < 3")
    if of("gradient_checkpointing"):
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):    # Transformers': in train() only
                layer.forward = partial(checkpoint.checkpoint, layer.forward, use_reentrant=False)
    scale = lr_scale(args, micro_batch * args.gradient_accumulation_steps * world_size())
    groups, ramp = defaultdict(list), args.lr_range_test
    for weight_name, weight in model.named_parameters():
        if weight.requires_grad:
            rate = of("lora_learning_rate" if ".lora_" in weight_name else "learning_rate") * scale
            groups[1e-7 if ramp else rate, of("weight_decay") * (weight.ndim >= 2)].append(weight)
    kind = partial(optim.AdamW, fused=True) if args.optim == "adamw" else \
        importlib.import_module("bitsandbytes").optim.AdamW8bit
    adam = kind([{"params": weights, "lr": rate, "weight_decay": decay}
                 for (rate, decay), weights in groups.items()], betas=(0.9, args.adam_beta2))
    end = {"min_lr_rate": args.min_lr_ratio} if "min_lr" in args.lr_scheduler_type else {}
    schedule = optim.lr_scheduler.ExponentialLR(adam, 1e7 ** (1 / steps)) if ramp else \
        transformers.get_scheduler(args.lr_scheduler_type, adam, args.num_warmup_steps, steps, end)
    config = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
              **_memory(dtype, stage, args.offload, micro_batch), "gradient_accumulation_steps":
              args.gradient_accumulation_steps, "gradient_clipping": args.max_grad_norm,
              "tensorboard": {"enabled": args.enable_tensorboard, "job_name": "", "output_path":
                              args.tensorboard_path or f"{args.output_dir}/tensorboard"}}
    start = lambda _: deepspeed.initialize(model=model, optimizer=adam, lr_scheduler=schedule,
                                           config=config)[0]
    if path := args.deepspeed_config and os.path.abspath(args.deepspeed_config):
        _merge(config, opened(lambda p: {**json.load(open(p))}, path, "the JSON object in"), path)
    engine = opened(start, path or deepspeed.__file__, "DeepSpeed's engine (see --dtype), in")
    transformers.set_seed(args.seed + 100003 * rank())            # from here on noise differs
    engine.enable_backward_allreduce = stage > 0 or world_size() > 1      # else copies, for nothing
    def clip():                                 # fp32, ZeRO 0: DeepSpeed's own keeps no norm
        engine._global_grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    engine.clip_fp32_gradients = clip
    engine.passes = 4 if of("gradient_checkpointing") else 3      # a backward is two forwards' work
    return engine

def _memory(dtype, stage, offload, micro_batch=1):
    """Where a model's weights, gradients and optimizer lie, and in what precision."""
    where = lambda away: {"device": "cpu" if away else "none"}
    zero = {"stage": stage, "offload_optimizer": where(offload), "offload_param":
            where(offload and stage == 3)}
    return {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero,
            **{name: {"enabled": dtype == models.DTYPES[name]} for name in ("bf16", "fp16")}}

def _merge(config, given, path, where=""):
    """--deepspeed_config into what the flags say.  InputError where they disagree."""
    for key, value in [(key, value) for key, value in given.items() if value != "auto"]:
        ours = config.setdefault(key, "their own" if key in ("optimizer", "scheduler") else value)
        if isinstance(ours, dict) and isinstance(value, dict):
            _merge(ours, value, path, f"{where}{key}.")
        elif value != ours:
            raise InputError(f"{path}: {where}{key} is {value}, but flags say {ours}: change one")

def frozen(model, args=None, name=None, stage=0):
    """A model that is only read; sharded if its own stage (or else `stage`) is 3, or offloaded."""
    own, offload = (getattr(args, f, None) for f in (f"{name}_zero_stage", f"offload_{name}_model"))
    model.eval().requires_grad_(False)
    if (stage if own is None else own) < 3 and not offload: return model.to(device())
    config = _memory(models.pick_dtype(args.dtype), 3, offload)
    return deepspeed.initialize(model=model, config=config)[0]

def reference(trained, load, args, name):
    """The policy as it was before training: its adapters off, or a frozen copy, from load()."""
    if getattr(args, f"{name}lora_dim") and args.only_optimize_lora:
        return lora.WithoutAdapters(trained)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)      # a fresh model, or row, as the policy's
        return frozen(load(), args, "reference", getattr(args, f"{name}zero_stage"))

def global_denom(batches):
    """What each micro-batch's sums are divided by: (valid tokens of all of them on all ranks) /
    (micro-batches x ranks).  DeepSpeed averages gradients over these two: one mean over tokens."""
    return gather(sum(b["mask"].sum() for b in batches).float()).sum() / len(batches) / world_size()

def step(engine, loss=None):
    """Backward, and the step when it is due -> the gradient's norm before clipping, else None."""
    if loss is not None: engine.backward(loss)
    due = engine.is_gradient_accumulation_boundary()
    engine.step()
    return float(engine.get_global_grad_norm()) if due else None     # else it is the last step's

def step_together(*pairs):
    """step() of several (engine, loss): if fp16 gradients of one overflow, all skip that step, and
    the loss scale of that one falls."""
    for engine, loss in pairs: engine.backward(loss)
    due = pairs[0][0].is_gradient_accumulation_boundary()
    optimizers = [engine.optimizer for engine, _ in pairs]
    found = [o.check_overflow() or o.overflow for o in optimizers] if due else []
    for o, own in zip(optimizers, found):           # what DeepSpeed would find itself in this step
        o.check_overflow = lambda o=o, **_: setattr(o, "overflow", any(found))
        o._update_scale = lambda bad, o=o, own=own: \
            type(o)._update_scale(o, own if any(found) else bad)
    norms = [step(engine) for engine, _ in pairs]
    for o, _ in zip(optimizers, found): del o.check_overflow, o._update_scale
    return norms

@contextlib.contextmanager
def whole(engine):
    """The engine's plain module with all parameters in place: ZeRO-3 gathers them once."""
    zero3 = engine.zero_optimization_stage() == 3
    with deepspeed.zero.unwrap_model_for_generation(engine) if zero3 else contextlib.nullcontext():
        yield engine.module

def save(engine, tokenizer, path):
    """Save an engine's model in the Hugging Face layout; rank 0 writes."""
    weights = engine.zero_optimization_stage() > 2 and engine._zero3_consolidated_16bit_state_dict()
    with writing(f"the model to {path}"):
        on_rank_zero(lambda: models.save_model(engine.module, tokenizer, path, weights))

def gather(tensor):
    """One tensor of the same shape from every rank -> (ranks, ...)."""
    parts = [tensor.clone() for _ in range(world_size())]
    if dist.is_initialized(): dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)

def _by_name(columns, total=torch.mean):
    """{name: (N,)} -> {name: scalar}: the max, min, total of names that end so, else the mean."""
    how = {"max": torch.amax, "min": torch.amin, "total": total}
    return {n: how.get(n.rpartition("_")[2], torch.mean)(v.double()) for n, v in columns.items()}

def summarise(history):
    """The dicts of several micro-batches -> one; where one has None, it is left out."""
    return _by_name({name: torch.stack([torch.as_tensor(metrics[name]) for metrics in history
                                        if metrics[name] is not None]) for name in history[0]})

def reduce_metrics(metrics, step=0, args=None):
    """This rank's {name: scalar} -> all ranks'.  InputError, on all of them, if one is not finite;
    but fp16 gradients may overflow: DeepSpeed skips such a step and lowers its loss scale."""
    values = [torch.as_tensor(v, dtype=torch.float64, device=device()) for v in metrics.values()]
    everyone = gather(torch.stack(values).detach()).T.cpu()                       # (names, ranks)
    for name, of_ranks in zip(metrics, everyone):
        if not of_ranks.isfinite().all() and not (name.endswith("grad_norm")
                                                  and args and args.dtype == "fp16"):
            bad = int((~of_ranks.isfinite()).nonzero()[0])
            whose = next((model for part, model in MODELS.items() if part in name), "trained model")
            raise InputError(f"step {step}, rank {bad}: {name} of the {whose} is {of_ranks[bad]}: "
                             f"lower its learning rate or look at it and at this step's rows")
    return {n: v.item() for n, v in _by_name(dict(zip(metrics, everyone)), torch.sum).items()}

def on_rank_zero(function, every_node=False):
    """Rank 0 (or each node's first) calls the function, the others wait; its error ends all."""
    error = None
    try:
        if (int(os.environ.get("LOCAL_RANK", 0)) if every_node else rank()) == 0: function()
    except Exception as caught:                      # raised below, when the others have heard
        error = caught
    if anywhere(error is not None): raise error or InputError("another rank stopped")
