"""Flags shared by the scripts.  A help text ends with the source of its default: [DSC]
DeepSpeed-Chat's flag or script, [IGPT] InstructGPT (arXiv:2203.02155), [PPO] arXiv:1707.06347,
[GAE] arXiv:1506.02438, [DPO] arXiv:2305.18290, [recipe] the published one of DPO, [ours: why]."""
import argparse, atexit, contextlib, os, re, sys, tempfile, time
from safetensors import SafetensorError

class InputError(Exception):
    """The user gave something wrong.  The message is one sentence: what, where, what to do."""

class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors (exit code 2) and the flags that everything shares."""
    def __init__(self, doc, output_dir):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_run(self, output_dir)
    def parse_args(self, *args, **kwargs):
        parsed, unknown = self.parse_known_args(*args, **kwargs)
        for text in sorted(unknown, key=lambda text: text[:1] != "-")[:1]:     # a flag, if any is
            self.error(f"{text} is unknown: see --help, or README's table for DeepSpeed-Chat's")
        instructions = getattr(parsed, "sft_only_data_path", None)
        if instructions and parsed.data_path is self.get_default("data_path"):
            parsed.data_path = []              # the embedded world stands in for no data at all
        return parsed
    def error(self, message):
        leave(f"{self.prog}: error: {message}", code=2)

def leave(message, code=1):
    """End this process with one sentence: a node's first rank's, unless another is alone in it."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0: time.sleep(3)  # the launcher ends it meanwhile
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)

def opened(function, path, what, *rest, **kwargs):
    """Call a loader of a folder or hub id; whatever goes wrong becomes one sentence."""
    local, made = os.path.exists(path), re.match(r"output/(sft|rm|dpo|ppo)(/\w+)?/?$", str(path))
    if not local and (made or path.startswith((".", "/")) or path.count("/") > 1):
        hint = f": run train_{made[1]}.py first" if made else ""
        raise InputError(f"{path}: there is no such file or folder{hint}")
    try:
        return function(path, *rest, **kwargs)
    except (Exception, SystemExit) as error:            # of many libraries' own types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "scripts are no longer supported" in reason:
            reason = "no script is run: load it with datasets<4, save_to_disk, give that folder"
        where = "" if local else " (there is no such folder, so it was sought on the hub)"
        raise InputError(f"cannot load {what} {path}{where}: {reason}") from error

@contextlib.contextmanager
def writing(what):
    """Whatever goes wrong while `what` is written becomes one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:             # RuntimeError: torch's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"cannot write {what}: {reason}; what stood there is whole") from error

def run(main):
    """Call a script's main(); bad input ends it with one sentence and exit code 1."""
    try:
        main()
    except (InputError, KeyboardInterrupt) as error:
        if main.__module__ == "__main__": sys.last_value = error       # as of any other exception
        leave(f"{os.path.basename(sys.argv[0])}: error: {str(error) or 'interrupted'}")
    if main.__module__ == "__main__":      # all is done: no library's thread may abort the exit now
        atexit._run_exitfuncs(), sys.stdout.flush(), os._exit(0)

def _number(kind, allowed, wanted):
    def convert(text):
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)): return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
    return convert

INF, switch = float("inf"), argparse.BooleanOptionalAction
cores = lambda: len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
positive_int = _number(int, lambda x: x > 0, "a whole number above 0")
at_least_2 = _number(int, lambda x: x > 1, "a whole number above 1")
seed = _number(int, lambda x: 0 <= x < 1 << 31, "a whole number below 2^31")
count = _number(int, lambda x: x >= 0, "a whole number, 0 or more")
positive = _number(float, lambda x: 0 < x < INF, "a number above 0")
non_negative = _number(float, lambda x: 0 <= x < INF, "a number, 0 or more")
fraction = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
open_fraction = _number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
share = _number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")

def add_run(parser, output_dir):
    """Data and run: what everything shares."""
    add = parser.add_argument_group("data and run").add_argument
    add("--data_path", nargs="+", default=["toy"], help="toy, hub ids, files, folders [ours]")
    add("--data_split", default="2,4,4", help="disjoint shares of the rows for steps 1,2,3 [DSC]")
    add("--data_output_path", default=os.path.expanduser("~/.cache/rlhf"), help="cache [ours]")
    add("--eval_fraction", type=open_fraction, default=0.1, help="of data without test rows [ours]")
    add("--dedup_prompts", action=switch, default=True, help="a prompt is in one step [ours]")
    add("--end_of_conversation_token", help="ends every response [ours: the tokenizer's eos]")
    add("--add_eot_token", action="store_true", help="it is new: embeddings get a row [DSC]")
    add("--preprocessing_num_workers", type=positive_int, default=min(8, cores()), help="[ours]")
    add("--max_eval_rows", type=positive_int, default=4000, help="[ours: accuracy to one point]")
    add("--output_dir", default=output_dir, help="takes all a run leaves [ours: a default]")
    add("--seed", type=seed, default=1234, help="of everything random, alike in all steps [DSC]")
    add("--dtype", choices="auto fp32 bf16 fp16".split(), default="auto", help="bf16/fp32 [ours]")
    add("--log_level", choices="debug info warning error".split(), default="error", help="[ours]")

