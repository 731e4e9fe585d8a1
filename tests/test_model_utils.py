"""Packing, log-probabilities and checkpoints against plain transformers forwards of the real model."""
import gzip
import json
import math
import os

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import model_utils
from model_utils import (HeadLogprob, Policy, balance, check_model, common_prefix, estimate_memory, load_policy, make_optimizer,
                         optimizer_step, pack, pack_all, packed_attention, plan_micro_batches, prefetch, splits_groups)
from runs import check_checkpoint, checkpoints, newest_checkpoint, open_log, open_run, plot_curves, prune, write_profile

CPU = torch.device("cpu")


def random_groups(vocab, sizes, seed=0):
    """sizes: [(prompt length, [response lengths]), ...]"""
    rng = np.random.default_rng(seed)
    return [dict(prompt=rng.integers(3, vocab, p).astype(np.int32),
                 responses=[rng.integers(3, vocab, r).astype(np.int32) for r in rs]) for p, rs in sizes]


# one-token prompts and responses, a group cut between micro-batches, groups that share one
SIZES = [(5, [3, 1, 7, 2]), (1, [1, 1, 2, 1]), (12, [4, 9, 4, 1]), (3, [20, 2, 1, 6])]


@pytest.fixture(scope="module")
def policy(model_dir):
    return load_policy(model_dir, torch.float32, CPU)


def first_layers(policy, n=6):
    """A policy cut down to its first layers, where what is tested does not depend on their number."""
    policy.model.model.layers = policy.model.model.layers[:n]
    return policy


@pytest.fixture(scope="module")
def short(model_dir):
    return first_layers(load_policy(model_dir, torch.float32, CPU))


@pytest.fixture(scope="module")
def plain(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")


def one_by_one(model, groups, temperature):
    """Log-probability and entropy of every response token from a forward pass of prompt + response alone."""
    logp, entropy = [], []
    for g in groups:
        for r in g["responses"]:
            ids = torch.from_numpy(np.concatenate([g["prompt"], r]).astype(np.int64))
            d = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
            for k in range(len(r)):
                at = d[len(g["prompt"]) + k - 1]
                logp.append(at[int(r[k])])
                entropy.append(-(at.exp() * at).sum())
    return torch.stack(logp), torch.stack(entropy)


@pytest.fixture(scope="module")
def text_groups(model_dir):
    """Groups of real text: on random tokens float32 itself is off by more than 1e-4 here and there."""
    tok = AutoTokenizer.from_pretrained(model_dir)
    texts = [("<|im_start|>user\nWhat is 23 + 45?", ["23 + 45 = 68.<|im_end|>", "68", "I think the answer is 70.<|im_end|>", "1"]),
             ("<|im_start|>user\nHi", ["!", "<|im_end|>", " there<|im_end|>", ", how are you?"]),
             ("<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
              ["Blue.<|im_end|>", "A colour is red, or green, or something else.<|im_end|>", "Red", "I cannot."])]
    return [dict(prompt=np.array(tok(p)["input_ids"], dtype=np.int32),
                 responses=[np.array(tok(r)["input_ids"], dtype=np.int32) for r in rs]) for p, rs in texts]


@pytest.fixture(scope="module")
def alone(plain, text_groups):
    with torch.no_grad():
        return one_by_one(plain, text_groups, 0.7)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [12, 40, 70, 10_000])
def test_packed_logprobs_are_those_of_single_sequences(policy, alone, text_groups, budget, share):
    groups = text_groups
    assert groups[0]["responses"][0][-1] == 2 == policy.model.config.pad_token_id  # end of sequence = pad: it counts
    batches = pack_all(groups, plan_micro_batches(groups, budget, share), CPU, share_prompts=share)
    assert any(b.prefix for b in batches) == (share and budget > 40)
    with torch.no_grad():
        got = [policy(b, 0.7) for b in batches]
    want_logp, want_entropy = alone
    assert sum(b.span.stop - b.span.start for b in batches) == len(want_logp) == sum(len(r) for g in groups for r in g["responses"])
    assert [b.span.start for b in batches[1:]] == [b.span.stop for b in batches[:-1]]
    assert (torch.cat([g[0] for g in got]) - want_logp).abs().max() < 1e-4
    assert (torch.cat([g[1] for g in got]) - want_entropy).abs().max() < 1e-4


