"""lld.py as a user runs it; what it finds, computed again from the token ids with transformers."""
import json
import runpy
import shutil
import sys

import rollout

import numpy as np
import pytest
import torch
from overlap import of_question
from test_advantages import algorithm_1, eq_7, most
from test_model_utils import alone, make_group
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM

from advantages import Old

ARGS = ("lld.py", "config/lld_quickstart.py", "--questions=2", "--group_size=4", "--max_rounds=4",
        "--learning_rate=1e-5", "--nthr_beta=0.3", "--temperature=0.9",
        "--variants=('grpo','pos_only','nthr')")


def rows(path):
    return [json.loads(line) for line in open(path)][1:]  # the first has the settings


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("lld")
    run(*ARGS, f"--out_dir={out}")
    return out


@pytest.fixture
def plain(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def test_delta_is_one_update_of_a_plain_model(out, plain):
    """The gradient of eq. 1, torch's own AdamW and clipping, and the likelihoods after it."""
    asked, row = rows(out / "groups.jsonl")[0], rows(out / "questions.jsonl")[0]
    group = make_group(asked["prompt"], asked["responses"])
    rewards = torch.tensor(asked["rewards"])
    advantage = (rewards - rewards.mean()) / rewards.std(correction=0)

    def log_likelihoods():
        return [Categorical(logits=x).log_prob(y) for _, x, y in alone(plain, [group], 0.9)]

    params, before, grads = [*plain.parameters()], log_likelihoods(), {}
    start = [p.detach().clone() for p in params]
    for variant in ("grpo", "pos_only", "nthr"):
        loss = 0.0
        for a, logp, spared in zip(advantage, before, row["selected_tokens"]):
            counts = 1 - torch.tensor(spared).float() * (variant == "nthr")
            if a > 0 or variant != "pos_only":
                loss -= a * (logp * counts).sum() / sum(map(len, before))
        grads[variant] = torch.autograd.grad(loss, params, retain_graph=True)
    for variant, of_params in grads.items():
        for p, weights, p.grad in zip(params, start, of_params):
            p.data.copy_(weights)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0).step()
        with torch.no_grad():
            change = [(x - y).sum() for x, y in zip(log_likelihoods(), before)]
        for key, reward in (("delta", 1), ("incorrect", 0)):
            mean = torch.stack(change)[rewards == reward].mean().item()
            assert row[f"{key}_{variant}"] == pytest.approx(mean, rel=1e-2, abs=1e-2)


def test_overlap_takes_no_token_of_positive_thr_where_tau_is_negative():
    row = dict.fromkeys(("s", "entropy", "surprisal"), [[0.1, 0.2], [0.3, 0.4]]) | dict(
        question=0, correct=[True, False], selected_tokens=[[0, 0], [0, 1]],
        thr=[[-0.5, -1.0], [0.2, -0.3]])
    assert of_question(row, 1.0)["jaccard", "nthr", "thr < 0"] == 1


def test_scores_from_the_token_ids(out, plain):
    """s by the double sum of eq. 7 with explicit alpha, then eq. 8, 9 and 5, of a plain model."""
    for asked, row in zip(rows(out / "groups.jsonl"), rows(out / "questions.jsonl")):
        group = make_group(asked["prompt"], asked["responses"], asked["rewards"])
        lengths, correct = group.lengths, group.correct
        with torch.no_grad():
            h, logits, y = map(torch.cat, zip(*alone(plain, [group], 0.9)))
        policy = Categorical(logits=logits)
        old = Old(policy.log_prob(y), policy.entropy(), h, None, plain.lm_head.weight.detach(), 0.9)
        right, share = (torch.from_numpy(np.repeat(x, lengths))
                        for x in (correct, correct / lengths))
        s, mean, exact, negative = (eq_7(old, y, source, vocab) for source, vocab in (
            (right, "response"), (share, "response"), (right, "full"), (~right, "full")))
        wanted = {"s": s, "thr": torch.where(right, mean, -mean), "entropy": old.entropy,
                  "surprisal": -old.logp}
        found = {key: torch.tensor(sum(row[key], [])) for key in wanted}
        for key, want in wanted.items():
            assert torch.allclose(found[key], want, rtol=1e-2, atol=1e-3 * want.abs().max()), key
        selected, tau = algorithm_1(found["s"], group, 0.3)
        assert sum(row["selected_tokens"], []) == selected
        assert row["tau"] == pytest.approx(tau, rel=1e-4)
        nthr, p = torch.tensor(selected), correct.mean()
        assert row["selected"] == pytest.approx(nthr[~right].double().mean().item())
        assert row["p"] == p
        overlap = of_question(row, 0.3)
        for name, by in (("entropy", "entropy"), ("logp", "surprisal")) if nthr.any() else ():
            own = most(found[by], nthr, lengths)
            want = (nthr & own).sum() / (nthr | own).sum()
            assert overlap["jaccard", "nthr", name] == pytest.approx(want.item())
        rates = (p * negative - (1 - p) * exact).split(lengths)
        gwhes = np.mean([x.sum().item() for x, is_right in zip(rates, correct) if is_right])
        assert row["gwhes"] == pytest.approx(gwhes / (p * (1 - p))**0.5, rel=1e-2)


def test_summary_pictures_and_page(out):
    summary, found = json.load(open(out / "summary.json")), rows(out / "questions.jsonl")
    mean = sum(row["delta_nthr"] for row in found) / 2
    assert summary["delta_nthr"][0] == pytest.approx(mean)
    won = [row["delta_nthr"] > row["delta_grpo"] for row in found]
    assert summary["nthr > grpo, share"][0] == sum(won) / 2
    assert f"| delta_nthr | {mean:.4f} | " in (out / "summary.md").read_text()
    assert (out / "delta.png").stat().st_size > 10_000
    page = (out / "tokens.html").read_text()
    shown = json.loads(page.split("const rows = ")[1].splitlines()[0])
    assert len(shown) == 2
    lengths = list(map(len, rows(out / "groups.jsonl")[shown[0]["question"]]["responses"]))
    for key in ("tokens", "selected_tokens", "s", "thr", "entropy", "surprisal"):
        assert list(map(len, shown[0][key])) == lengths
    assert shown[0]["prompt"].startswith("<|im_start|>") and "<|" not in page  # nothing is a tag


@pytest.mark.slow
def test_a_stopped_run_goes_on(run, out, tmp_path, monkeypatch):
    cut = shutil.copytree(out, tmp_path / "cut")
    settings, first, _ = (out / "questions.jsonl").read_text().splitlines(keepends=True)
    (cut / "questions.jsonl").write_text(settings + first)
    assert "both outcomes" not in run(*ARGS, f"--out_dir={cut}").stdout  # not sampled again
    for name in ("groups.jsonl", "questions.jsonl", "tokens.html"):
        assert (cut / name).read_text() == (out / name).read_text()
    # samples of other weights are kept aside, and all are drawn anew
    groups = (cut / "groups.jsonl").read_text()
    (cut / "groups.jsonl").write_text(groups.replace('"files": {', '"files": {"x": 0, ', 1))
    monkeypatch.setattr(rollout, "build_engine", lambda *args: sys.exit("an engine"))
    monkeypatch.setattr("sys.argv", [*ARGS, f"--out_dir={cut}"])
    with pytest.raises(SystemExit, match="an engine"):
        runpy.run_path("lld.py", run_name="__main__")
    assert (cut / "groups.jsonl.old_1").exists()
