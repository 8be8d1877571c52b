"""Small models and tokenizers of several families, made here; and a runner for the real scripts."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: threads of two workers would wait and spin
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(cores)]})

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import train_rm
from rlhf import args as flags
from rlhf import render

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SHAPE.update(max_position_embeddings=64)
FAMILIES = {
    "opt": lambda v: OPTConfig(
        vocab_size=v,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=8,
        dropout=0.1,
    ),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "llama": lambda v: LlamaConfig(vocab_size=v, **SHAPE),
    "gpt_neox": lambda v: GPTNeoXConfig(vocab_size=v, **SHAPE),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, num_key_value_heads=1, **SHAPE),
}
# How real tokenizers lay out special tokens; "bos is eos" is OPT's way.
SPECIALS = {
    "own pad": {"eos_token": "</s>", "pad_token": "<pad>"},
    "no pad": {"eos_token": "</s>"},
    "pad is eos": {"eos_token": "</s>", "pad_token": "</s>"},
    "bos is eos": {"eos_token": "</s>", "bos_token": "</s>", "pad_token": "<pad>"},
    "unk": {"eos_token": "</s>", "unk_token": "<unk>"},
}
WORDS = [f"w{i}" for i in range(30)]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
SMALL = dict(max_eval_rows=40, log_interval=1, max_seq_len=32)


def pytest_collection_modifyitems(items):
    """The longest first, so that both workers end together."""
    items.sort(key=lambda item: "test_run_all" not in item.nodeid)


def make_tokenizer(specials="own pad", family=None):
    """A token a word; byte-level BPE for Qwen2, whose class Transformers loads whatever the folder
    says."""
    words = ["<unk>", "<pad>", "</s>"]
    if family == "qwen2":
        backend = Tokenizer(tokenizer_models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=350, special_tokens=words, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator([f" {word}" for word in WORDS] * 9, trainer)
    else:
        vocabulary = {word: index for index, word in enumerate(words + WORDS)}
        backend = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS[specials])


def make_model(folder, family="llama", specials="own pad", seed=0, **config):
    """A saved causal language model with its tokenizer, as people download them."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(specials, family)
    settings = FAMILIES[family](len(tokenizer))
    settings.update(config)
    model = AutoModelForCausalLM.from_config(settings)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model_folder(tmp_path):
    """model_folder(family, specials) -> a folder of make_model's."""
    return lambda family="llama", specials="own pad", name="start", seed=0, **config: make_model(
        tmp_path / name, family, specials, seed, **config
    )


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(command, timeout=900, **env):
    """Run a program -> CompletedProcess.  If it hangs, none of its children is left behind."""
    pipe, env = subprocess.PIPE, {**os.environ, **env}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_script(script, *flags, ranks=1, launcher="python", **env):
    """Run a script as a user does -> CompletedProcess."""
    port = free_port()
    start = {
        "python": [sys.executable],
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            f"--master_port={port}",
        ],
        "deepspeed": [
            os.path.join(os.path.dirname(sys.executable), "deepspeed"),
            "--quiet",
            f"--num_gpus={ranks}",
            f"--master_port={port}",
        ],
    }[launcher]
    return run([*start, script, *map(str, flags)], **env)


def arguments(tmp_path, *paths, **changes):
    """The flags of the data, as parsed."""
    usual = dict(data_split="2,4,4", seed=1234, eval_fraction=0.1, max_eval_rows=100)
    usual.update(dedup_prompts=True, preprocessing_num_workers=1, max_seq_len=32, lr_range_test=0)
    usual.update(data_path=[str(p) for p in paths], data_output_path=str(tmp_path / "cache"))
    return argparse.Namespace(**{**usual, **changes})


def rows_of(tokenizer, texts, max_seq_len=64, **settings):
    """Prompts with one response or two -> tokenised rows, as the scripts see them."""
    columns = list(zip(*((*text, "")[:3] for text in texts)))
    columns = dict(zip(("prompt", "chosen", "rejected"), columns))
    done = render.tokenise(tokenizer, columns, max_seq_len, **settings)
    return [dict(zip(done, row)) for row in zip(*done.values())]


