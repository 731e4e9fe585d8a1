"""lld.py as a user runs it; Delta, s, tau and GWHES computed again from the saved token ids, with plain transformers."""
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

ARGS = ("lld.py", "config/lld_quickstart.py", "--questions=2", "--group_size=4", "--max_rounds=4", "--learning_rate=1e-5",
        "--nthr_beta=0.3", "--temperature=0.9", "--pages=1")


def rows(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("lld")
    run(*ARGS, f"--out_dir={out}")
    return out


@pytest.fixture(scope="module")
def plain(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")


def states(model, group):
    """Per response: hidden states that predict its tokens (R, d), logits / temperature (R, V), targets (R,)."""
    for response in group["responses"]:
        ids = torch.tensor([group["prompt"] + response])
        out = model(input_ids=ids, output_hidden_states=True)
        at = slice(len(group["prompt"]) - 1, -1)
        yield out.hidden_states[-1][0, at], out.logits[0, at] / 0.9, torch.tensor(response)


def log_likelihoods(model, group):
    return [logits.log_softmax(-1).gather(1, y[:, None])[:, 0] for _, logits, y in states(model, group)]


def test_delta_is_one_update_of_a_plain_model(out, plain):
    """The GRPO and the Pos Only gradient by eq. 1, torch's own AdamW and clipping, and the likelihoods after it."""
    group, row = rows(out / "groups.jsonl")[1], rows(out / "questions.jsonl")[1]
    rewards = torch.tensor(group["rewards"])
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    start = {k: v.clone() for k, v in plain.state_dict().items()}
    for variant in ("grpo", "pos_only"):
        a = advantages if variant == "grpo" else advantages.clamp(min=0)
        before = log_likelihoods(plain, group)
        loss = -sum(x * lp.sum() for x, lp in zip(a, before)) / sum(map(len, group["responses"]))
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.0)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            change = torch.stack([(x - y).sum() for x, y in zip(log_likelihoods(plain, group), before)])
        plain.load_state_dict(start)
        got = row["delta"][variant]
        assert got["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert got["each"] == pytest.approx(change.tolist(), rel=1e-2, abs=1e-2)
        assert got["correct"] == pytest.approx(change[rewards == 1].mean().item(), rel=1e-2, abs=1e-2)
        assert got["incorrect"] == pytest.approx(change[rewards == 0].mean().item(), rel=1e-2, abs=1e-2)


def test_scores_from_the_token_ids(out, plain):
    """s by the double sum of eq. 7 with explicit alpha, then eq. 8, 9 and 5, token by token."""
    for group, row in zip(rows(out / "groups.jsonl")[1:], rows(out / "questions.jsonl")[1:]):
        with torch.no_grad():
            parts = list(states(plain, group))
        u = [torch.nn.functional.one_hot(y, logits.shape[1]) - logits.softmax(-1) for _, logits, y in parts]
        vocab = torch.cat([y for *_, y in parts]).unique()
        correct = [i for i, r in enumerate(group["rewards"]) if r == 1]
        wrong = [i for i, r in enumerate(group["rewards"]) if r == 0]

        def scores(of, columns):
            return [sum(((ui[:, columns] @ u[k][:, columns].T) * (parts[i][0] @ parts[k][0].T)).sum(1) for k in of)
                    for i, ui in enumerate(u)]

        every = torch.arange(u[0].shape[1])
        s, exact, negative = scores(correct, vocab), scores(correct, every), scores(wrong, every)
        for got, want in ((row["s"], s), (row["s_exact"], exact)):
            scale = max(x.abs().max().item() for x in want)
            assert all(torch.allclose(torch.tensor(g), w, rtol=1e-2, atol=1e-3 * scale) for g, w in zip(got, want))
        tau = 0.3 * min(s[i].mean().item() for i in correct)
        assert row["tau"] == pytest.approx(tau, rel=1e-2)
        for i in range(4):
            assert row["selected_tokens"][i] == [i in wrong and x > row["tau"] for x in row["s"][i]]
        count = sum(len(group["responses"][i]) for i in wrong)
        assert row["selected"] == pytest.approx(sum(sum(row["selected_tokens"][i]) for i in wrong) / count)
        p = len(correct) / 4
        assert row["p"] == p
        each = [(p * negative[i].sum() - (1 - p) * exact[i].sum()).item() / math.sqrt(p * (1 - p)) for i in correct]
        assert [row["gwhes_each"][i] for i in correct] == pytest.approx(each, rel=1e-2)
        assert row["gwhes"] == pytest.approx(sum(each) / len(each), rel=1e-2)


def test_summary_pictures_and_page(out):
    summary, data = json.load(open(out / "summary.json")), rows(out / "questions.jsonl")[1:]
    assert summary["questions"] == len(data) == 2
    for v in ("grpo", "pos_only", "random", "nthr"):
        assert summary["delta"][v]["mean"][0] == pytest.approx(sum(r["delta"][v]["correct"] for r in data) / 2)
    x = summary["nthr > grpo"]
    assert x["share"][0] == sum(r["delta"]["nthr"]["correct"] > r["delta"]["grpo"]["correct"] for r in data) / 2
    assert (out / "summary.md").read_text().count("| NTHR |") == 1
    for name in ("delta", "gwhes", "success"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    page = (out / "tokens.html").read_text()
    assert page.count("<h2>") == 1 and page.count('class="t') >= 10 and "http" not in page and "<script" not in page


def test_an_interrupted_run_goes_on_and_a_page_escapes(run, out, tmp_path):
    """The last question lost, its row cut off; and a response that a model may write: HTML."""
    import shutil
    cut = tmp_path / "cut"
    shutil.copytree(out, cut)
    text = (cut / "questions.jsonl").read_text()
    (cut / "questions.jsonl").write_text(text[:-200])
    groups = rows(cut / "groups.jsonl")
    groups[1]["problem"] = groups[2]["problem"] = "<script>alert('&')</script>"
    (cut / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    done = run(*ARGS, f"--out_dir={cut}", "--pages=2")
    again = rows(cut / "questions.jsonl")
    assert again[0] == rows(out / "questions.jsonl")[0] and [r["question"] for r in again[1:]] == [0, 1]
    assert again[2] == rows(out / "questions.jsonl")[2] | dict(problem="<script>alert('&')</script>")
    page = (cut / "tokens.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page
    assert "both outcomes" not in done.stdout  # nothing was sampled again


def test_bad_input(run):
    for args, words in [(["--variants=('grpo','gpro')"], "variants: 'gpro'"), (["--optimizer=adam"], "optimizer"),
                        (["--group_size=1"], "group_size"), (["--nthr_eta=q"], "nthr_eta"), (["--dataset=none"], "dataset"),
                        (["--dataset=math", "--split=test"], "no test split"), (["--questoins=3"], "'questions'"),
                        (["--model=nowhere"], "model: nowhere"), (["--learning_rate=0"], "learning_rate")]:
        done = run("lld.py", *args, check=False, HF_HUB_OFFLINE="1")
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)
