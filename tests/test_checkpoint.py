"""What survives: SIGKILL at any moment, signals, a full disk, numbers that are none, hostile files."""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_ppo
import train_rm
import train_sft
from rlhf import checkpoint, models
from tests.conftest import ENV, ROOT, free_port, metrics, to_flags

TIMES = ("seconds", "tokens_per_second", "tflops")


def kept(folder):
    """All that a run leaves, but for the time it took."""
    rows = [
        {name: value for name, value in row.items() if not name.startswith(TIMES)}
        for row in metrics(folder)
    ]
    files = [*folder.rglob("model.safetensors"), *folder.glob("samples.jsonl")]
    files = [file for file in files if "checkpoints" not in file.parts]
    return rows, {str(file.relative_to(folder)): file.read_bytes() for file in files}


def rows_of(folder):
    """How many lines metrics.jsonl has so far."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def same_as_uninterrupted(fork, script, settings, ranks, deaths):
    """A run that dies by each of the deaths in turn, and goes on, leaves what another one does."""
    out = settings["output_dir"]
    whole, cut = out / "whole", out / "cut"
    fork(script, {**settings, "output_dir": whole}, ranks).succeeds()
    settings = {**settings, "output_dir": cut, "save_interval": 1, "save_total_limit": 1}
    for death in deaths:
        before = rows_of(cut)
        run = fork(script, settings, ranks, die=death)
        if death is None:  # all ranks, somewhere in the next steps
            run.until(lambda: rows_of(cut) not in (0, before))
            time.sleep(random.uniform(0, 0.2))
            run.kill()
        finished = death is None and run.codes()[0] == 0  # it was too quick for us
        assert finished or run.codes()[0] == -signal.SIGKILL, run.read("err0")
        with open(cut / "metrics.jsonl", "a") as file:
            file.write('{"step": 1, "lo')
        if any((cut / "checkpoints").glob("step*")):
            settings["resume"] = True
    fork(script, settings, ranks).succeeds()
    assert kept(cut) == kept(whole) and kept(cut)[1]
    return cut


def test_sft_with_dropout_killed_anywhere_leaves_the_same_bytes(world, start, fork, model_folder):
    start["model_name_or_path"] = model_folder("opt", name="opt", dropout=0.1)
    start.update(output_dir=world["out"], max_steps=8, eval_interval=3, lr=1e-2)
    deaths = [["save", 1, False], ["rename", 1, True], ["replace", 3, False], ["fsync", 6, False]]
    deaths += [["rmtree", 2, False], None, ["save_model", 1, False]]
    cut = same_as_uninterrupted(fork, "train_sft", start, 1, deaths)
    fork("train_sft", {**start, "output_dir": world["out"] / "again"}).succeeds()
    assert kept(world["out"] / "again") == kept(cut)


@pytest.fixture
def reward_model(world):
    """Untrained, which is enough here."""
    tokenizer = models.load_tokenizer(world["actor"])
    model = models.load_scalar(world["actor"], tokenizer, new_head=True)
    models.save_model(model, tokenizer, world["out"] / "rm")
    return str(world["out"] / "rm")


def test_ppo_with_all_its_states_killed_anywhere_leaves_the_same_bytes(ppo, world, fork, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"w5 w{i % 30} w7 w{i % 9}" for i in range(400)))
    half = dict(per_device_generation_batch_size=8, per_device_training_batch_size=2)
    half.update(gradient_accumulation_steps=2, critic_warmup_steps=1)
    flags = ppo("", **half, max_steps=5, actor_lr=5e-3, critic_lr=5e-3, ppo_epochs=2)
    flags.update(actor_zero_stage=2, critic_zero_stage=3, actor_lora_dim=2, enable_ema=True)
    flags.update(critic_lora_dim=2, critic_lora_learning_rate=5e-3)
    flags.update(unsupervised_dataset_name=tmp_path / "text.txt", print_answers_interval=1)
    flags.update(target_kl=1e-3)
    deaths = [["rename", 1, True], ["save", 2, False], ["rmtree", 3, False], None]
    same_as_uninterrupted(fork, "train_ppo", flags, 2, deaths)


@pytest.mark.parametrize("script", ["train_rm", "train_dpo"])
def test_pairs_sharded_and_killed_leave_the_same_bytes(world, start, fork, script):
    start.update(output_dir=world["out"], max_steps=5, eval_interval=2, lr=1e-2, zero_stage=3)
    start.update(per_device_train_batch_size=4)
    same_as_uninterrupted(fork, script, start, 2, [["save", 5, False], None])


# what --resume refuses


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_of_it(
    start, call, monkeypatch, world
):
    settings = dict(start, output_dir=world["out"], save_interval=1, save_total_limit=2)
    remove = shutil.rmtree

    def die(path, *rest, **how):
        if not os.path.exists(os.path.join(path, "rank0.pt")):
            return remove(path, *rest, **how)
        os.remove(os.path.join(path, "rank0.pt"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", die)
        assert call(train_sft, **settings, max_steps=3)[0] == 1
    folders = sorted((world["out"] / "checkpoints").glob("step*"))
    assert [folder.name for folder in folders] == ["step2", "step3"]
    assert all((folder / "rank0.pt").exists() for folder in folders)
    code, error = call(train_sft, **settings, max_steps=3, resume=True)
    assert code == 0, error


def test_a_kill_while_a_step_that_is_taken_again_is_published_leaves_one_to_resume(
    start, call, monkeypatch, world
):
    settings = dict(start, output_dir=world["out"], save_interval=1, max_steps=3)
    assert call(train_sft, **settings)[0] == 0
    folder, rename = world["out"] / "checkpoints", Path.rename

    def die(path, target):
        if path.name == ".new":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        assert call(train_sft, **settings, resume=folder / "step2")[0] == 1
    assert not (folder / "step3").exists()
    code, error = call(train_sft, **settings, resume=True)
    assert code == 0 and (folder / "step3").exists(), error


@pytest.mark.parametrize("named", ["step2", "../checkpoints/step2/"])
def test_a_run_that_took_an_older_checkpoint_and_died_goes_on_from_that_one(
    start, call, monkeypatch, world, named
):
    """Its metrics have been cut to there: from the newer one they would miss steps."""
    settings = dict(start, output_dir=world["out"], save_interval=2, max_steps=5)
    assert call(train_sft, **settings)[0] == 0
    expected, folder = kept(world["out"]), world["out"] / "checkpoints"
    assert (folder / "latest").read_text() == "step4"

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_sft, "train_step", die)
        assert call(train_sft, **settings, resume=f"{folder}/{named}")[0] == 1
    assert [row["step"] for row in metrics(world["out"])][-1] == 2
    code, error = call(train_sft, **settings, resume=True)
    assert code == 0, error
    assert kept(world["out"]) == expected


def test_resume_names_what_differs_and_what_is_missing(world, start, fork):
    flags = dict(start, output_dir=world["out"] / "run", save_interval=1, max_steps=4)
    assert "--resume latest: there is no checkpoint in" in (
        fork("train_sft", {**flags, "resume": True}).error()
    )
    fork("train_sft", {**flags, "save_total_limit": 3}).succeeds()
    folder = world["out"] / "run" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step2", "step3", "step4", "latest"}
    assert (folder / "latest").read_text() == "step4"
    assert f"{folder} is there: give --resume" in fork("train_sft", flags).error()
    refused = [
        ({"lr": 0.5}, 1, "has --learning_rate 0.001 (now 0.5): give the same"),
        ({"zero_stage": 2, "seed": 7}, 1, "--zero_stage 0 (now 2); --seed 1234 (now 7)"),
        ({}, 2, "--ranks 1 (now 2)"),
        ({"resume": folder / "step1"}, 1, "step1: there is no checkpoint"),
        ({"resume": folder / "step2", "lr": 0.5}, 1, "step2 has --learning_rate 0.001"),
    ]
    runs = [fork("train_sft", {**flags, "resume": True, **new}, n) for new, n, _ in refused]
    for run, (*_, expected) in zip(runs, refused):
        error = run.error()
        assert (
            expected in error
            or "--" in expected
            and all(part in error for part in expected.split("; "))
        ), error
    fork("train_sft", {**flags, "resume": folder / "step3", "log_interval": 2}).succeeds()

    # a step that another run saved here is not mistaken for this run's
    (folder / "latest").unlink()
    assert "checkpoints is there: give --resume" in fork("train_sft", {**flags, "lr": 0.5}).error()
    other = world["out"] / "other"
    fork("train_sft", {**flags, "lr": 0.5, "output_dir": other, "max_steps": 2}).succeeds()
    shutil.copytree(other / "checkpoints" / "step2", folder / "step4", dirs_exist_ok=True)
    fork("train_sft", {**flags, "resume": folder / "step3"}).succeeds()
    assert torch.load(folder / "step4" / "rank0.pt", weights_only=False)["step"] == 4
    assert not (folder / "step4" / "replaced").exists()

    # and a damaged one is a sentence
    with open(folder / "step4" / "rank0.pt", "r+") as file:
        file.truncate(100)
    assert "cannot load the checkpoint in" in fork("train_sft", {**flags, "resume": True}).error()
    shutil.rmtree(folder / "step3" / "policy")
    damaged = {**flags, "resume": folder / "step3"}
    assert "cannot load the checkpoint in" in fork("train_sft", damaged).error()
    assert (folder / "latest").read_text() == "step4"  # not the one that could not be read


# signals and the launcher


@pytest.fixture
def launch():
    """launch(script, flags) -> DeepSpeed's launcher, two ranks under it."""
    begun = []

    def start(script, *flags):
        program = os.path.join(os.path.dirname(sys.executable), "deepspeed")
        port = f"--master_port={free_port()}"
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(
            [program, "--quiet", "--num_gpus=2", port, script, *flags],
            cwd=ROOT,
            env=ENV,
            stdin=null,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()


def ranks_of(launcher):
    """The processes that train, by rank."""
    family = psutil.Process(launcher.pid).children(recursive=True)
    found = {p.environ().get("RANK"): p for p in family if "launch.py" not in p.cmdline()[3:4]}
    return [found[rank] for rank in ("0", "1")]


def wait_for(happened, seconds=240):
    end = time.time() + seconds
    while not happened():
        assert time.time() < end, "it hangs"
        time.sleep(0.01)


def test_the_launcher_one_signalled_rank_stops_both_and_one_killed_rank_ends_all(
    world, start, launch, tmp_path
):
    flags = dict(start, max_steps=4000, num_train_epochs=100, zero_stage=1, log_interval=1000)
    flags.update(per_device_train_batch_size=4, data_output_path=tmp_path / "cache", lr=1e-2)
    cut = world["out"] / "cut"
    command = ["train_sft.py", *to_flags(**flags, output_dir=cut)]
    launcher = launch(*command)
    wait_for(lambda: rows_of(cut) > 3)
    ranks_of(launcher)[1].send_signal(signal.SIGTERM)
    output, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    assert "to go on, start as before, with --resume" in output
    stopped = rows_of(cut)
    launcher = launch(*command, "--resume")
    assert (cut / "checkpoints" / "latest").read_text() == f"step{stopped - 1}"
    wait_for(lambda: rows_of(cut) > stopped + 3)
    family = psutil.Process(launcher.pid).children(recursive=True)
    ranks_of(launcher)[0].kill()
    begun = time.time()
    launcher.communicate(timeout=240)
    assert launcher.returncode != 0 and time.time() - begun < 60
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_ends_the_step_saves_and_the_second_one_does_not_wait(world, start, fork):
    flags = dict(start, max_steps=100, num_train_epochs=100, lr=1e-2, eval_interval=1000)
    flags.update(per_device_train_batch_size=4, data_split="1,0,0")
    whole = fork("train_sft", {**flags, "output_dir": world["out"] / "whole"}, 2)
    cut = world["out"] / "cut"
    for number in (signal.SIGTERM, signal.SIGINT):
        before = rows_of(cut)
        resumed = {"resume": True} if before else {}
        run = fork("train_sft", {**flags, **resumed, "output_dir": cut}, 2)
        run.until(lambda: rows_of(cut) not in (0, before))
        for _ in range(2):  # the launcher passes on what all processes got
            run.kill(number, slice(1, 2))
            time.sleep(0.1)
        assert run.codes() == [0, 0], run.read("err0")
        done = len(metrics(cut)) - 1  # and the evaluation before training
        assert f"stopped after step {done}; to go on, start as before, with --resume" in run.read(
            "out0"
        )
    fork("train_sft", {**flags, "output_dir": cut, "resume": True}, 2).succeeds()
    whole.succeeds()
    assert kept(cut) == kept(world["out"] / "whole")

    twice = world["out"] / "twice"
    run = fork("train_sft", {**flags, "output_dir": twice}, 2, change="slow_steps")
    run.until(lambda: rows_of(twice))
    for _ in range(2):
        time.sleep(1.5)
        run.kill(signal.SIGTERM, slice(1, 2))
    assert run.codes(10) == [-signal.SIGKILL, -signal.SIGTERM]


# numbers that are none


def sentence(found, *parts):
    code, error = found
    assert code == 1 and len(error.strip().splitlines()) == 1, (code, error)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    "which,expected",
    [
        (0, ("the policy's probabilities are not finite",)),
        (1, ("step 1, rank 0", "of the critic is nan")),
        (2, ("step 1, rank 0: kl of the reference is nan",)),
        (3, ("step 1, rank 0: score of the reward model is nan",)),
    ],
)
def test_nan_in_a_model_is_a_sentence_that_names_it(ppo, call, monkeypatch, which, expected):
    load = train_ppo.load_models

    def spoilt(*arguments):
        loaded = load(*arguments)
        net = getattr(loaded[which], "module", loaded[which])
        with torch.no_grad():
            next(p for name, p in net.named_parameters() if "norm" in name).fill_(float("nan"))
        return loaded

    monkeypatch.setattr(train_ppo, "load_models", spoilt)
    sentence(call(train_ppo, **ppo("nan")), *expected)


