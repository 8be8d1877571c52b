"""Checkpoints: a run that was killed and resumed leaves what an uninterrupted one does, to the bit.
OUTPUT_DIR/checkpoints/step<N> is whole or not there: it is renamed when all is on the disk; then
`latest` names it.  Resume only what you trust: DeepSpeed unpickles its shards."""
import os, random, shutil, signal, time
from pathlib import Path
import numpy as np
import torch
from rlhf import engine, log
from rlhf.args import InputError, opened, writing

# Flags that may differ from those that a checkpoint was made with: they do not change a number.
FREE = """output_dir resume save_interval save_total_limit log_interval log_level local_rank kl_stop
    deepspeed data_output_path preprocessing_num_workers enable_tensorboard tensorboard_path
    print_answers_interval strict_advice profile""".split()

class Checkpoints:
    """--resume, --save_interval, --save_total_limit; `step` is the last one that was done."""
    def __init__(self, args):
        self.args, self.step, self.stopped, self.start = args, 0, False, None
        self.folder, self.nf4 = Path(args.output_dir, "checkpoints"), args.load_in_4bit
        found = self.folder / last.read_text() if (last := self.folder / "latest").exists() else \
            max(self.folder.glob("step*"), key=os.path.getmtime, default=None)
        if found and not args.resume:
            raise InputError(f"{self.folder} is there: give --resume, or another --output_dir")
        if args.resume:
            self.start = found or self.folder if args.resume == "latest" else Path(args.resume)
            if not (self.start / "rank0.pt").exists():
                raise InputError(f"--resume {args.resume}: there is no checkpoint in {self.start}")
            self.step, then = map(self._load(0).get, ("step", "flags"))
            if "kl_now" in then: args.kl_now = then["kl_now"]   # as --target_kl had adapted it
            other = [f"--{name} {then.get(name)} (now {value})"
                     for name, value in self._flags().items() if then.get(name) != value]
            if other:
                raise InputError(f"--resume: {self.start} has {', '.join(other)}: give the same")
    def restore(self, engines, ema=None):
        """Load what __init__ found into the engines {name: engine} and the EMA; from here on a
        SIGTERM or SIGINT waits for the end of the step, the same one again does not."""
        self.engines, self.ema = engines, ema
        if self.start:
            for name, trained in engines.items():
                opened(trained.load_checkpoint, self.start, "the checkpoint in", name, not self.nf4)
            state = self._load(engine.rank())
            for shadow, mean in zip(ema.shadow if ema else (), state["ema"]): shadow.copy_(mean)
            python, numpy, plain, cuda = state["random"]
            random.setstate(python), np.random.set_state(numpy), torch.set_rng_state(plain)
            torch.cuda.set_rng_state_all(cuda[:torch.cuda.device_count()])
            if self.start.parent.resolve() == self.folder.resolve():   # logs are cut to there next
                engine.on_rank_zero(lambda: log.write_text(self.folder / "latest", self.start.name))
        def stop(number, _):
            signal.signal(number, signal.SIG_IGN)       # a launcher that got it too passes it on
            time.sleep(1)
            signal.signal(number, signal.SIG_DFL)
            self.stopped = True
        signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
    def keep(self, step):
        """At a step's end: save, if it is time; end the run if any rank got a signal."""
        stop = engine.anywhere(self.stopped)
        if stop or self.args.save_interval and step % self.args.save_interval == 0:
            with writing(f"the checkpoint of step {step} to {self.folder}"): self._save(step)
        if stop:
            log.say(f"stopped after step {step}; to go on, start as before, with --resume")
            raise SystemExit(0)
    _load = lambda self, rank: opened(torch.load, str(self.start / f"rank{rank}.pt"),
                                      "the checkpoint in", "cpu", weights_only=False)
    def _save(self, step):
        new = self.folder / ".new"
        engine.on_rank_zero(lambda: (shutil.rmtree(new, True), os.makedirs(new)))
        state = {"step": step, "flags": self._flags(), "ema": self.ema.shadow if self.ema else (),
                 "random": (random.getstate(), np.random.get_state(), torch.get_rng_state(),
                            torch.cuda.get_rng_state_all())}
        torch.save(state, new / f"rank{engine.rank()}.pt")
        for name, model in self.engines.items():                          # all ranks wait for all
            model.save_checkpoint(new, name, save_latest=False, exclude_frozen_parameters=self.nf4)
        engine.on_rank_zero(lambda: self._publish(new, self.folder / f"step{step}"))
    def _publish(self, new, final):
        for path in [*new.rglob("*"), new]:
            file = os.open(path, os.O_RDONLY)
            os.fsync(file), os.close(file)
        if final.exists():                          # of a step that a resumed run takes again
            (self.folder / "latest").unlink(True), final.rename(new / "replaced")
        new.rename(final)
        log.write_text(self.folder / "latest", final.name), shutil.rmtree(final / "replaced", True)
        old = sorted(self.folder.glob("step*"), key=os.path.getmtime)[:-self.args.save_total_limit]
        for path in {*old} - {final}: shutil.rmtree(path.rename(new))      # a kill leaves no half
    _flags = lambda self: {"ranks": engine.world_size(), **{
        name: value for name, value in vars(self.args).items() if name not in FREE}}
