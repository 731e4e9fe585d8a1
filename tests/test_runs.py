"""A run's folder, its figures and curves, and the memory it is estimated to take."""
import json
import math
import os
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configs import update_memory
from peft import LoraConfig, get_peft_model
from test_model_utils import make_group
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import memory
import plot
import runs
from metrics import Figures, find_alarms, note_anchors
from model_utils import Policy, pack
from plot import plot_runs


def test_figures_over_ranks(on_ranks):
    ranks, some = [Figures("cpu") for _ in range(4)], torch.tensor([True, False, True])
    ranks[0].mean("mean", torch.tensor([1.0, math.nan, 2.0]), where=some)
    ranks[1].mean("mean", np.array([3, 6]))
    ranks[2].mean("nothing", torch.zeros(0), where=torch.zeros(0) > 0)
    for figures, x in zip((*ranks[:2], ranks[1]), (-7.0, -3.0, -5.0)):
        figures.sum("sum", torch.tensor([x, math.inf, 0.5]), where=some)
        figures.max("max", torch.tensor([x, 0.0, x - 1]), where=some)
    ranks[3].max("max", torch.zeros(0))  # a rank with nothing but fillers
    for told in on_ranks(*(figures.all_ranks for figures in ranks)):
        assert told == pytest.approx(
            {"mean": 3.0, "nothing": math.nan, "sum": -13.5, "max": -3.0}, nan_ok=True)


def test_alarms():
    usual = {"time/step": 1.0, "rollout/groups_kept": 4, "reward/mean": 0.5, "reward/accuracy": 0.4,
             "train/grad_norm": 1.0, "rollout/mean_length": 30.0, "train/entropy": 0.3,
             "train/loss": 0.1, "gap/mean": 1e-4}
    rows = [{"step": 0, "eval/accuracy": 0.4}]

    def step(key="time/step", value=1.0):
        row = usual | {key: value}
        said = find_alarms(row, rows)
        rows.append(row)
        return [line.split(": ")[0] for line in said], [k for k in row if k.startswith("alarm/")]

    swings = [0.1, -0.1] * 5
    assert [step("train/loss", x) for x in swings] == [([], [])] * 10
    for name, key, value in (("gradient", "train/grad_norm", 11.0), ("gap", "gap/mean", 0.05),
                             ("length", "rollout/mean_length", 9.0),
                             ("entropy", "train/entropy", 0.005)):
        assert step(key, value) == ([f"alarm/{name}"], [f"alarm/{name}"])
        assert step(key, value) == ([], [f"alarm/{name}"])  # once is enough
    assert [step("train/grad_norm", x)[0] for x in (0.0, None)] == [[], []]
    empty = {key: 0.4 for key in usual if not key.startswith(("train/", "gap/"))}  # no group at all
    assert find_alarms(empty | {"train/bad_step": 1.0}, rows) == []
    assert [line.split(": ")[0] for line in find_alarms(empty, rows)] == ["alarm/no_signal"]
    assert ["alarm/flat"] in [step("train/loss", 4 * x)[0] for x in swings]


def test_how_far_anchors_are_from_the_policy(on_ranks):
    group = make_group([1], [[1, 1], [1], [1, 1, 1]], reward=[1, 0, 1],
                       is_anchor=np.array([False, False, True]))
    old = SimpleNamespace(logp=torch.tensor([0.5, 0.1, 0.9, 0.5, 0.009, 0.011]).log(),
                          entropy=torch.arange(6.0))
    figures = Figures("cpu")
    note_anchors(figures, group, old)
    note_anchors(figures, make_group([1], [[1]]), None)  # nothing to be said without one
    assert on_ranks(figures.all_ranks) == [pytest.approx({
        "anchor/logp": np.log([0.5, 0.009, 0.011]).mean(), "anchor/entropy": 4,
        "anchor/logp_right": np.log([0.5, 0.1]).mean(), "anchor/unlikely": 1 / 3})]


@pytest.fixture
def save(model_dir):
    """save(out_dir, step): a checkpoint of save.model, a tiny one whose norms are 1; its folder."""
    def save(out_dir, step, **config):
        config = dict(keep_ckpts=9, on_full_disk="stop", lr=1) | config
        runs.save_checkpoint(out_dir, dict(step=step, position=9), save.model, tokenizer,
                             torch.optim.AdamW(save.model.parameters()), config)
        return out_dir / f"step_{step:06d}"

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = {"default": "x", "tool_use": "y"}  # a file each, if they are files
    save.model = AutoModelForCausalLM.from_config(Qwen2Config(
        hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1,
        num_key_value_heads=2, vocab_size=9))
    return save


