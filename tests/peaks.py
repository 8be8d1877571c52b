"""peaks.py MODEL OUT: the peak memory of SFT steps in this process, under several flags, beside what
tests/bench/memory.py says of them."""

import ctypes
import gc
import json
import sys

import bitsandbytes  # noqa: F401 (loaded here: it is no part of a step)
import torch

import train_sft
from rlhf import engine, models
from tests.bench import memory

ROWS, PROMPT, RESPONSE = 4, 64, 64
SETTINGS = {
    "plain": [],
    "ZeRO-3": ["--zero_stage=3"],
    "LoRA": ["--lora_dim=8"],
    "bf16": ["--dtype=bf16"],
    "4-bit": ["--load_in_4bit", "--lora_dim=8"],
    "8-bit Adam": ["--optim=adamw_8bit"],
    "offload": ["--offload", "--zero_stage=2"],
}


def megabytes(field):
    with open("/proc/self/status") as file:
        return int(file.read().split(field + ":")[1].split()[0]) / 1024


def measured(path, args):
    """The growth of this process at its peak, over two steps."""
    gc.collect()
    before = megabytes("VmRSS")
    model = models.load_policy(path, TOKENIZER, args.dtype, in_4bit=args.load_in_4bit).eval()
    for weight in model.parameters():  # not in the mapped file, all of which would count
        weight.data = weight.data.clone()
    trained = engine.train_engine(model, args, "", ROWS, 10)
    mask, prompt = torch.ones(ROWS, RESPONSE) > 0, torch.ones(ROWS, PROMPT) > 0
    batch = {"prompt_ids": prompt.long(), "prompt_mask": prompt}
    batch.update(response_ids=mask.long(), mask=mask)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    for _ in range(2):
        train_sft.train_step(trained, [batch])
    peak = megabytes("VmHWM") - before
    trained.destroy()
    return peak


path, out = sys.argv[1:3]
TOKENIZER = models.load_tokenizer(path)
found = {}
for name, flags in SETTINGS.items():
    args = memory.parsed("train_sft.py", flags)
    if name == "plain":
        engine.init(args)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: what is freed is given back
            ctypes.CDLL(None).mallopt(option, 65536)
        ctypes.CDLL(None).mallopt(-4, 65536)  # M_MMAP_MAX: as it was
        measured(path, args)  # libraries warm up
    wanted = memory.Model("model", path, "", ROWS, PROMPT, RESPONSE)
    row = memory.estimate(wanted, args, 1)
    found[name] = (measured(path, args), (row["peak"] + row["CPU"]) / 2**20)
    print(name, found[name], flush=True)
with open(out, "w") as file:
    json.dump(found, file)
