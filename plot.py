"""Pictures, as PNG: the curves of a run, accuracy over its checkpoints, several runs together.

    python plot.py out/a out/b ...     runs that differ in their seed alone become one curve: mean,
                                       and a band from the lowest to the highest seed; runs.png
"""
import json
import os
import sys

import numpy as np
from matplotlib.figure import Figure

from configurator import die
from runs import read_metrics

# The panels of curves.png: title, and the keys of metrics.jsonl that it shows.
PANELS = """\
accuracy: eval/accuracy reward/accuracy rollout/truncated
tokens a response: rollout/mean_length
entropy, nats a token: train/entropy
gradient norm; share of clipped tokens: train/grad_norm train/clip_fraction
seconds: time/step time/rollout time/judge time/old_policy time/update time/sync
shares of masks, of groups: dagrpo/lambda_pos dagrpo/lambda_neg dagrpo/fully_masked anchor/hard
margin, points: dagrpo/margin
anchors, nats a token: anchor/logp"""


def subplots(rows=1):
    """(figure, its axes (rows, 1), one below the other)."""
    fig = Figure((9, 1.5 + 3 * rows), layout="constrained")  # width and height, inches
    return fig, fig.subplots(rows, squeeze=False)


def save_figure(fig, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    fig.savefig(f"{path}.tmp", format="png", dpi=110)
    os.replace(f"{path}.tmp", path)


def draw(panels, path):
    """panels: {title: {label: [(step, value), ...]}}; points may be (step, value, low, high)."""
    fig, axes = subplots(len(panels))
    labels = [*dict.fromkeys(label for lines in panels.values() for label in lines)]
    for ax, (title, lines) in zip(axes.flat, panels.items()):
        for label, points in lines.items():
            steps, values, *interval = zip(*sorted(points))
            color = f"C{labels.index(label)}"  # the same in all panels
            ax.plot(steps, values, ".-", label=label, color=color)
            if interval:
                ax.fill_between(steps, *interval, color=color, alpha=0.15)
        ax.set(title=title, xlabel="step")
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes
    save_figure(fig, path)


def plot_curves(out_dir):
    """Draw a run's metrics.jsonl as curves.png, without the panels of which it has no number."""
    rows = read_metrics(out_dir)
    panels = {}
    for line in PANELS.splitlines():
        title, keys = line.split(": ")
        for key in keys.split():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                panels.setdefault(title, {})[key] = points
    draw(panels, f"{out_dir}/curves.png")


def plot_steps(results, path):
    """Draw accuracy over steps, with its interval, of those results of eval.py that have a step."""
    panels = {}
    for r in results:
        run, _, step = r["model"].rpartition("step_")
        if step.isdigit():
            lines = panels.setdefault(f"accuracy on {r['data']}", {})
            point = int(step), r["accuracy"], *r["intervals"]["accuracy"]
            lines.setdefault(f"{run} 95% interval", []).append(point)
    if panels:
        draw(panels, path)


# what plot_runs compares: outcome, and the mechanism
COMPARED = """eval/accuracy reward/accuracy train/entropy rollout/mean_length train/grad_norm
    displacement/mean displacement/fell nthr/selected dagrpo/lambda_pos dagrpo/lambda_neg"""


def plot_runs(folders):
    """Draw runs side by side as runs.png in the folder that holds them; returns its path."""
    seeds = {}  # of each combination of the other settings: its runs' rows
    for folder in folders:
        try:
            with open(f"{folder}/run_config.json") as f:
                config = json.load(f)
            rows = read_metrics(folder)
        except (OSError, ValueError) as e:
            die(f"{folder}: not a run with run_config.json and metrics.jsonl: {e}")
        for key in ("seed", "out_dir", "resume"):
            config.pop(key, None)
        seeds.setdefault(json.dumps(config), []).append(rows)
    configs = [json.loads(key) for key in seeds]
    differ = [key for key in configs[0] if any(c.get(key) != configs[0][key] for c in configs)]
    panels = {}
    for config, runs in zip(configs, seeds.values()):
        name = "\n".join(f"{key}={config.get(key)}" for key in differ)
        for key in COMPARED.split():
            values = {}
            for row in sum(runs, []):
                if row.get(key) is not None:
                    values.setdefault(row["step"], []).append(row[key])
            points = [(step, np.mean(x), min(x), max(x)) for step, x in values.items()]
            if points:
                panels.setdefault(key, {})[f"{name}\n{len(runs)} seeds".strip()] = points
    path = os.path.join(os.path.commonpath([os.path.dirname(os.path.abspath(folder))
                                            for folder in folders]), "runs.png")
    draw(panels, path)
    return path


if __name__ == "__main__":
    print(plot_runs(sys.argv[1:] or die("plot.py: which runs? python plot.py out/a out/b")))
