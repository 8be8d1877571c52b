"""Flags shared by the scripts.  A help text ends with the source of its default: [DSC]
DeepSpeed-Chat's flag or script, [IGPT] InstructGPT (arXiv:2203.02155), [PPO] arXiv:1707.06347,
[GAE] arXiv:1506.02438, [ours: why]."""
import argparse
import os
import sys
import tempfile
import time

SCHEDULES = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup".split()

# DeepSpeed-Chat's flags that we do without, and what to use instead.
REMOVED = {flag: answer for flags, answer in {
    "num_padding_at_beginning": "scores are read at the last real token: drop it",
    "compute_fp32_loss": "log-probs and losses are always fp32: drop it",
    "dropout": "step 1 uses the model's own (see its config.json), steps 2 and 3 none: drop it",
    "actor_dropout critic_dropout": "step 3 runs without dropout, or the ratio is not 1: drop it",
    "enable_test_mode test_stop_step": "use --max_steps N",
    "print_loss": "every step's loss is in metrics.jsonl; --log_interval sets what is printed",
    "print_answers": "use --print_answers_interval N",
    "eval_iters": "the evaluation covers all held-out rows; --max_eval_rows N cuts it",
    "enable_hybrid_engine inference_tp_size tp_gather_partition_size unpin_actor_parameters "
    "release_inference_cache": "rollouts are Transformers' generate, no hybrid engine: drop it",
    "align_overflow": "a model whose fp16 gradients overflow skips its own step: drop it",
    "enable_mixed_precision_lora": "adapters have the model's dtype, masters fp32: drop it",
}.items() for flag in flags.split()}

class InputError(Exception):
    """Something the user gave is wrong.  The message is one sentence: what, where, what to do."""

class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors (exit code 2) and an answer for DeepSpeed-Chat's flags."""
    def __init__(self, doc):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def parse_args(self, *args, **kwargs):
        parsed, unknown = self.parse_known_args(*args, **kwargs)
        for flag in (text.split("=")[0] for text in unknown if text.startswith("-")):
            self.error(f"{flag}: {REMOVED.get(flag.lstrip('-'), 'no such flag, see --help')}")
        if unknown:
            self.error(f"{unknown[0]}: does not belong to any flag, see --help")
        instructions = getattr(parsed, "sft_only_data_path", None)
        if instructions and parsed.data_path is self.get_default("data_path"):
            parsed.data_path = []              # the embedded world stands in for no data at all
        return parsed

    def error(self, message):
        leave(f"{self.prog}: error: {message}", code=2)

def leave(message, code=1):
    """End this process with one sentence; a node's first rank says it, the others give it time."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(2)
    raise SystemExit(code)

def opened(function, path, what, *rest, **kwargs):
    """Call a loader of a folder or hub id; whatever goes wrong becomes one sentence."""
    local = os.path.exists(path)
    if not local and (path.startswith((".", "/")) or path.count("/") > 1):
        raise InputError(f"{path}: there is no such file or folder")
    try:
        return function(path, *rest, **kwargs)
    except Exception as error:            # of many libraries' own types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "scripts are no longer supported" in reason:
            reason = (f"its script is no longer run; convert it once: pip install 'datasets<4', "
                      f"load_dataset('{path}', trust_remote_code=True).save_to_disk('folder'), and "
                      f"give that folder, under the name that you gave here")
        where = "" if local else " (there is no such folder, so it was sought on the hub)"
        raise InputError(f"cannot load {what} {path}{where}: {reason}") from error

def run(main):
    """Call a script's main(); bad input ends it with one sentence and exit code 1."""
    try:
        main()
    except InputError as error:
        leave(f"{os.path.basename(sys.argv[0])}: error: {error}")

