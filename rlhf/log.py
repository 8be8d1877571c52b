"""One dict a step -> progress bar, metrics.jsonl, monitors.  Only rank 0 shows and writes."""
import atexit, contextlib, json, math, os, sys, time
import numpy as np
from tqdm import tqdm
from rlhf import engine
from rlhf.args import writing

def say(text):
    """A line for the user, above the progress bar."""
    if engine.rank() == 0: tqdm.write(text, file=sys.stdout), sys.stdout.flush()

class Log:
    """A run's args.json, metrics.jsonl, samples.jsonl and bar; `shown`: the line's metrics."""
    def __init__(self, args, total_steps, shown, train_engine, done=0):
        self.shown, self.interval, self.engine = shown, args.log_interval, train_engine
        self.limit = args.profile and engine.products_rate(args.dtype)          # all ranks at once
        if engine.rank() != 0:
            self.step = self.evaluation = self.samples = lambda *_: engine.communicated()
            return
        write_json(f"{args.output_dir}/args.json", vars(args))
        self.files = {name: _reopened(f"{args.output_dir}/{name}.jsonl", done)
                      for name in ("metrics", "samples")}
        if ramp := args.lr_range_test:              # at its end, or when a guard ends it
            atexit.register(suggest_rate, f"{args.output_dir}/metrics.jsonl", max(2, ramp // 5))
        self.bar = tqdm(total=total_steps, initial=done, dynamic_ncols=True, disable=None)
        self.clock, _ = time.perf_counter(), engine.communicated()
    def step(self, step, metrics):
        """Record a step.  Its tokens_total and flops_total become tokens_per_second and tflops."""
        metrics["seconds"] = seconds = time.perf_counter() - self.clock
        metrics["tokens_per_second"] = metrics.pop("tokens_total") / seconds
        metrics["tflops"] = metrics.pop("flops_total") / seconds / engine.world_size() / 1e12
        metrics["skipped_steps"] = self.engine.skipped_steps           # fp16 gradients overflowed
        metrics.update({"seconds_communication": engine.communicated()} if self.limit else {})
        self._record(step, metrics, "train/")
        self.bar.update(1)
        if step % self.interval == 0 or step == self.bar.total:
            self._say(step, {name: metrics[name] for name in self.shown})
        if self.limit:
            parts = {n[8:]: v / seconds for n, v in metrics.items() if n.startswith("seconds_")}
            rates = {n: metrics[n] for n in ("tokens_per_second", "tflops")}
            self._say(step, {**parts, **rates, "of_products": metrics["tflops"] / self.limit})
    def evaluation(self, step, metrics):
        """Record and print an evaluation on held-out rows."""
        self._record(step, metrics, "")
        self._say(step, metrics)
    @writing("to samples.jsonl")
    def samples(self, step, tokenizer, batch, show=3):
        """Keep a rollout's prompts and responses with score and KL; print the first few."""
        columns = ("prompt_ids", "prompt_mask", "response_ids", "mask", "score", "kl")
        for i, (ids, seen, answer, said, score, kl) in enumerate(zip(*map(batch.get, columns))):
            prompt, response = tokenizer.decode(ids[seen]), tokenizer.decode(answer[said])
            row = {"prompt": prompt, "response": response, "score": score.item(), "kl": kl.item()}
            print(json.dumps({"step": step, **row}), file=self.files["samples"])
            if i < show:
                say(f"  {prompt[-200:]!r} => {response[:300]!r}  [score {score:.2f}, kl {kl:.2f}]")
    def _record(self, step, metrics, prefix):
        row = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        with writing(f"to {self.files['metrics'].name}"):
            print(json.dumps({"step": step, **row}), file=self.files["metrics"])
        if self.engine.monitor.enabled:                   # DeepSpeed's: TensorBoard and others
            self.engine.monitor.write_events([(prefix + n, v, step) for n, v in metrics.items()])
        self.clock, _ = time.perf_counter(), engine.communicated()
    def _say(self, step, metrics):
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        say(f"step {step}/{self.bar.total}  {values}")

def suggest_rate(path, width):
    """Where, over `width` steps of a ramp's metrics.jsonl, the loss falls (in step 3: the reward
    rises, the critic's loss falls) steepest against log10(rate) until its best; and a picture."""
    for label, rate in ("loss", "lr"), ("-reward", "actor_lr"), ("value_loss", "critic_lr"):
        metric, sign = label.strip("-"), -1 if "-" in label else 1
        known = [row for row in map(json.loads, open(path)) if row.get(metric) is not None]
        x, y = np.log10([row[rate] for row in known]), [sign * row[metric] for row in known]
        if len(y) >= width:
            lowest = np.convolve(y, np.ones(width), "valid").argmin()     # then it diverges
            slopes = [np.polyfit(x[i:i + width], y[i:i + width], 1)[0] for i in range(lowest + 1)]
            best, most = 10 ** x[np.argmin(slopes) + width // 2], sign * min(slopes)
            say(f"--lr_range_test: {metric} {most:+.2g} a decade, the most, at --{rate} {best:.1e}"
                if min(slopes) < 0 else f"--lr_range_test: {metric} gets better at no --{rate}")
            with contextlib.suppress(ImportError):                          # the extra [plot]
                from matplotlib.figure import Figure
                axes = Figure().subplots()
                axes.semilogx(10 ** x, y), axes.axvline(best), axes.set(xlabel=rate, ylabel=label)
                axes.figure.savefig(f"{os.path.dirname(path)}/{rate}.png")

def _reopened(path, done):
    """A file of JSON lines to append to, without what was written after step `done`."""
    lines = open(path).readlines() if done and os.path.exists(path) else []
    write_text(path, "".join(line for line in lines if line.endswith("\n")      # no half line
                             and json.loads(line)["step"] <= done))
    return open(path, "a", buffering=1)

def write_text(path, text):
    """Write a file whole or not at all."""
    with writing(path), open(f"{path}.tmp", "w") as file:
        file.write(text), file.flush(), os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
write_json = lambda path, value: write_text(path, json.dumps(value, indent=2))

def work(batches, passes):
    """What {model: forward passes} did with the batches -> tokens_total (no padding), flops_total:
    2 a weight and token, in attention 4 * layers * width * length a token (Megatron's count)."""
    lengths = [batch["prompt_mask"].sum(1) + batch["mask"].sum(1) for batch in batches]
    def flops(module):
        weights = sum(getattr(p, "ds_numel", p.numel()) << (p.dtype.itemsize < 2)      # 4 bits: two
                      for p in module.parameters())                                    # in a byte
        attention = 4 * module.config.num_hidden_layers * module.config.hidden_size
        return sum((length * (2 * weights + attention * length)).sum() for length in lengths)
    return {"tokens_total": sum(length.sum() for length in lengths), "flops_total": sum(
        n * flops(getattr(model, "module", model)) for model, n in passes.items() if model)}