def add_trained(parser, name, learning_rate):
    """The flags of a model that is trained; in step 3 of the actor_ and of the critic_."""
    group = parser.add_argument_group(f"{name}training")
    add = lambda *names, **kind: group.add_argument(*(f"--{name}{n}" for n in names), **kind)
    add("learning_rate", "lr", type=non_negative, default=learning_rate, help="peak [DSC]")
    add("weight_decay", type=non_negative, default=0.0, help="of matrices only [DSC]")
    add("zero_stage", type=int, choices=(0, 1, 2, 3), default=0, help="shards more and more [DSC]")
    add("gradient_checkpointing", action="store_true", help="recompute, do not keep [DSC]")
    add("lora_dim", type=count, default=0, help="rank of the adapters; 0: none [DSC]")
    add("lora_module_name", default="all-linear", help="or parts of names, by comma [PEFT's]")
    add("lora_learning_rate", type=non_negative, default=5e-4, help="peak, of adapters [DSC]")

def add_frozen(add, name):
    """The flags of a model that is only read."""
    add(f"--{name}_zero_stage", type=int, choices=(0, 3), help="or the trained one's [DSC]")
    add(f"--offload_{name}_model", action="store_true", help="keep on the CPU [DSC]")

def add_training(parser, learning_rate=None, warmup=0):
    """What the scripts share; step 3 passes no learning_rate and has its own flags instead."""
    add = parser.add_argument_group("training").add_argument
    if learning_rate is not None:
        add("--model_name_or_path", default="toy", help="toy, a folder or hub id [ours: offline]")
        add("--per_device_train_batch_size", type=positive_int, default=16, help="rows [DSC]")
        add("--per_device_eval_batch_size", type=positive_int, default=16, help="rows [DSC]")
        add("--max_seq_len", type=at_least_2, default=512, help="tokens; long rows are cut [DSC]")
        add("--group_by_length", action="store_true", help="pads less [ours: off, steps random]")
        add("--eval_interval", type=count, default=0, help="0: [DSC: an epoch; DPO: a fifth]")
        add_trained(parser, "", learning_rate)
    add("--num_train_epochs", type=positive_int, default=1, help="passes over the data [DSC]")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches [DSC]")
    add("--lr_scheduler_type", default="cosine", help="Transformers' [DSC]", choices="linear cosine"
        " cosine_with_restarts cosine_with_min_lr polynomial constant constant_with_warmup".split())
    add("--lr_scaling", choices=("none", "sqrt", "linear"), default="none", help="by batch [ours]")
    add("--base_batch_size", type=positive_int, default=32, help="that the rates are for [ours]")
    add("--lr_range_test", type=count, nargs="?", const=100, default=0, help="in N steps [ours]")
    add("--min_lr_ratio", type=fraction, default=0.1, help="where cosine_with_min_lr ends [ours]")
    add("--num_warmup_steps", type=count, default=warmup, help="optimizer steps [DSC]")
    add("--adam_beta2", type=open_fraction, default=0.95, help="with beta1 0.9 [DSC]")
    add("--max_grad_norm", type=positive, default=1.0, help="gradient clipping [DSC]")
    add("--lora_alpha", type=positive, help="adapters count alpha / rank [QLoRA: 2 x rank]")
    add("--only_optimize_lora", action=switch, default=True, help="freeze all else [PEFT; DSC: no]")
    add("--load_in_4bit", action="store_true", help="policies' frozen weights [QLoRA; ours: off]")
    add("--optim", choices=("adamw", "adamw_8bit"), default="adamw", help="8: less memory [ours]")
    add("--offload", action="store_true", help="optimizer (stage 3: weights too) on the CPU [DSC]")
    add("--deepspeed_config", help="JSON file: adds what no flag decides [DSC]")
    add("--max_steps", type=count, default=0, help="(step 3: iterations) or 0: whole epochs [ours]")
    add("--save_interval", type=count, default=0, help="steps to a checkpoint; 0: none [ours]")
    add("--save_total_limit", type=positive_int, default=2, help="checkpoints kept [ours: space]")
    add("--resume", nargs="?", const="latest", help="go on from latest or a folder [ours]")
    add("--log_interval", type=positive_int, default=10, help="steps a line [ours: readable]")
    add("--enable_tensorboard", action="store_true", help="through DeepSpeed's monitor [DSC]")
    add("--tensorboard_path", default=None, help="OUTPUT_DIR/tensorboard unless given [DSC]")
    add("--profile", action="store_true", help="say where a step's time goes [ours: off]")
    add("--strict_advice", action="store_true", help="unusual flags are errors [ours: a line each]")
    add("--local_rank", type=int, default=-1, help="set by the launcher [DSC]")
    add("--deepspeed", action="store_true", help="accepted: DeepSpeed is always on [DSC]")

def split_shares(text):
    """"2,4,4" -> [0.2, 0.4, 0.4]."""
    shares = [float(part) for part in text.split(",") if re.fullmatch(r" *\d+\.?\d* *", part)]
    if len(shares) != 3 or text.count(",") != 2 or sum(shares) == 0:
        raise InputError(f"--data_split must be three numbers such as 2,4,4, not {text}")
    return [share / sum(shares) for share in shares]

def check_writable(path, flag="--output_dir"):
    """Create the folder; InputError, before anything is computed, if it cannot be written to."""
    with writing(f"to {flag} {path}"):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