def test_plan_keeps_order_and_budget():
    groups = random_groups(100, SIZES + [(50, [60, 1])])
    for budget in (1, 15, 30, 64, 1000):
        for share in (True, False):
            plan = plan_micro_batches(groups, budget, share)
            order = [(g, r) for batch in plan for g, rs in batch for r in rs]
            assert order == [(g, r) for g in range(5) for r in range(len(groups[g]["responses"]))]
            for batch in plan:
                packed = pack(groups, batch, 0, CPU, share_prompts=share).input_ids.numel()
                assert packed <= budget or sum(len(rs) for _, rs in batch) == 1
            for g, group in enumerate(groups):  # no group is cut that a micro-batch could hold
                whole = [(g, range(len(group["responses"])))] if share else [(g, [r]) for r in range(len(group["responses"]))]
                if pack(groups, whole, 0, CPU, share_prompts=share).input_ids.numel() <= budget:
                    assert sum(g in [g for g, _ in batch] for batch in plan) == 1


def test_plan_counts_what_prompts_have_in_common_once():
    head = np.arange(50)
    groups = [dict(prompt=np.append(head, g), responses=[np.arange(4), np.arange(4)]) for g in range(4)]
    sizes = [pack(groups, batch, 0, CPU).input_ids.numel() for batch in plan_micro_batches(groups, 50 + 2 * 9)]
    assert sizes == [50 + 2 * 9] * 2
    assert not splits_groups(plan_micro_batches(groups, 50 + 9 + 8)) and splits_groups(plan_micro_batches(groups, 50 + 8))


def test_worked_example_of_the_layout():
    groups = [dict(prompt=np.array([7, 8, 9]), responses=[np.array([1, 2]), np.array([3])]),
              dict(prompt=np.array([7, 8, 6]), responses=[np.array([4])])]
    b = pack(groups, [(0, [0, 1]), (1, [0])], 0, CPU)
    assert b.input_ids.tolist() == [[7, 8, 9, 1, 2, 3, 6, 4]] and b.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 2, 3]]
    assert b.predicts.tolist() == [2, 3, 2, 6] and b.targets.tolist() == [1, 2, 3, 4]
    assert b.cu_q.tolist() == [0, 2, 3, 5, 6, 7, 8] and b.cu_k.tolist() == [0, 2, 5, 10, 14, 17, 21]
    assert b.kv_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 6, 0, 1, 6, 7]


def test_common_prefix():
    p = [np.array(x) for x in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 5, 4])]
    assert common_prefix(p) == 2 and common_prefix(p[:2]) == 2 and common_prefix(p[:1]) == 0  # one token stays one's own
    assert common_prefix([np.array([1]), np.array([1, 2])]) == 0 and common_prefix([np.array([1, 2]), np.array([2, 2])]) == 0