def test_nan_in_a_folder_of_weights_is_a_sentence(world, ppo, start, call, reward_model):
    for folder in (world["actor"], reward_model):
        state = load_file(f"{folder}/model.safetensors")
        state["model.norm.weight"][3] = float("nan")
        save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
    out = world["out"] / "sft"
    sentence(call(train_sft, **start, output_dir=out), "step 1, rank 0: loss of the trained model")
    sentence(call(train_rm, **start, output_dir=world["out"] / "rm2"), "step 1, rank 0: loss")
    assert not (out / "model.safetensors").exists()


def test_a_run_that_diverges_ends_with_a_sentence(world, ppo, start, call):
    huge = dict(start, lr=1e30, max_steps=8, output_dir=world["out"] / "sft")
    sentence(call(train_sft, **huge), "step 2, rank 0: loss of the trained model is nan")
    few = dict(per_device_generation_batch_size=4, per_device_training_batch_size=4, clip=1e6)
    far = dict(actor_lr=0.02, ppo_epochs=60, no_whiten_advantages=True, kl_coef=0, **few)
    far = ppo("far", **far, lr_scheduler_type="constant")
    sentence(call(train_ppo, **far), "step 1: the mean ratio is ", "above 10: lower --actor_lr")
    kl = dict(actor_lr=0.03, kl_stop=0.5, kl_coef=0, max_steps=50)
    sentence(call(train_ppo, **ppo("kl", **kl)), "step ", "above --kl_stop: lower --actor_lr or")


