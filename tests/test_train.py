"""train.py and eval.py as users run them: whole runs, resumed runs, two ranks, and every kind of bad input."""
import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

SMALL = ("config/quickstart.py", "--prompts_per_step=2", "--prompts_per_update=1", "--group_size=4",
         "--eval_problems=8", "--oversample=4", "--max_rounds=8", "--tokens_per_micro_batch=200", "--variant=grpo",
         "--compute_dtype=float32", "--rollout_dtype=float32")


def rows(path):
    return [json.loads(line) for line in open(path)]


def figures(path):
    """Metrics less what a clock or the memory of a process decides (on a GPU that is also what is in work at an end)."""
    return [{k: v for k, v in r.items() if not k.startswith(("time/", "perf/", "rollout/tokens_wasted"))} for r in rows(path)]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of two steps, checkpointed every step."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run("train.py", *SMALL, f"--out_dir={out}", "--max_steps=2", "--eval_every=1", "--keep_ckpts=3")
    return out, done


def test_a_run_leaves_what_it_promises(whole, run):
    out, done = whole
    metrics = rows(out / "metrics.jsonl")
    assert [r["step"] for r in metrics if "eval/accuracy" in r] == [0, 1, 2]
    steps = [r for r in metrics if "train/loss" in r]
    assert [r["step"] for r in steps] == [1, 2]
    for key in ("reward/mean", "reward/accuracy", "rollout/groups_sampled", "rollout/groups_kept",
                "rollout/response_tokens", "rollout/mean_length", "rollout/truncated", "train/entropy", "train/loss",
                "train/grad_norm", "train/clip_fraction", "train/kl", "gap/mean", "gap/max", "time/rollout",
                "time/old_logp", "time/update", "time/sync", "time/step", "perf/rollout_tok_s", "perf/train_tok_s",
                "perf/peak_memory_gib"):
        assert all(key in r for r in steps), key
    assert all(r["gap/max"] < 1e-2 for r in steps)  # every step samples from the weights the step before left
    assert any(r["train/grad_norm"] > 0 for r in steps)
    two = [r for r in steps if r["train/updates"] == 2]  # the first update moves the correct responses of the second
    assert two and all(abs(r["displacement/mean"]) > 1e-5 and 0 <= r["displacement/fell"] <= 1 for r in two)
    assert not any("displacement/mean" in r for r in steps if r["train/updates"] < 2)
    samples = rows(out / "samples.jsonl")
    assert {"prompt", "response", "reward", "advantage", "step"} <= samples[0].keys()
    assert all((s["advantage"] > 0) == (s["reward"] == 1) for s in samples)
    assert (out / "curves.png").stat().st_size > 10_000 and (out / "tensorboard").is_dir()
    assert json.load(open(out / "run_config.json"))["prompts_per_step"] == 2
    assert sorted(p.name for p in out.glob("step_*")) == ["step_000001", "step_000002"]
    # plain transformers reads the checkpoint; it is not the model that training started from
    from transformers import AutoModelForCausalLM
    first, last = (AutoModelForCausalLM.from_pretrained(out / f"step_00000{i}").state_dict() for i in (1, 2))
    assert any(not torch.equal(first[k], last[k]) for k in first) == any(r["train/updates"] for r in steps[1:])


def test_eval_of_a_run_gives_the_accuracy_of_its_evaluations(whole, run):
    """Every checkpoint in turn through one engine, on the problems and with the prompt of its run."""
    out, _ = whole
    done = run("eval.py", "--ckpt", out)
    results = json.load(open(out / "eval" / "results.json"))
    assert [r["model"] for r in results] == ["step_000001", "step_000002"]
    assert [r["accuracy"] for r in results] == [r["eval/accuracy"] for r in rows(out / "metrics.jsonl")
                                                if "eval/accuracy" in r][1:]
    assert all(r["problems"] == 8 and r["intervals"]["accuracy"][0] <= r["accuracy"] <= r["intervals"]["accuracy"][1] for r in results)
    assert done.stdout.count("| arithmetic | 8 x 1 | 0 |") == 2 == (out / "eval" / "results.md").read_text().count("| arithmetic |")
    assert (out / "eval" / "accuracy.png").stat().st_size > 5000
    settings, *responses = rows(out / "eval" / "step_000002" / "arithmetic_n1_t0.jsonl")
    assert settings["n"] == 1 and len(responses) == 8 and {"problem", "answer", "response", "correct"} <= responses[0].keys()