@pytest.mark.parametrize("sdpa_tokens", [0, 40, 256])  # a tree a call, a few, all
@pytest.mark.parametrize("prefix", [0, 5])
def test_varlen_layout_is_the_same_attention(prefix, sdpa_tokens, monkeypatch):
    """What flash-attn is given (segments, gathered keys, causal aligned to the last key) equals the tree masks."""
    monkeypatch.setattr(model_utils, "SDPA_TOKENS", sdpa_tokens)
    groups = random_groups(100, SIZES)
    for g in groups:
        g["prompt"] = np.concatenate([np.arange(prefix, dtype=np.int32), g["prompt"]])
    b = pack(groups, [(g, list(range(4))) for g in range(4)], 0, CPU)
    b.masks = model_utils.tree_masks(b)
    assert b.prefix == prefix and len(b.spans) - bool(prefix) == {0: 4, 40: 2, 256: 1}[sdpa_tokens]
    g = torch.Generator().manual_seed(0)
    t = b.input_ids.numel()
    q = torch.randn(1, 6, t, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(1, 2, t, 8, generator=g, dtype=torch.float64) for _ in "kv")
    got = packed_attention(None, q, k, v, None, scaling=0.3, layout=b)[0][0]  # (T, H, D)
    k3, v3 = (x[0].repeat_interleave(3, 0)[:, b.kv_index] for x in (k, v))    # (H, K, D)
    for s in range(len(b.cu_q) - 1):
        q0, q1, k0, k1 = int(b.cu_q[s]), int(b.cu_q[s + 1]), int(b.cu_k[s]), int(b.cu_k[s + 1])
        scores = 0.3 * q[0, :, q0:q1] @ k3[:, k0:k1].transpose(1, 2)
        i, j = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)[None]
        scores = scores.masked_fill(j > i + (k1 - k0) - (q1 - q0), -torch.inf)
        want = scores.softmax(-1) @ v3[:, k0:k1]
        assert torch.allclose(got[q0:q1].transpose(0, 1), want, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_head_gradients_are_autograds(chunk):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(23, 11, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(37, 11, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randint(37, (23,), generator=g)
    up = torch.randn(23, generator=g, dtype=torch.float64)
    got, entropy, lse = HeadLogprob.apply(h, w, y, 0.6, chunk, torch.float64)
    got_grads = torch.autograd.grad((got * up).sum(), (h, w))
    d = (h @ w.T / 0.6).log_softmax(-1)
    want = d[torch.arange(23), y]
    assert torch.allclose(got, want, rtol=1e-12) and torch.allclose(entropy, -(d.exp() * d).sum(-1), rtol=1e-12)
    assert torch.allclose(lse, (h @ w.T / 0.6).logsumexp(-1), rtol=1e-12)
    for a, b in zip(got_grads, torch.autograd.grad((want * up).sum(), (h, w))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_gradient_does_not_depend_on_the_cut(short):
    """The real model's gradient of a weighted sum: in one micro-batch, in many, with unshared prompts, with a filler."""
    groups = random_groups(49152, SIZES)
    for g in groups:
        g["prompt"] = np.concatenate([np.arange(10, 14, dtype=np.int32), g["prompt"]])
    weights = torch.randn(65, generator=torch.Generator().manual_seed(0))
    grads = []
    for budget, share, at_least in ((10_000, True, 0), (12, True, 0), (40, False, 9)):
        short.zero_grad()
        for b in pack_all(groups, plan_micro_batches(groups, budget, share), CPU, at_least, share):
            n = b.span.stop - b.span.start
            (short(b, 1.0)[0][:n] * weights[b.span]).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in short.parameters()]))
    short.zero_grad()
    for other in grads[1:]:
        assert (other - grads[0]).norm() < 1e-3 * grads[0].norm()


def test_gradient_is_the_same_bit_for_bit_every_time(short):
    """Resumed runs repeat on a CPU: nothing in the backward pass adds up in an order that threads decide. The prompt's
    last state predicts eight tokens, half of them in each of two threads' shares."""
    groups = random_groups(49152, [(9, [12] * 8)])
    batch, = pack_all(groups, plan_micro_batches(groups, 10_000), CPU)
    grads = []
    for _ in range(4):
        short.zero_grad()
        short(batch, 1.0)[0].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in short.parameters()]))
    short.zero_grad()
    assert all(torch.equal(other, grads[0]) for other in grads[1:])


def test_balance_deals_every_group_once():
    groups = random_groups(100, [(3, [i + 1] * 4) for i in range(17)])
    shares = balance(groups, 4)
    assert sorted(sum(shares, [])) == list(range(17)) and all(s == sorted(s) for s in shares)
    loads = [sum(3 + 4 * (i + 1) for i in s) for s in shares]
    assert max(loads) - min(loads) <= 3 + 4 * 17
    assert balance(groups[:2], 4).count([]) == 2  # more ranks than groups: idle ranks run fillers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_and_checkpointing_give_the_same_gradient(short, model_dir, checkpointing):
    """torch.compile's tracing of the layers (backend aot_eager: no C++ compiler needed), with and without activation
    checkpointing: the numbers of the plain policy, for micro-batches of several sizes."""
    groups = random_groups(49152, SIZES)
    plan = plan_micro_batches(groups, 40)
    assert len({sum(len(rs) for _, rs in trees) for trees in plan}) > 1
    off, torch._dynamo.config.disable = torch._dynamo.config.disable, False  # an engine in this process turns it off
    try:
        grads = []
        for p in (short, first_layers(load_policy(model_dir, torch.float32, CPU, checkpointing, compile="aot_eager"))):
            p.train()
            for b in prefetch(pack_all(groups, plan), CPU):
                p(b, 1.0)[0].sum().backward()
            grads.append(torch.cat([x.grad.flatten() for x in p.parameters()]))
            p.zero_grad()
    finally:
        torch._dynamo.config.disable = off
    short.eval()
    assert (grads[1] - grads[0]).norm() < 1e-4 * grads[0].norm()