def test_equal_scores_end_the_run_and_no_end_is_only_a_warning(ppo, call, reward_model, world):
    silent = load_file(f"{world['actor']}/model.safetensors")
    silent["lm_head.weight"][2] = 0  # what the end token's logit is made of
    silent["lm_head.weight"][3:] *= 1000
    save_file(silent, f"{world['actor']}/model.safetensors", {"format": "pt"})
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "say", found.append)
        code, error = call(train_ppo, **ppo("silent", max_steps=2))
    assert code == 0, error
    assert [row["eos_rate"] for row in metrics(world["out"] / "silent")] == [0, 0]
    assert [line[:49] for line in found] == [
        f"step {step}: no response ended: raise --max_answer_seq" for step in (1, 2)
    ]
    state = load_file(f"{reward_model}/model.safetensors")
    state["score.weight"].zero_()
    save_file(state, f"{reward_model}/model.safetensors", {"format": "pt"})
    sentence(call(train_ppo, **ppo("flat")), "step 1: the reward model scores all responses alike")


def test_nan_on_one_rank_ends_both_and_ranks_sample_different_noise(ppo, fork):
    half = dict(per_device_generation_batch_size=8, per_device_training_batch_size=8)
    flags = ppo("two", **half, max_steps=1)
    bad = fork("train_ppo", flags, 2, change="broken_reward_model", alone=True)
    assert bad.codes() == [1, 1]
    assert "step 1, rank 1: score of the reward model is nan" in bad.error()
    run = fork("train_ppo", flags, 2, change="same_prompts").succeeds()
    drawn = [
        [line for line in run.read(f"out{rank}").splitlines() if line.startswith("drawn")]
        for rank in (0, 1)
    ]
    assert len(drawn[0]) == len(drawn[1]) == 1 and drawn[0] != drawn[1]