def test_broken_checkpoints_are_passed_over_and_not_counted(tmp_path, capsys, save):
    paths = [save(tmp_path, s) for s in range(6)]
    (tmp_path / "step_000007.tmp").mkdir()  # a write that never ended is no checkpoint
    assert runs.newest_checkpoint(tmp_path) == (str(paths[5]), runs.check_checkpoint(paths[5]))
    os.truncate(paths[5] / "model.safetensors", 40)
    (paths[4] / "optimizer.pt").unlink()
    (paths[3] / "trainer_state.json").write_text('{"step": ')
    for path, old, new in ((paths[2] / "run_config.json", b"{", b"x"),  # files as long as they were
                           (paths[1] / "model.safetensors", b"\0\0\x80\x3f", b"\0\0\x80\x40")):
        path.write_bytes(path.read_bytes().replace(old, new, 1))
    path = str(paths[0])
    runs.prune(tmp_path, path, 1)  # saved after a resume from it: whole, so it stays
    assert runs.newest_checkpoint(tmp_path)[0] == path
    assert capsys.readouterr().out.count("warning: ") == 5
    runs.prune(f"{tmp_path}/", f"{tmp_path}//{paths[2].name}", 2)
    assert runs.checkpoints(tmp_path) == [str(p) for p in paths[:0:-1]]


def test_open_run_loses_nothing(tmp_path, dies, save):
    out = tmp_path / "run[1]"
    runs.open_run(str(out), dict(lr=1))
    path, metrics = save(out, 2), out / "metrics.jsonl"
    for step, key, x in ((0, "eval/accuracy", 1), (1, "x", math.nan), (2, "x", math.inf),
                         (2, "eval/accuracy", 2), (3, "train/entropy", 3)):
        runs.log(out, metrics=[{"step": step, key: x}])
    before = metrics.read_text() + '{"step": 4, "x"'
    metrics.write_bytes(b"\xff\n" + before.encode())  # a damaged row, too
    runs.open_run(str(out), dict(keep_ckpts=1, lr=2), (str(path), dict(step=2)))
    assert metrics.read_text() == "".join(before.splitlines(True)[:4])  # step 3 comes again
    assert [r.get("x", 7) for r in runs.read_rows(out)] == [7, None, None, 7]  # JSON has no nan
    plot_runs(plot.read_runs([str(out)]), f"{out}/curves.png")
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "old_1" / "metrics.jsonl").read_bytes() == b"\xff\n" + before.encode()
    assert [(d / "run_config.json").read_text()[-3] for d in (out / "old_1", out)] == ["1", "2"]
    (out / "report.html").touch()
    runs.open_run(str(out), dict(lr=2))
    assert {*os.listdir(out)} == {"old_1", "old_2", "run_config.json"}
    before, after = (dict(lora_rank=4, model=x) for x in "ab")
    runs.open_run(str(out / "lora"), before)
    for other in (after, before | dict(lora_rank=0)):
        dies("adapters are resumed with", runs.open_run, str(out / "lora"), other,
             (str(out / "lora"), dict(step=0)))
    lock = runs.lock_folder(out)
    assert (out / "lock").read_text() == f"{socket.gethostname()}, process {os.getpid()}\n"
    (out / "lock").write_text("another one")  # whoever holds it says so there
    dies("under way: another one", runs.lock_folder, out)
    lock.close()  # it goes with whoever held it
    runs.lock_folder(out).close()
    assert len(os.listdir(out / "old_2")) == 5  # a log, curves, page, config, checkpoint