def test_an_interrupted_evaluation_goes_on(whole, run):
    """Sampled responses, a set with a name and one from a file: killed after the first write, then finished."""
    out, _ = whole
    (out.parent / "sums.jsonl").write_text("".join(json.dumps(dict(problem=f"{i} + {i}", answer=2 * i)) + "\n"
                                                   for i in range(11, 17)))
    args = ("eval.py", f"--ckpt={out / 'step_000001'},{out / 'step_000002'}", "--n=3", "--temperature=1.0",
            f"--data=arithmetic,{out.parent / 'sums.jsonl'}", "--max_problems=6", "--save_every=6")
    run(*args, f"--out_dir={out.parent / 'once'}")
    files = [f"step_00000{step}/{name}_n3_t1.jsonl" for step in (1, 2) for name in ("arithmetic", "sums")]
    once = [(out.parent / "once" / f).read_text() for f in files]
    assert all(text.count("\n") == 1 + 6 * 3 for text in once)
    # as a kill leaves it: two problems and a half, the last row cut; of the other three files nothing
    first = out.parent / "cut_off" / files[0]
    first.parent.mkdir(parents=True)
    first.write_text("".join(once[0].splitlines(keepends=True)[:9])[:-20])
    run(*args, f"--out_dir={out.parent / 'cut_off'}")
    assert [(out.parent / "cut_off" / f).read_text() for f in files] == once
    assert [(out.parent / "cut_off" / f"results.{x}").read_text() for x in ("json", "md")] == [
        (out.parent / "once" / f"results.{x}").read_text() for x in ("json", "md")]
    result = json.load(open(out.parent / "once" / "results.json"))[0]
    correct = [r["correct"] for r in map(json.loads, once[0].splitlines()[1:])]
    assert result["accuracy"] == pytest.approx(sum(correct) / 18) and {"pass@2", "pass@3", "maj@3"} <= result.keys()
    assert "Processed" not in run(*args, f"--out_dir={out.parent / 'cut_off'}").stderr  # nothing left to do: no engine