# what cannot be written


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts a disk of 3 MB, or mounts it again."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options="size=3m"):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(folder):
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def vanish(folder):
    shutil.rmtree(folder / "out")
    (folder / "out").write_text("")


def forbid(folder):
    """Something read-only lies over the checkpoints."""
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder / "out" / "checkpoints")]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    "harm,then,repair",
    [
        (fill, "cannot write ", lambda folder: (folder / "filler").unlink()),
        (
            forbid,
            "there is no checkpoint",
            lambda folder: subprocess.run(["umount", str(folder / "out" / "checkpoints")]),
        ),
        (vanish, "cannot write to --output_dir", None),
    ],
)
def test_a_disk_that_fails_leaves_the_last_checkpoint(
    world, start, call, disk, monkeypatch, harm, then, repair
):
    flags = dict(start, max_steps=5, lr=1e-2, save_interval=1)
    folder = disk()
    whole = dict(output_dir=world["out"] / "whole")
    assert call(train_sft, **{**flags, **whole})[0] == 0
    save = checkpoint.Checkpoints._save

    def harmed(self, step):
        if step == 3:
            harm(folder)
        save(self, step)

    monkeypatch.setattr(checkpoint.Checkpoints, "_save", harmed)
    flags["output_dir"] = folder / "out"
    sentence(call(train_sft, **flags), "cannot write the checkpoint of step 3 to ")
    monkeypatch.undo()
    sentence(call(train_sft, **flags, resume=True), then)
    if repair:
        repair(folder)
        code, error = call(train_sft, **flags, resume=True)
        assert code == 0, error
        assert kept(flags["output_dir"]) == kept(whole["output_dir"])