def test_parameters_and_products_in_bfloat16(policy, model_dir, text_groups, monkeypatch):
    low = load_policy(model_dir, torch.bfloat16, CPU, param_dtype=torch.bfloat16)
    batch, = pack_all(text_groups, plan_micro_batches(text_groups, 10_000))
    logp, _ = low(batch, 1.0)
    want, _ = policy(batch, 1.0)
    assert logp.dtype == torch.float32 and 1e-6 < (logp - want).abs().mean() < 0.1
    seen = []  # under autocast too, attention is computed in bfloat16, not in the rotary embeddings' float32
    with monkeypatch.context() as m:
        m.setattr(model_utils.F, "scaled_dot_product_attention",
                  lambda q, k, v, sdpa=model_utils.F.scaled_dot_product_attention, **kw: (seen.extend(x.dtype for x in (q, k, v)), sdpa(q, k, v, **kw))[1])
        autocast, _ = Policy(policy.model, torch.bfloat16)(batch, 1.0)
    assert set(seen) == {torch.bfloat16} and 1e-6 < (autocast - want).abs().mean() < 0.1
    optimizer = make_optimizer(low, "adamw", 1e-2, (0.9, 0.999), 0.0)
    logp.mean().backward()
    before = logp.mean().item()
    assert torch.isfinite(optimizer_step(low, optimizer, 1.0))
    assert all(p.dtype == torch.bfloat16 for p in low.parameters())
    assert all(s["exp_avg"].dtype == torch.bfloat16 for s in optimizer.state.values())
    assert abs(low(batch, 1.0)[0].mean().item() - before) > 0.1


