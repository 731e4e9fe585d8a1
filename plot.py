"""Pictures of runs: curves, of several runs together, and a page of each to look at.

    python plot.py out/a out/b ...    runs.png: runs that differ in their seed alone are one curve,
                                      a band over seeds. report.html: settings, curves, samples"""
import ast
import base64
import json
import os
import sys
from pathlib import Path

import pandas as pd
import seaborn
from matplotlib.figure import Figure

from configurator import blame, die
from runs import read_config, read_rows, write_whole

# The panels: title, and the keys of metrics.jsonl that it shows; of several runs the first alone.
PANELS = """\
accuracy: eval/accuracy reward/accuracy rollout/truncated
tokens a response: rollout/mean_length
entropy, nats a token: train/entropy
gradient norm; share of clipped tokens: train/grad_norm train/clip_fraction
change of right responses' log-likelihood; share that fell: displacement/mean displacement/fell
share of incorrect tokens that are spared: nthr/selected
shares of masks, of groups: dagrpo/lambda_pos dagrpo/lambda_neg dagrpo/fully_masked anchor/hard
log-likelihood a token; share under 1%: anchor/logp anchor/logp_right anchor/unlikely
seconds: time/step time/rollout time/sleep time/judge time/old_policy time/update time/sync"""


def subplots(rows):
    """(figure, its axes, one below the other)."""
    fig = Figure((9, 1.5 + 3 * rows), layout="constrained")  # width and height, inches
    return fig, fig.subplots(rows, squeeze=False).flat


def save_figure(fig, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    fig.savefig(f"{path}.tmp", format="png", dpi=110)
    os.replace(f"{path}.tmp", path)


def read_runs(folders):
    """{name: [rows of metrics.jsonl of each seed]}; the name is the settings that differ."""
    configs, runs = [], []
    for folder in folders:
        with blame(f"{folder}: not a run with run_config.json and metrics.jsonl"):
            configs.append(read_config(folder))
        runs.append(read_rows(folder) or die(f"{folder}: a run without a row"))
    differ = [key for key in dict.fromkeys(key for config in configs for key in config)
              if key not in ("seed", "out_dir", "resume")
              and any(config.get(key) != configs[0].get(key) for config in configs)]
    curves = {}
    for config, rows in zip(configs, runs):
        curves.setdefault("\n".join(f"{key}={config.get(key)}" for key in differ), []).append(rows)
    return curves


def plot_runs(curves, path):
    """Draw the panels of which there are numbers. curves: {name: [rows of metrics of each seed]},
    see read_runs; a curve for each name, with a band from the lowest to the highest seed."""
    several = sum(map(len, curves.values())) > 1
    points = []
    for title, keys in (line.split(": ") for line in PANELS.splitlines()):
        for key in keys.split()[:1 if several else None]:
            for name, runs in curves.items():
                curve = f"{name}\n{len(runs)} seeds".strip() if several else key
                points += [(title, curve, row["step"], row.get(key)) for row in sum(runs, [])]
    points = pd.DataFrame(points, columns=["panel", "curve", "step", "value"]).dropna()
    order = points["curve"].unique() if several else None  # one colour in all panels
    panels = [*points.groupby("panel", sort=False)]
    fig, axes = subplots(len(panels))
    for ax, (title, panel) in zip(axes, panels):
        seaborn.lineplot(panel, x="step", y="value", hue="curve", hue_order=order, marker="o",
                         errorbar=("pi", 100), ax=ax)
        seaborn.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title="")
        ax.set(title=title, ylabel="")
    save_figure(fig, path)


def write_page(name, path, data):
    """The page `name` of this folder, with data in it; no text in them becomes a tag."""
    page = Path(__file__).with_name(name).read_text(encoding="utf-8")
    write_whole(path, page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1))


def report(folder):
    """Write report.html of a run: settings that are not the defaults, curves, and its samples by
    step; of long runs every second one, every fourth, ..., so that it stays under 5 MB."""
    plot_runs(read_runs([folder]), f"{folder}/curves.png")
    curves = base64.b64encode(Path(folder, "curves.png").read_bytes()).decode()
    script = ast.parse(Path(__file__).with_name("train.py").read_text(encoding="utf-8"))
    defaults = {ast.unparse(node.targets[0]): ast.unparse(node.value)
                for node in script.body if isinstance(node, ast.Assign)}
    settings = {key: x for key, x in read_config(folder).items() if repr(x) != defaults.get(key)}
    samples = read_rows(folder, "samples")
    while len(samples) > 1 and len(json.dumps(samples)) > 4_000_000:
        samples = samples[::-2][::-1]  # the newest stays
    write_page("report.html", f"{folder}/report.html",
               dict(folder=folder, settings=settings, curves=curves, samples=samples))


if __name__ == "__main__":
    folders = sys.argv[1:] or die("plot.py: which runs? python plot.py out/a out/b")
    above = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    plot_runs(read_runs(folders), f"{above}/runs.png")
    for folder in folders:
        report(folder)
    print(f"wrote {above}/runs.png, and report.html in each folder")