def test_resume_gives_the_same_metrics(whole, run):
    """Killed after the checkpoint of step 1, in the middle of the next step's row: the rest comes out the same."""
    out, _ = whole
    at, cut = 1, out.parent / "cut"
    shutil.copytree(out, cut, ignore=lambda d, names: [n for n in names if n.startswith("step_") and int(n[5:]) > at
                                                       or n in ("curves.png", "tensorboard")])
    lines = open(cut / "metrics.jsonl").readlines()
    keep = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == at + 1)
    (cut / "metrics.jsonl").write_text("".join(lines[:keep]) + lines[keep][:20])
    (cut / f"step_00000{at + 1}.tmp").mkdir()
    run("train.py", *SMALL, f"--out_dir={cut}", "--max_steps=2", "--eval_every=1", "--keep_ckpts=3", "--resume")
    assert figures(cut / "metrics.jsonl") == figures(out / "metrics.jsonl")
    assert rows(cut / "samples.jsonl") == rows(out / "samples.jsonl")
    # the first update of the next step destroys the weights, so that the second has no gradient: the checkpoints stay
    done = run("train.py", *SMALL, f"--out_dir={cut}", "--max_steps=3", "--eval_every=0", "--keep_ckpts=1", "--resume",
               "--learning_rate=1e30", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "the gradient norm is nan" in done.stdout, done.stdout
    assert "learning_rate 2e-05 -> 1e+30" in done.stdout and "max_steps 2 -> 3" in done.stdout
    assert [p.name for p in sorted(cut.glob("step_*"))] == ["step_000001", "step_000002"]
    assert rows(cut / "metrics.jsonl")[-1]["train/grad_norm"] is None


def test_two_ranks(run, tmp_path):
    """One engine a rank. DDP on two machines (two launchers) that share no folder; its checkpoint is resumed by FSDP2 on one,
    as another variant with anchors, which writes one too. The reference model is sharded, then offloaded."""
    far = tmp_path / "far"
    args = ("train.py", *SMALL, "--eval_every=0", "--variant=nthr", "--kl_coef=0.01")
    near = tmp_path / "near"
    run(*args, "--max_steps=1", "--parallel=ddp", "--reference=shard", "--tis_cap=2", nodes=([f"--out_dir={near}"], [f"--out_dir={far}"]))
    assert sorted(p.name for p in far.iterdir()) == []  # the first machine's rank 0 writes
    run(*args, f"--out_dir={near}", "--max_steps=2", "--parallel=fsdp", "--resume", "--variant=dagrpo", "--dataset=sums", "--anchors=1",
        "--reference=offload", "--old_logp=rollout", "--max_response_tokens=48", "--samples_per_step=99", ranks=2)
    steps = [r for r in rows(near / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in steps] == [1, 2] and all(0 < r["gap/max"] < 1e-2 for r in steps)
    assert all(abs(r["gap/ratio"] - 1) < 1e-3 and 1 <= r["gap/ratio_max"] < 1.01 for r in steps)
    assert steps[0]["gap/ratio_cut"] == 0 and "gap/ratio_cut" not in steps[1]
    assert [r["train/updates"] for r in steps] == [2, 2] and all(r["train/kl"] > 0 for r in steps)
    assert "displacement/mean" not in steps[1]  # it would need the trainer's own pi_old
    assert steps[1]["train/grad_norm"] > 0 and steps[1]["anchor/groups"] == steps[1]["rollout/groups_kept"] > 0
    # every response has the score that is its own, whichever rank judged it
    import judge
    mine = [r for r in rows(near / "samples.jsonl") if r["step"] == 2]
    assert len(mine) == 4 * steps[1]["rollout/groups_kept"] == 8  # of both ranks
    solution = next(r["response"] for r in mine if r["anchor"])
    for r in (r for r in mine if r["problem"] == next(m["problem"] for m in mine)):
        group = dict(problem=r["problem"], answer=r["answer"], solution=solution)
        assert r["score"] == pytest.approx(judge.rubric_score(group, r["response"], r["reward"], r["truncated"]))
    # nothing of the wrapping is in the names
    from safetensors import safe_open
    for step in (1, 2):
        with safe_open(near / f"step_00000{step}" / "model.safetensors", "pt") as f:
            assert "model.layers.0.mlp.up_proj.weight" in f.keys()


def test_a_step_does_not_depend_on_what_is_computed_together(run, tmp_path):
    """NTHR with whole groups, scored from the training forward, and with groups cut in two, scored in a pass before; groups
    that are all right or all wrong, of which nothing is computed, and (for a KL term too small to matter) everything."""
    steps = []
    for budget, kl in ((10_000, 0), (150, 1e-12)):
        out = tmp_path / str(budget)
        run("train.py", *SMALL, "--variant=nthr", "--prompts_per_step=8", "--prompts_per_update=8", "--dynamic_sampling=False",
            f"--tokens_per_micro_batch={budget}", f"--kl_coef={kl}", f"--out_dir={out}", "--eval_every=0", "--max_steps=1",
            "--samples_per_step=99")
        steps.append(next(r for r in rows(out / "metrics.jsonl") if "train/loss" in r))
        samples = rows(out / "samples.jsonl")
        assert len(samples) == 32 and len({r["problem"] for r in samples}) == 8
    few, every = steps
    assert 0 < few["train/tokens"] < every["train/tokens"] == every["rollout/response_tokens"] == few["rollout/response_tokens"]
    assert few["train/grad_norm"] > 0 and few["nthr/eta"] > 0
    for key, rel in (("train/loss", 1e-3), ("train/grad_norm", 1e-3), ("nthr/tau", 2e-2), ("nthr/s_selected", 2e-2)):
        assert every[key] == pytest.approx(few[key], rel=rel, abs=1e-6), key


def test_gradients_are_the_same_on_one_rank_and_two(run, tmp_path):
    """tests/gradients.py prints the gradient norm and checksums of one update: plain, DDP and FSDP2 agree."""
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda case: run("tests/gradients.py", *case[1:], ranks=case[0]),
                        ((0,), (2,), (2, "--micro=1000", "--parallel=fsdp")))
    want, *others = [[float(x) for x in r.stdout.split("GRADIENTS")[1].split()] for r in runs]
    assert want[0] > 0 and len(want) > 3
    for got in others:
        assert got == pytest.approx(want, rel=2e-3)


def write(path, text):
    path.write_text(text)
    return path


def test_bad_input_is_refused_before_anything_is_loaded(run, tmp_path, model_dir):
    good = '{"problem": "1 + 1", "answer": "2"}\n'
    long = json.dumps({"problem": "1 + " * 9000, "answer": "2"}) + "\n"
    cases = [
        (["--lerning_rate=1"], "'learning_rate'"),
        (["--max_steps=ten"], "max_steps must be int"),
        (["config/nowhere.py"], "config/nowhere.py"),
        ([write(tmp_path / "syntax.py", "max_steps = 1\nx = = 2\n")], "syntax.py, line 2"),
        ([write(tmp_path / "typo.py", "max_steps = 1\nmaks_steps = 2\n")], "typo.py, line 2: unknown key 'maks_steps'"),
        (["--dataset=nowhere.jsonl"], "nowhere.jsonl"),
        (["--eval_dataset=nowhere.jsonl"], "eval_dataset"),
        ([f"--dataset={write(tmp_path / 'empty.jsonl', '')}"], "has no rows"),
        ([f"--dataset={write(tmp_path / 'json.jsonl', good + '{')}"], "json.jsonl, line 2"),
        ([f"--dataset={write(tmp_path / 'list.jsonl', good + good + '[1]')}"], "list.jsonl, line 3"),
        ([f"--dataset={write(tmp_path / 'row.jsonl', good + chr(10) + json.dumps({'problem': 'x'}))}"],
         "row.jsonl, line 3: 'answer' is missing"),
        ([f"--dataset={write(tmp_path / 'type.jsonl', json.dumps({'problem': 3, 'answer': '3'}))}"], "line 1: 'problem'"),
        ([f"--dataset={write(tmp_path / 'long.jsonl', good + long)}"], "problem 2"),
        (["--model=models/nowhere"], "models/nowhere"),
        ([f"--model={tmp_path}"], "config.json"),
        (["--prompts_per_step=8", "--prompts_per_update=3"], "prompts_per_update"),
        (["--group_size=1"], "group_size"),
        (["--variant=gpro"], "variant"),
        (["--kl_coef=nan"], "kl_coef: nan is not a finite number"),
        ([f"--dataset={write(tmp_path / 'half.jsonl', good + good.replace('1 +', chr(92) + 'ud800'))}"], "half.jsonl, line 2: 'problem'"),
        (["--parallel=tp"], "parallel"),
        (["--temperature=0"], "temperature"),
        (["--dataset=mat", "--data_dir=config"], "'math'"),
        (["--dataset=math500"], "no train split"),
        (["--dataset=math", "--data_dir=nowhere"], "data_dir: nowhere"),
        (["--dataset=math", "--data_dir=config"], "math_lvl3to5_12k_split.jsonl"),
        (["--max_response_tokens=100000"], "context"),
        (["--variant=dagrpo"], "no 'solution'"),
        (["--anchors=1"], "no 'solution'"),
        (["--anchors=2"], "anchors: 2"),
        (["--anchor_mode=instead"], "replace, add"),
        (["--anchor_loss=sft"], "luffy, logp"),
        (["--delta=0"], "delta: 0.0 is not in (0, 9]"),
        (["--delta=9.5"], "delta: 9.5"),
        (["--judge=gpt-4o"], "rubric, self and an address"),
        (["--judge_retries=-1"], "judge_retries"),
        (["--variant=dagrpo", "--dataset=sums", "--judge=http://127.0.0.1:9/v1"], "judge: http://127.0.0.1:9/v1 does not answer"),
        (["--variant=dagrpo", "--demos=nowhere.jsonl"], "demos: nowhere.jsonl is not a file"),
        (["--anchors=1", f"--demos={write(tmp_path / 'demos.jsonl', json.dumps({'problem': 'x', 'solution': 'y'}))}"],
         "demos.jsonl: none of its 1 demonstrations is of a problem"),
        (["--anchors=1", f"--demos={write(tmp_path / 'no.jsonl', good)}"], "no.jsonl, line 1: 'solution' is missing"),
        (["--anchors=1", f"--demos={write(tmp_path / 'wrong.jsonl', json.dumps({'problem': '10 + 10', 'solution': 'y'}))}"],
         "demos: all 1 demonstrations are wrong"),
        (["--tp=2"], "tp: 2 does not divide the 1 ranks of a machine"),
        (["--tis_cap=2", "--old_logp=rollout"], "tis_cap: 2.0 has nothing to correct"),
        (["--old_logp=vllm"], "trainer, rollout"),
        (["--reference=cpu"], "resident, offload, shard"),
        (["--param_dtype=float16"], "param_dtype"),
        (["--gpu_memory_utilization=2"], "gpu_memory_utilization"),
        (["--compile"], "compile: needs CUDA"),
        (["--sleep_level=3"], "sleep_level: 3 is none of 0, 1, 2"),
        (["--profile", "--max_steps=2"], "profile: traces the second and third step"),
        (["--resume", f"--out_dir={tmp_path}"], "no whole checkpoint"),
        ([f"--out_dir={write(tmp_path / 'file', '')}"], "out_dir"),
    ]
    if importlib.util.find_spec("wandb") is None:
        cases.append((["--wandb_project=x"], "wandb_project"))
    pool = ThreadPoolExecutor(2)
    refused = pool.map(lambda case: run("train.py", f"--model={model_dir}", *case[0], check=False,
                                            HF_HUB_OFFLINE="1"), cases)
    for (args, words), done in zip(cases, refused):
        assert done.returncode == 2, (args, done.stdout, done.stderr)
        assert words in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)
        assert done.stderr.count("error: ") == 1 and "Loading" not in done.stderr
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    cases = [
        (["--ckpt=models/nowhere"], "models/nowhere"),
        (["--ckpt=config"], "step_*"),
        ([f"--ckpt={broken}"], "cannot read"),
        ([f"--ckpt={model_dir}", "--data=nowhere"], "known sets (arithmetic, sums, aime24"),
        ([f"--ckpt={model_dir}", f"--data={tmp_path / 'empty.jsonl'}"], "has no rows"),
        ([f"--ckpt={model_dir}", f"--data=arithmetic,{tmp_path / 'row.jsonl'}"], "row.jsonl, line 3: 'answer' is missing"),
        ([f"--ckpt={model_dir}", "--data=math"], "no test split"),
        (["--n=0"], "n: 0"),
        ([f"--ckpt={model_dir}", "--n=4"], "temperature"),
        (["--protocol=grpo"], "nthr, dagrpo"),
        (["--tp=2"], "tp: 2"),
        (["--seed=-1"], "seed"),
        (["--chkpt=x"], "'ckpt'"),
    ]
    refused = pool.map(lambda case: run("eval.py", *case[0], check=False, HF_HUB_OFFLINE="1"), cases)
    for (args, words), done in zip(cases, refused):
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)
        assert "Loading" not in done.stderr
