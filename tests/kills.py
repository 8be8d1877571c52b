"""A process that has imported everything and computed nothing: runs of it are forks, so many are
cheap.  A line of JSON on its stdin starts one: script, flags, ranks, folder, die.  The folder gets
`pids`, each rank's output, and `codes` when all ranks have ended; as under DeepSpeed's launcher, if
one fails, the others are ended too.

die: [name, n, after]: the n-th call of that function kills rank 0 with SIGKILL, before or after its
work.  change: a function here that changes a rank before it begins.  alone: nobody is ended."""

import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time

import torch
import transformers.trainer_utils
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, OPTForCausalLM

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import args
from tests.conftest import free_port

LOADED_HERE = (train_dpo, train_rm, transformers.trainer_utils, AutoModelForSequenceClassification)
LOADED_HERE += (LlamaForCausalLM, OPTForCausalLM)
WHERE = {
    "save": torch,
    "fsync": os,
    "rename": pathlib.Path,
    "replace": os,
    "rmtree": shutil,
    "save_model": train_sft.models,
}


def deadly(name, n, after):
    """Of a call of that name, only its beginning or its end is reached."""
    real, calls = getattr(WHERE[name], name), []

    def once(*arguments, **settings):
        calls.append(1)
        if len(calls) == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **settings)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(WHERE[name], name, once)


def broken_reward_model(number):
    """Rank 1's is full of NaN."""
    load = train_ppo.load_models

    def spoilt(*arguments):
        *others, reward_model = load(*arguments)
        if number == 1:
            reward_model.classifier.score.weight.fill_(float("nan"))
        return *others, reward_model

    train_ppo.load_models = spoilt


def same_prompts(number):
    """All prompts are alike, and responses are printed."""
    sample = train_ppo.sample

    def shown(policy, batch, *arguments, **more):
        batch["prompt_ids"].fill_(5), batch["prompt_mask"].fill_(True)
        drawn = sample(policy, batch, *arguments, **more)
        print("drawn", drawn["response_ids"].tolist())
        return drawn

    train_ppo.sample = shown


def slow_steps(number):
    """A step takes ten seconds."""
    step = train_sft.train_step
    train_sft.train_step = lambda *arguments: (time.sleep(10), step(*arguments))[1]


def rank(number, port, script, flags, ranks, folder, die=None, change=None, **_):
    names = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=ranks, LOCAL_SIZE=ranks)
    names.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{name}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
    sys.argv = [f"{script}.py", *flags]
    if change:
        globals()[change](number)
    if die and number == 0:
        deadly(*die)
    code = 0
    try:
        args.run(importlib.import_module(script).main)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def run(order):
    folder, ranks = pathlib.Path(order["folder"]), order["ranks"]
    port, pids = free_port(), []
    for number in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            rank(number, port, **order)
    (folder / "pids").write_text(json.dumps(pids))
    codes = {}
    while len(codes) < ranks:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set() if order.get("alone") else set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
    (folder / ".codes").write_text(json.dumps([codes[pid] for pid in pids]))
    (folder / ".codes").rename(folder / "codes")
    os._exit(0)


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            run(json.loads(line))


if __name__ == "__main__":
    main()
