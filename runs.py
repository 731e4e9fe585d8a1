"""A run's folder: files written whole, those of earlier runs, its log, its checkpoints, its picture, its profile."""
import glob
import itertools
import json
import math
import os
import shutil
import zipfile

from configurator import print0


def write_whole(path, text):
    """Write a text file whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1))


def write_jsonl(path, rows):
    """Write rows as JSON Lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def free_name(stem, suffix=""):
    """The first of stem1suffix, stem2suffix, ... that does not exist: where an earlier file or folder is kept."""
    return next(path for i in itertools.count(1) if not os.path.exists(path := f"{stem}{i}{suffix}"))


def open_run(out_dir, config, resumed_step=None):
    """Make the run folder, with config as run_config.json. Files of an earlier run are moved to out_dir/old_N/; on a resume, rows
    that the resumed run will write again leave metrics.jsonl and samples.jsonl, and the files as they were, and settings
    that were others, are kept in old_N/ too. Rank 0."""
    ours = ("metrics.jsonl", "samples.jsonl", "judge_*.jsonl", "curves.png", "run_config.json", "tensorboard", "trace.json.gz",
            "profile.txt", "eval", "step_" + "[0-9]" * 6)
    there = [p for name in ours for p in glob.glob(os.path.join(glob.escape(out_dir), name))]
    old = free_name(os.path.join(out_dir, "old_"))

    def keep(name):
        os.makedirs(old, exist_ok=True)
        shutil.copy(os.path.join(out_dir, name), old)

    if resumed_step is None and there:
        os.makedirs(old)
        for path in there:
            os.rename(path, os.path.join(old, os.path.basename(path)))
        print0(f"{out_dir} held a run; it is now in {old}")
    os.makedirs(out_dir, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = os.path.join(out_dir, name)
        if resumed_step is None or not os.path.exists(path):
            continue
        kept, dropped = [], 0
        with open(path) as f:
            for line in f:
                try:
                    row = json.loads(line)
                    stays = row["step"] < resumed_step or row["step"] == resumed_step and "eval/accuracy" not in row
                except (ValueError, TypeError, KeyError):  # cut off in the middle of a line, or no row of ours
                    stays = False
                kept += [line] if stays else []
                dropped += not stays
        if dropped:
            keep(name)
            write_whole(path, "".join(kept))
    path = os.path.join(out_dir, "run_config.json")
    if os.path.exists(path):
        with open(path) as f:
            if json.load(f) | dict(resume=None) != json.loads(json.dumps(config)) | dict(resume=None):
                keep("run_config.json")
    write_json(path, config)


def finite(x):
    """x, or None for nan and infinities, which JSON does not have."""
    return x if math.isfinite(x) else None


def open_log(out_dir, config, first_step, wandb_project=None):
    """A function log(row, samples=()) that appends a row to metrics.jsonl, TensorBoard and W&B, and rows to samples.jsonl.

    TensorBoard's rows after first_step, of a run that is resumed there, are forgotten. Rank 0.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=first_step)
    except ImportError:
        writer = None
    if wandb_project:
        import wandb
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)

    def log(row, samples=()):
        row = {k: finite(v) for k, v in row.items()}
        for name, rows in (("metrics.jsonl", [row]), ("samples.jsonl", samples)):
            with open(os.path.join(out_dir, name), "a") as f:
                f.writelines(json.dumps(r) + "\n" for r in rows)
        for key, value in row.items():
            if writer and key != "step" and value is not None:
                writer.add_scalar(key, value, row["step"])
        if wandb_project:
            wandb.log(row, step=row["step"])

    return log


def sample_rows(step, groups, tokenizer, count):
    """Rows of samples.jsonl, the first `count` responses of the groups; with a judge its score, the margin and whether the
    response was kept (`scores`, `margins`, `lam`) too."""
    def judged(g, i):
        return dict(score=finite(float(g["scores"][i])), margin=finite(float(g["margins"][i])), kept=float(g["lam"][i]))

    responses = ((g, i) for g in groups for i in range(len(g["responses"])))
    return [dict(step=step, problem=g["problem"], answer=g["answer"], prompt=tokenizer.decode(g["prompt"]),
                 response=g["texts"][i], reward=float(g["rewards"][i]), advantage=float(g["advantages"][i]),
                 truncated=bool(g["truncated"][i]), anchor=bool(g["anchor"][i]),
                 **(judged(g, i) if "lam" in g else {}))
            for g, i in itertools.islice(responses, count)]


def step_line(row):
    """A step's figures as train.py prints them."""
    extra = ""
    if "judge/failed" in row:
        extra += f" judge failed {row['judge/failed']},"
    if "dagrpo/lambda_pos" in row:
        extra += (f" lambda +{row['dagrpo/lambda_pos']:.2f} -{row['dagrpo/lambda_neg']:.2f}, groups masked "
                  f"{row['dagrpo/fully_masked']:.2f},")
    if "anchor/logp" in row:
        extra += f" anchors {row['anchor/groups']} (hard {row['anchor/hard']:.2f}) logp {row['anchor/logp']:.2f},"
    phases = " ".join(f"{k[5:]} {v:.1f}" for k, v in row.items() if k.startswith("time/"))
    return (f"step {row['step']}: accuracy {row['reward/accuracy']:.3f}, {row['rollout/groups_kept']}/{row['rollout/groups_sampled']} "
            f"groups, {row['rollout/response_tokens']} tokens, length {row['rollout/mean_length']:.1f}, truncated "
            f"{row['rollout/truncated']:.2f}, entropy {row['train/entropy']:.3f}, loss {row['train/loss']:+.4f}, grad "
            f"{row['train/grad_norm']:.2f}, clip {row['train/clip_fraction']:.3f}, kl {row['train/kl']:.4f}, gap "
            f"{row['gap/mean']:.1e}/{row['gap/max']:.1e}, wasted {row['rollout/tokens_wasted']},{extra} s: {phases}")


def prune(out_dir, newest, keep):
    """Delete a run's checkpoints up to `newest` but the last `keep`. Later ones, which an older one was resumed in place of,
    are broken, and do not count."""
    for old in [path for path in checkpoints(out_dir) if path <= newest][keep:]:
        shutil.rmtree(old)


def checkpoints(out_dir):
    """Checkpoint folders of a run, newest first, whole or not."""
    return sorted(glob.glob(os.path.join(glob.escape(out_dir), "step_" + "[0-9]" * 6)), reverse=True)


def check_checkpoint(path):
    """Raise unless every file that was saved is there, as long as it was, and can be opened."""
    from safetensors import safe_open

    with open(os.path.join(path, "trainer_state.json")) as f:
        state = json.load(f)
    for name, size in state["files"].items():
        file = os.path.join(path, name)
        if os.path.getsize(file) != size:
            raise ValueError(f"{name} has {os.path.getsize(file)} bytes, not {size}")
        if name.endswith(".json"):
            with open(file) as f:
                json.load(f)
        elif name.endswith(".safetensors"):
            with safe_open(file, "pt") as f:
                f.keys()
        elif name.endswith(".pt") and zipfile.ZipFile(file).testzip():
            raise ValueError(f"{name} is damaged")
    return state


def newest_checkpoint(out_dir):
    """(folder, trainer state) of the newest whole checkpoint of a run, or None. Broken ones are passed over, aloud."""
    for path in checkpoints(out_dir):
        try:
            return path, check_checkpoint(path)
        except Exception as e:  # whatever is wrong with it, an older one may be whole
            print0(f"warning: {path} is not a whole checkpoint ({e}); looking for an older one")
    return None


def read_metrics(out_dir):
    """Rows of a run's metrics.jsonl."""
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def plot_curves(out_dir):
    """Draw a run's metrics.jsonl as curves.png: accuracy, length, entropy, gradient norm, seconds; for DaGRPO its masks,
    margins and anchors too."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(out_dir)
    panels = [
        ("accuracy", [("eval/accuracy", "greedy, held out"), ("reward/accuracy", "sampled, training prompts"),
                      ("rollout/truncated", "truncated")]),
        ("tokens a response", [("rollout/mean_length", "length")]),
        ("entropy, nats a token", [("train/entropy", "entropy")]),
        ("gradient norm; clipped share", [("train/grad_norm", "gradient norm"), ("train/clip_fraction", "clipped")]),
        ("seconds a step", [(f"time/{p}", p) for p in ("step", "rollout", "judge", "old_logp", "ref_logp", "update", "sync")]),
        ("masks: share that stays; of groups", [
            ("dagrpo/lambda_pos", "lambda+"), ("dagrpo/lambda_neg", "lambda-"), ("dagrpo/fully_masked", "groups masked whole"),
            ("anchor/hard", "groups without a correct rollout")]),
        ("margins, points (10, 50, 90%)", [(f"dagrpo/margin_p{q}", f"{q}%") for q in (10, 50, 90)]),
        ("anchors: nats a token", [("anchor/logp", "log-likelihood")]),
    ]
    panels = [p for p in panels if any(r.get(key) is not None for r in rows for key, _ in p[1])]
    fig, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(11, 3.5 * -(-len(panels) // 2)), constrained_layout=True)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, (title, lines) in zip(axes.flat, panels):
        for key, label in lines:
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if points:
                ax.plot(*zip(*points), marker="o" if key.startswith("eval/") else None, label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    save_figure(fig, os.path.join(out_dir, "curves.png"))


def save_figure(fig, path):
    """Write a matplotlib figure as PNG, whole or not at all, and forget it."""
    import matplotlib.pyplot as plt

    fig.savefig(path + ".tmp.png", dpi=110)
    plt.close(fig)
    os.replace(path + ".tmp.png", path)


def write_profile(profiler, out_dir):
    """Stop a torch profiler; write its trace (chrome://tracing, Perfetto) and print and write the ten operations that took
    most time themselves, on the GPU if there is one."""
    import torch

    profiler.stop()
    profiler.export_chrome_trace(os.path.join(out_dir, "trace.json.gz"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=10, max_name_column_width=60)
    write_whole(os.path.join(out_dir, "profile.txt"), table)
    print0(table)
