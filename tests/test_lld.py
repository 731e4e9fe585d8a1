"""lld.py as a user runs it; what it finds, computed again from the token ids with transformers."""
import json
import shutil

import pytest
import torch
from overlap import of_question
from transformers import AutoModelForCausalLM

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


def ask(model, group):
    """Of each response: states that predict it (R, d), log-probabilities (R, V), tokens (R,)."""
    for response in group["responses"]:
        ids = torch.tensor([group["prompt"] + response])
        out = model(input_ids=ids, output_hidden_states=True)
        at = slice(len(group["prompt"]) - 1, -1)
        logp = (out.logits[0, at] / 0.9).log_softmax(-1)
        yield out.hidden_states[-1][0, at], logp, torch.tensor(response)


def test_delta_is_one_update_of_a_plain_model(out, plain):
    """The gradient of eq. 1, torch's own AdamW and clipping, and the likelihoods after it."""
    group, row = rows(out / "groups.jsonl")[0], rows(out / "questions.jsonl")[0]
    rewards = torch.tensor(group["rewards"])
    advantage = (rewards - rewards.mean()) / rewards.std(correction=0)

    def log_likelihoods():
        return [logp[range(len(y)), y] for _, logp, y in ask(plain, group)]

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


def test_scores_from_the_token_ids(out, plain):
    """s by the double sum of eq. 7 with explicit alpha, then eq. 8, 9 and 5, token by token."""
    for group, row in zip(rows(out / "groups.jsonl"), rows(out / "questions.jsonl")):
        with torch.no_grad():
            h, logp, tokens = zip(*ask(plain, group))
        u = [torch.nn.functional.one_hot(y, x.shape[1]) - x.exp() for x, y in zip(logp, tokens)]
        right, wrong = ([i for i in range(4) if group["rewards"][i] == r] for r in (1, 0))

        def scores(source, columns=slice(None)):
            return [sum(((u[i][:, columns] @ u[k][:, columns].T) * (h[i] @ h[k].T)).sum(1)
                        for k in source) for i in range(4)]

        s, exact, negative = scores(right, torch.cat(tokens).unique()), scores(right), scores(wrong)
        got, want = torch.tensor(sum(row["s"], [])), torch.cat(s)
        assert torch.allclose(got, want, rtol=1e-2, atol=1e-3 * want.abs().max())
        assert row["tau"] == pytest.approx(0.3 * min(s[i].mean().item() for i in right), rel=1e-2)
        thr = sum(torch.cat(scores([k], torch.cat(tokens).unique())) / len(tokens[k])
                  for k in right)
        sign = torch.cat([torch.full((len(tokens[i]),), 1 if i in right else -1)
                          for i in range(4)])
        got = torch.tensor(sum(row["thr"], []))
        assert torch.allclose(got, sign * thr, rtol=1e-2, atol=1e-3 * thr.abs().max())
        entropy = -torch.cat([(x.exp() * x).sum(1) for x in logp])
        assert torch.allclose(torch.tensor(sum(row["entropy"], [])), entropy, atol=1e-3)
        selected = [[i in wrong and x > row["tau"] for x in row["s"][i]] for i in range(4)]
        assert row["selected_tokens"] == selected
        count, p = sum(len(tokens[i]) for i in wrong), len(right) / 4
        assert row["selected"] == pytest.approx(sum(map(sum, selected)) / count) and row["p"] == p
        picks = [[t for i in range(4) for t in sorted(
            range(len(tokens[i])), key=lambda t: -row[by][i][t])[:sum(selected[i])]
            for t in [(i, t)]] for by in ("entropy", "surprisal")]
        nthr = {(i, t) for i in range(4) for t in range(len(tokens[i])) if selected[i][t]}
        overlap = of_question(row, 0.3)
        for name, own in zip(("entropy", "logp"), map(set, picks)):
            if nthr:
                want = len(nthr & own) / len(nthr | own)
                assert overlap["jaccard", "nthr", name] == pytest.approx(want)
        each = [p * negative[i].sum() - (1 - p) * exact[i].sum() for i in right]
        mean = torch.stack(each).mean().item() / (p * (1 - p))**0.5
        assert row["gwhes"] == pytest.approx(mean, rel=1e-2)


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
def test_a_stopped_run_goes_on(run, out, tmp_path):
    cut = shutil.copytree(out, tmp_path / "cut")
    settings, first, _ = (out / "questions.jsonl").read_text().splitlines(keepends=True)
    (cut / "questions.jsonl").write_text(settings + first)
    assert "both outcomes" not in run(*ARGS, f"--out_dir={cut}").stdout  # not sampled again
    for name in ("groups.jsonl", "questions.jsonl", "tokens.html"):
        assert (cut / name).read_text() == (out / name).read_text()
