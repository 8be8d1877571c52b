"""Draw true reward against KL from the evaluations of one or more runs of run_all.sh.

    python tests/bench/plot_frontier.py docs/frontier.png output/evaluation/evaluation.json ...

Needs matplotlib: pip install -e '.[plot]'."""

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rlhf.toy import BEST_REWARD

picture, *files = sys.argv[1:]
runs = [json.load(open(file))["models"] for file in files]
figure, axes = plt.subplots(figsize=(6, 3.4), dpi=150)
styles = {"sft": ("o", "tab:gray"), "ppo": ("*", "tab:red"), "ema": ("P", "tab:orange")}
for run in runs:
    best_of = sorted(
        (row["kl"], row["true_reward"]) for name, row in run.items() if "best of" in name
    )
    if best_of:
        axes.plot(
            *zip((0, run["sft"]["true_reward"]), *best_of),
            "s-",
            color="tab:blue",
            alpha=0.6,
            markersize=4,
            label="best of n of SFT, n = 1, 4, 16, 64",
        )
    for name, (marker, color) in styles.items():
        if name in run:
            row = run[name]
            axes.errorbar(
                row["kl"],
                row["true_reward"],
                row["true_reward_ci"],
                row["kl_ci"],
                marker=marker,
                color=color,
                markersize=9,
                linestyle="",
                capsize=2,
                label=name.upper(),
            )
axes.axhline(BEST_REWARD, color="black", linewidth=0.8, linestyle="--", label="best possible")
labels = dict(zip(*reversed(axes.get_legend_handles_labels())))
axes.legend(labels.values(), labels.keys(), fontsize=7, loc="lower right")
axes.set_xlabel("KL from SFT (nats a response)"), axes.set_ylabel("true reward")
figure.tight_layout()
figure.savefig(picture)