def test_prefetch_keeps_order():
    class Batch:
        def __init__(self, name):
            self.name, self.there = name, False

        def to(self, device):
            self.there = True
            return self
    batches = [Batch(i) for i in range(4)]
    for i, b in enumerate(prefetch(batches, "cuda")):
        assert b.name == i and [x.there for x in batches] == [x <= i + 1 for x in range(4)]  # the next one is on its way
    assert i == 3 and list(prefetch([], "cuda")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_activations_is_what_autograd_keeps(model_dir, dtype):
    """estimate_memory's bytes a token against the tensors that a forward pass saves for the backward pass."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
    for config in (AutoConfig.from_pretrained(model_dir, num_hidden_layers=4),
                   Qwen2Config(hidden_size=384, intermediate_size=2048, num_attention_heads=6, num_key_value_heads=2,
                               num_hidden_layers=4, vocab_size=1000, tie_word_embeddings=True)):
        model = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="packed").float(), dtype)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        totals = []
        for n in (300, 600):
            batch = pack([dict(prompt=np.array([3]), responses=[np.arange(n) % 100])], [(0, [0])], 0)
            kept = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x,
                                                          lambda x: x):
                out = model(batch, 1.0)
            totals.append(sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights))
            del out
        got = estimate_memory(config, compute_bytes=dtype.itemsize, tokens=2**20)["activations"] * 2**10  # bytes a token
        assert 0.85 < got / ((totals[1] - totals[0]) / 300) < 1.15
        assert estimate_memory(config)["weights"] * 2**30 == 4 * sum(p.numel() for p in model.parameters())


def fake_checkpoint(out_dir, step):
    from safetensors.torch import save_file
    path = out_dir / f"step_{step:06d}"
    path.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, path / "model.safetensors")
    torch.save({0: {"exp_avg": torch.ones(3)}}, path / "optimizer.pt")
    (path / "config.json").write_text("{}")
    files = {n: os.path.getsize(path / n) for n in ("model.safetensors", "optimizer.pt", "config.json")}
    (path / "trainer_state.json").write_text(json.dumps(dict(step=step, position=9, files=files)))
    return path


def test_broken_checkpoints_are_passed_over(tmp_path, capsys):
    paths = [fake_checkpoint(tmp_path, s) for s in (1, 2, 3, 4, 5, 6)]
    (tmp_path / "step_000007.tmp").mkdir()  # a write that never ended is not a checkpoint at all
    assert newest_checkpoint(str(tmp_path)) == (str(paths[5]), check_checkpoint(paths[5]))
    with open(paths[5] / "model.safetensors", "r+b") as f:
        f.truncate(40)
    (paths[4] / "optimizer.pt").unlink()
    (paths[3] / "trainer_state.json").write_text('{"step": ')
    (paths[2] / "config.json").write_text("xx")  # as long as it was, but not JSON
    data = bytearray((paths[1] / "optimizer.pt").read_bytes())
    data[data.index(b"\x00\x00\x80\x3f")] ^= 255  # a bit of the moment 1.0: as long as it was, but not what was saved
    (paths[1] / "optimizer.pt").write_bytes(data)
    found, state = newest_checkpoint(str(tmp_path))
    assert found == str(paths[0]) and state["step"] == 1
    assert capsys.readouterr().out.count("warning: ") == 5
    (paths[0] / "model.safetensors").unlink()
    assert newest_checkpoint(str(tmp_path)) is None and len(checkpoints(str(tmp_path))) == 6


def test_a_profile_is_written_and_printed(tmp_path, capsys):
    profiler = torch.profiler.profile(acc_events=True)
    profiler.start()
    torch.ones(300, 300) @ torch.ones(300, 300)
    write_profile(profiler, str(tmp_path))
    assert "aten::mm" in capsys.readouterr().out and "aten::mm" in (tmp_path / "profile.txt").read_text()
    with gzip.open(tmp_path / "trace.json.gz") as f:
        assert any(e.get("name") == "aten::mm" for e in json.load(f)["traceEvents"])


def test_open_run_loses_nothing(tmp_path):
    out = tmp_path / "run[1]"
    open_run(str(out), dict(lr=1))
    lines = [json.dumps(r) + "\n" for r in ({"step": 0, "eval/accuracy": 0.1}, {"step": 1, "x": 1}, {"step": 2, "x": 2},
                                            {"step": 2, "eval/accuracy": 0.2}, {"step": 3, "x": 3})]
    (out / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "x"')
    (out / "notes.txt").write_text("mine")
    open_run(str(out), dict(lr=2), resumed_step=2)  # the evaluation of step 2 is done again, as in a run that was not interrupted
    assert (out / "metrics.jsonl").read_text() == "".join(lines[:3])
    assert (out / "old_1" / "metrics.jsonl").read_text() == "".join(lines) + '{"step": 4, "x"'
    assert [json.loads((d / "run_config.json").read_text()) for d in (out, out / "old_1")] == [dict(lr=2), dict(lr=1)]
    fake_checkpoint(out, 2)
    (out / "eval").mkdir()
    open_run(str(out), dict(lr=2))
    assert sorted(os.listdir(out)) == ["notes.txt", "old_1", "old_2", "run_config.json"]
    assert sorted(os.listdir(out / "old_2")) == ["eval", "metrics.jsonl", "run_config.json", "step_000002"]


def test_rows_and_curves_without_a_figure(tmp_path):
    """nan is null in metrics.jsonl, which stays JSON, and a gap in the curves."""
    log = open_log(str(tmp_path), {}, 0)
    for step, entropy in enumerate((1.0, math.nan, math.inf)):
        log({"step": step, "train/entropy": entropy, "train/tokens": 3})
    lines = [json.loads(line, parse_constant=lambda x: pytest.fail(x)) for line in open(tmp_path / "metrics.jsonl")]
    assert [r["train/entropy"] for r in lines] == [1.0, None, None] and lines[1]["train/tokens"] == 3
    plot_curves(str(tmp_path))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_pruning_keeps_a_whole_checkpoint(tmp_path):
    """Steps 10 and 20, of which 20 is broken; resumed from 10, step 15 is saved: it stays, whatever 20 is."""
    paths = {step: fake_checkpoint(tmp_path, step) for step in (5, 10, 15, 20)}
    (paths[20] / "optimizer.pt").unlink()
    prune(str(tmp_path), str(paths[15]), 1)
    assert newest_checkpoint(str(tmp_path))[0] == str(paths[15]) and len(checkpoints(str(tmp_path))) == 2


@pytest.mark.parametrize("kind, changed, what", [
    ("granite", dict(logits_scaling=8.0), "logits_scaling"), ("cohere", {}, "logit_scale"), ("phi", {}, "a bias of the head"),
    ("gemma2", {}, "final_logit_softcapping"), ("mistral", dict(sliding_window=8), "sliding_window"),
    ("llama", {}, None), ("qwen2", {}, None), ("mistral", dict(sliding_window=None), None)])
def test_models_whose_head_does_more_are_refused(kind, changed, what, capsys):
    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changed)
    if what is None:
        return check_model("x", config)
    with pytest.raises(SystemExit) as e:
        check_model("x", config)
    assert e.value.code == 2 and f"models with {what}" in capsys.readouterr().err