def metrics(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def to_flags(**settings):
    """lr=1, enable_ema=True -> --lr 1 --enable_ema."""
    pairs = [[f"--{name}"] + ([] if value is True else [value]) for name, value in settings.items()]
    return [str(text) for pair in pairs for text in pair]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(script, flags) runs a script's main() in this process -> exit code, its stderr."""

    def run(script, *arguments, **settings):
        settings = {"data_output_path": tmp_path / "cache", **settings}
        monkeypatch.setattr(
            sys, "argv", [f"{script.__name__}.py", *arguments, *to_flags(**settings)]
        )
        code = 0
        try:
            flags.run(script.main)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def world(tmp_path, model_folder):
    """A tiny actor, and a data set whose preferred responses begin with w1."""

    def pair(i):
        prompt = f"w{i % 30} w{i // 30} w{i % 7}"
        return {"prompt": prompt, "chosen": f" w1 w{i % 11}", "rejected": f" w2 w{i % 13}"}

    (tmp_path / "pairs").mkdir()
    write_jsonl(tmp_path / "pairs" / "train.jsonl", [pair(i) for i in range(400)])
    write_jsonl(tmp_path / "pairs" / "test.jsonl", [pair(i) for i in range(400, 440)])
    data = str(tmp_path / "pairs")
    return {"data": data, "actor": model_folder("llama"), "out": tmp_path / "out"}


@pytest.fixture
def start(world):
    """What steps 1 and 2 are started with."""
    return dict(model_name_or_path=world["actor"], data_path=world["data"], **SMALL)


@pytest.fixture
def reward_model(world, start, call):
    code, error = call(train_rm, **start, lr=5e-3, output_dir=world["out"] / "rm")
    assert code == 0, error
    return str(world["out"] / "rm")


@pytest.fixture
def ppo(world, reward_model):
    """ppo(name, flags) -> step 3's flags, to write to folder `name`."""

    def make(name, **changes):
        rows = dict(per_device_generation_batch_size=16, per_device_training_batch_size=16)
        lengths = dict(max_prompt_seq_len=16, max_answer_seq_len=8)
        paths = dict(
            actor_model_name_or_path=world["actor"],
            critic_model_name_or_path=reward_model,
            data_path=world["data"],
            output_dir=world["out"] / name,
        )
        return {**paths, **rows, **lengths, "num_warmup_steps": 0, "max_steps": 3, **changes}

    return make


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


class Run:
    """A run of a script by tests/kills.py."""

    def __init__(self, folder):
        self.folder = folder
        self.pids = json.loads(self.until(lambda: (folder / "pids").exists() and self.read("pids")))

    def read(self, name):
        return (self.folder / name).read_text()

    def until(self, happened, seconds=240):
        """What `happened` returns, when that is something."""
        end = time.time() + seconds
        while not (found := happened()):
            assert time.time() < end, "it hangs"
            time.sleep(0.002)
        return found

    def kill(self, number=signal.SIGKILL, ranks=slice(None)):
        for pid in self.pids[ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def codes(self, seconds=240):
        self.until((self.folder / "codes").exists, seconds)
        return json.loads(self.read("codes"))

    def error(self):
        """The one sentence that it ended with."""
        codes, lines = self.codes(), self.read("err0").strip().splitlines()
        assert codes[0] == 1 and len(lines) == 1, (codes, lines)
        return lines[0]

    def succeeds(self):
        codes = self.codes()
        assert not any(codes), (codes, self.read("err0"))
        return self


@pytest.fixture(scope="session")
def zygote():
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kills"],
        cwd=ROOT,
        env=ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def fork(zygote, tmp_path):
    """fork(script, flags, ranks, ...) -> a Run that has begun."""
    begun = []

    def start(script, settings, ranks=1, **how):
        folder = tmp_path / f"run{len(begun)}"
        folder.mkdir()
        settings = to_flags(**{"data_output_path": tmp_path / "cache", **settings})
        order = dict(script=script, flags=settings, ranks=ranks, folder=str(folder), **how)
        print(json.dumps(order), file=zygote.stdin, flush=True)
        begun.append(Run(folder))
        return begun[-1]

    yield start
    for run in begun:
        if not (run.folder / "codes").exists():
            run.kill()
