"""Pictures, as PNG: the curves of a run, accuracy over its checkpoints."""
import os

from matplotlib.figure import Figure

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
    fig = Figure((7, 1.5 + 3 * rows), layout="constrained")  # width and height, inches
    return fig, fig.subplots(rows, squeeze=False)


def save_figure(fig, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    fig.savefig(f"{path}.tmp", format="png", dpi=110)
    os.replace(f"{path}.tmp", path)


def draw(panels, path):
    """panels: {title: {label: [(step, value), ...]}}; points may be (step, value, low, high)."""
    fig, axes = subplots(len(panels))
    for ax, (title, lines) in zip(axes.flat, panels.items()):
        for label, points in lines.items():
            steps, values, *interval = zip(*sorted(points))
            ax.plot(steps, values, ".-", label=label)
            if interval:
                ax.fill_between(steps, *interval, alpha=0.15)
        ax.set(title=title, xlabel="step")
        ax.legend(fontsize=8)
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