def _number(kind, allowed, wanted):
    def convert(text):
        try:
            if allowed(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
    return convert

INF, switch = float("inf"), argparse.BooleanOptionalAction
positive_int = _number(int, lambda x: x > 0, "a whole number above 0")
at_least_2 = _number(int, lambda x: x > 1, "a whole number above 1")
seed = _number(int, lambda x: 0 <= x < 1 << 31, "a whole number below 2^31")
count = _number(int, lambda x: x >= 0, "a whole number, 0 or more")
positive = _number(float, lambda x: 0 < x < INF, "a number above 0")
non_negative = _number(float, lambda x: 0 <= x < INF, "a number, 0 or more")
fraction = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
open_fraction = _number(float, lambda x: 0 < x < 1, "a number between 0 and 1")
probability = _number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")

def add_data(parser):
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", default=["toy"],
        help="toy, hub ids (or id:configuration), .json, .jsonl (.gz too) and .parquet files, "
             "folders of train and test files, save_to_disk folders [ours: offline]")
    add("--data_split", default="2,4,4", help="disjoint shares of the rows for steps 1,2,3 [DSC]")
    add("--data_output_path", default=os.path.expanduser("~/.cache/rlhf"), help="cache [ours]")
    add("--eval_fraction", type=open_fraction, default=0.1, help="of data without test rows [ours]")
    add("--dedup_prompts", action=switch, default=True,
        help="a data set's prompt is in one step only, none held out too; no row twice [ours]")
    add("--end_of_conversation_token", help="ends every response [ours: the tokenizer's eos]")
    add("--add_eot_token", action="store_true", help="it is new: embeddings get a row [DSC]")
    add("--preprocessing_num_workers", type=positive_int, default=min(8, os.cpu_count() or 1),
        help="processes that tokenise many rows [ours: the cores, up to 8]")
    add("--max_eval_rows", type=positive_int, default=4000, help="[ours: accuracy to one point]")

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

def add_training(parser, learning_rate=None, warmup=0):
    """What the scripts share; step 3 passes no learning_rate and has its own flags instead."""
    add = parser.add_argument_group("training").add_argument
    if learning_rate is not None:
        add("--model_name_or_path", default="toy", help="toy, a folder or hub id [ours: offline]")
        add("--per_device_train_batch_size", type=positive_int, default=16, help="rows [DSC]")
        add("--per_device_eval_batch_size", type=positive_int, default=16, help="rows [DSC]")
        add("--max_seq_len", type=at_least_2, default=512, help="tokens; long rows are cut [DSC]")
        add("--group_by_length", action="store_true", help="pads less [ours: off, steps random]")
        add("--eval_interval", type=count, default=0, help="in steps; 0: once an epoch [DSC]")
        add_trained(parser, "", learning_rate)
    add("--num_train_epochs", type=positive_int, default=1, help="passes over the data [DSC]")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches [DSC]")
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="Transformers' [DSC]")
    add("--num_warmup_steps", type=count, default=warmup, help="optimizer steps [DSC]")
    add("--adam_beta2", type=open_fraction, default=0.95, help="with beta1 0.9 [DSC]")
    add("--max_grad_norm", type=positive, default=1.0, help="gradient clipping [DSC]")
    add("--lora_alpha", type=positive, help="adapters count alpha / rank [QLoRA: 2 x rank]")
    add("--only_optimize_lora", action=switch, default=True, help="freeze all else [PEFT; DSC: no]")
    add("--offload", action="store_true", help="optimizer (stage 3: weights too) on the CPU [DSC]")
    add("--deepspeed_config", help="JSON file: adds what no flag decides [DSC]")
    add("--max_steps", type=count, default=0, help="(step 3: iterations) or 0: whole epochs [ours]")
    add("--log_interval", type=positive_int, default=10, help="steps a line [ours: readable]")
    add("--enable_tensorboard", action="store_true", help="through DeepSpeed's monitor [DSC]")
    add("--tensorboard_path", default=None, help="OUTPUT_DIR/tensorboard unless given [DSC]")
    add("--local_rank", type=int, default=-1, help="set by the launcher [DSC]")
    add("--deepspeed", action="store_true", help="accepted: DeepSpeed is always on [DSC]")

def add_run(parser, output_dir):
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=output_dir, help="takes all a run leaves [ours: a default]")
    add("--seed", type=seed, default=1234, help="of everything random, alike in all steps [DSC]")
    add("--dtype", choices="auto fp32 bf16 fp16".split(), default="auto", help="bf16/fp32 [ours]")
    add("--log_level", choices="debug info warning error".split(), default="error",
        help="of the libraries' own messages [ours: a terminal to read]")

def split_shares(text):
    """"2,4,4" -> [0.2, 0.4, 0.4]."""
    shares = [float(part) if part.strip().replace(".", "", 1).isdecimal() else -1.0
              for part in text.split(",")]
    if len(shares) != 3 or min(shares) < 0 or sum(shares) == 0:
        raise InputError(f"--data_split must be three numbers such as 2,4,4, not {text}")
    return [share / sum(shares) for share in shares]

def check_made(path, script, flag):
    """InputError when a model that an earlier step should have left is not there."""
    if not os.path.isdir(path) and path.split(os.sep)[0] == "output":
        raise InputError(f"there is no model in {path}: run {script} first, or give {flag}")

def check_writable(path, flag="--output_dir"):
    """Create the folder; InputError, before anything is computed, if it cannot be written to."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"cannot write to {flag} {path}: {error.strerror}") from error
