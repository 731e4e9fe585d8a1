"""What the README promises of a new variant: its own diff, applied to a copy, trains."""
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from runs import read_rows

ROOT = Path(__file__).resolve().parent.parent


def test_a_variant_in_ten_lines_and_a_reward_of_ones_own(run, tmp_path, model_dir, refused):
    [diff] = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert len(changed) <= 10 and diff.count("+++ ") <= 2

    for path in [*ROOT.glob("*.py"), ROOT / "config"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    applied = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path)
    assert not applied.returncode, "what README's diff changes is another text now: make it anew"
    variant = re.search(r'variant == "(\w+)"', diff)[1]
    done = run("train.py", "config/countdown.py", f"--variant={variant}", f"--model={model_dir}",
               "--max_steps=1", "--eval_every=0", "--eval_problems=2", "--prompts_per_step=8",
               "--prompts_per_update=8", "--lora_rank=1", "--out_dir=out", cwd=tmp_path)
    row, *_ = read_rows(tmp_path / "out")
    assert row["train/grad_norm"] > 0 and row["rollout/groups_kept"] > 0
    assert "reward: " not in done.stdout  # none has failed
    own = runpy.run_path(ROOT / "config" / "countdown.py")
    samples = read_rows(tmp_path / "out", "samples")
    numbers = {row["problem"]: row for row in own["dataset"]("train")}
    for s in samples:
        want = [0 if is_cut else own["reward"](text, numbers[s["problem"]])
                for text, is_cut in zip(s["responses"], s["truncated"])]
        assert s["reward"] == pytest.approx(want) and "[4, 12] -> 8" in s["prompt"]
    assert {0.0} < {round(x, 1) for s in samples for x in s["reward"]} <= {0.0, 0.2, 1.0}
    # without the diff
    assert f"'{variant}' is none of grpo" in refused("train.py", f"--variant={variant}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="whichever are there")
def test_these_versions_are_those_that_were_tried(run):
    printed = run("bench/versions.py").stdout
    assert f"{torch.__version__.split('+')[0]}\n" in printed and "\ntried on 20" in printed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it has more parts, for large models")
@pytest.mark.parametrize("part", ["all", "trainer"])
def test_bench_runs(run, tmp_path, model_dir, part):
    """Its figures are for people to read: here every one of them is a number."""
    AutoModelForCausalLM.from_pretrained(model_dir, num_hidden_layers=1).save_pretrained(tmp_path)
    done = run("bench/bench.py", f"--part={part}", f"--model={tmp_path}", "--repeat=1",
               "--groups=1", "--group_size=2", "--layers=1", "--width=96", "--mlp=96",
               "--vocabulary=1000", "--tokens=(64,)", "--budgets=(256,)", "--lengths=(20,60)")
    tables = re.findall(r"\n\|---.*\n((?:\|.*\n)+)", done.stdout)
    cells = [cell for table in tables for row in table.splitlines()
             for cell in re.split(r" ?\| ?", row)[2:-1]]
    assert len(tables) == {"all": 3, "trainer": 1}[part] and len(cells) > 10
    numbers = [re.match(r"[\d.]+", cell) for cell in cells if cell not in ("True", "False")]
    assert all(numbers) and "nan" not in done.stdout