def test_a_full_disk_ends_a_run_and_costs_nothing_that_was_saved(
        tmp_path, save, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            [runs.log(tmp_path, metrics=[{"step": i, "x": "y" * i}]) for i in (1, 99)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": "y"}\n'
    save(tmp_path, 1)
    full, weight = Path("/dev/full"), save.model.model.norm.weight
    for module, name, fault in (
            (torch, "save", lambda *_: full.write_text("x")),
            (runs.shutil, "disk_usage", lambda _: SimpleNamespace(free=5)),
            (runs, "to_disk", lambda _: weight.data.fill_(math.nan))):  # of the next one
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
            patch.setattr(module, name, fault)
            [save(tmp_path, step) for step in (5, 6)]
        said = "".join(capsys.readouterr())
        assert "not written" in said and ("GiB are free" in said or "not finite" in said)
        assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(SystemExit, match="1"):  # whatever on_full_disk says
        save(tmp_path, 7, on_full_disk="go on")
    weight.data.fill_(1)
    monkeypatch.setattr(torch, "save", lambda *_: full.write_text("x"))
    save(tmp_path, 8, on_full_disk="go on")
    assert "step_000008 is not written: [Errno 28]" in capsys.readouterr().out
    monkeypatch.undo()
    assert [p[-1] for p in runs.checkpoints(tmp_path)] == ["5", "1"]


def test_runs_that_differ_in_their_seed_alone_are_one_curve(tmp_path, monkeypatch, refused):
    for name, config, values in (("a", dict(variant="grpo", seed=0), (1, 2)),
                                 ("b", dict(variant="grpo", seed=1), (3, 8)),
                                 ("c", dict(variant="nthr", seed=0, newer=1), (5, None))):
        out = str(tmp_path / name)
        runs.open_run(out, config | dict(out_dir=out))
        for step, x in enumerate(values):
            runs.log(out, metrics=[{"step": step, "train/entropy": x, "time/step": 3}])
    figures = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: figures.append(figure))
    plot_runs(plot.read_runs([str(tmp_path / x) for x in "abc"]), "runs.png")
    handles = figures[0].axes[0].get_legend().legend_handles
    names = {line.get_color(): line.get_label() for line in handles}
    drawn = {ax.get_title(): {names[line.get_color()]: line.get_xydata().tolist()
                              for line in ax.lines if len(line.get_xdata())}
             for ax in figures[0].axes}
    assert drawn == {
        "entropy, nats a token": {"variant=grpo\nnewer=None\n2 seeds": [[0, 2], [1, 5]],
                                  "variant=nthr\nnewer=1\n1 seeds": [[0, 5]]},
        "seconds": dict.fromkeys(("variant=grpo\nnewer=None\n2 seeds",
                                  "variant=nthr\nnewer=1\n1 seeds"), [[0, 3], [1, 3]])}
    band = figures[0].axes[0].collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (1, 8)
    monkeypatch.undo()
    hostile = {"step": 1, "problem": "</script><img src=x onerror=alert(1)>", "tokens": ["a"] * 200}
    runs.log(out, samples=[hostile] * 8000 + [hostile | {"step": 2}])  # over 8 MB
    plot.report(out)
    page = (tmp_path / "c" / "report.html").read_text()
    assert "<img src=x" not in page and page.count("</script>") == 1 and len(page) < 5e6
    data = json.loads(page.split("const data = ")[1].splitlines()[0])
    assert data["settings"] == {"variant": "nthr", "newer": 1, "out_dir": out}
    assert data["samples"][-1]["step"] == 2 and data["samples"][0] == hostile
    assert "nowhere: not a run" in refused("plot.py", str(tmp_path / "nowhere"))
    assert "which runs?" in refused("plot.py")


@pytest.mark.parametrize("dtype, lora_rank", [
    (torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 8)])
def test_memory_is_what_autograd_keeps_and_vllm_gets_the_rest(model_dir, dtype, lora_rank,
                                                              monkeypatch, dies):
    for config in (AutoConfig.from_pretrained(model_dir, num_hidden_layers=4), Qwen2Config(
            hidden_size=384, intermediate_size=2048, num_attention_heads=6, num_hidden_layers=4,
            num_key_value_heads=2, vocab_size=999, tie_word_embeddings=True)):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed").float()
        params = sum(p.numel() for p in model.parameters())
        if lora_rank:
            lora = LoraConfig(r=lora_rank, target_modules="all-linear")
            get_peft_model(model.to(dtype), lora)
        kept = {}, {}  # addresses: tensors; the weights are in both
        for n, found in zip((60, 120), kept):
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda x: found.update({x.untyped_storage().data_ptr(): x}), lambda x: x):
                Policy(model, dtype)(pack([make_group([3], [np.arange(n) % 99])]), 1.0)
        less, more = (sum(x.untyped_storage().nbytes() for x in y.values()) for y in kept)
        got = update_memory(config, params, compute_bytes=dtype.itemsize, tokens=2**20,
                            lora_rank=lora_rank)
        assert got["activations"] * 2**10 == pytest.approx((more - less) / 60, rel=0.1)
        held = memory.held_memory(config, 2, "ddp", dtype.itemsize, lora_rank > 0, lora_rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        frozen = params if lora_rank else 0
        assert sum(held.values()) * 2**30 == pytest.approx(  # weights, two moments, buckets
            16 * sum(p.numel() for p in trained) + frozen * dtype.itemsize)
    card = SimpleNamespace(total_memory=23 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert memory.vllm_share(0, dict(weights=4, moments=6)) == 10 / 23
    dies("leave nothing of the GPU", memory.vllm_share, 0, dict(weights=19.5))