# hostile folders


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_model_folder_is_run(world, start, fork, model_folder, tmp_path):
    trace, source = tmp_path / "trace", f"open({str(tmp_path / 'trace')!r}, 'w')"
    names = ("old", "zip", "module", "tokenizer")
    old, zipped, module, tokenizer = (model_folder(name=name) for name in names)
    for folder, dump in ((old, pickle.dump), (zipped, torch.save)):
        os.remove(f"{folder}/model.safetensors")
        with open(f"{folder}/pytorch_model.bin", "wb") as file:
            dump({"model.norm.weight": Bomb(trace)}, file)
    names = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", None],
    }
    for folder, file in ((module, "config.json"), (tokenizer, "tokenizer_config.json")):
        with open(f"{folder}/{file}") as text:
            given = json.load(text)
        own = {"tokenizer_class": "Own"} if folder == tokenizer else {"model_type": "own"}
        with open(f"{folder}/{file}", "w") as new:
            json.dump({**given, **own, "auto_map": names}, new)
        with open(f"{folder}/code.py", "w") as new:
            new.write(f"{source}\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n")
    for number, folder in enumerate((old, zipped, module, tokenizer)):
        flags = dict(start, model_name_or_path=folder, output_dir=world["out"] / str(number))
        run = fork("train_sft", flags)
        error = run.error()
        assert "cannot load the " in error and folder in error, error
        assert "[y/N]" not in run.read("out0") and not trace.exists(), error
