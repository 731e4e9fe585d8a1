"""Packing, log-probabilities and the optimizer against plain forwards of the real model."""

import numpy as np
import pytest
import torch
from torch.distributions import Categorical
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import model_utils
import runs
from data import Group
from model_utils import NOTHING, HeadLogprob, Policy, load_policy, pack, pack_units

# one-token prompts and responses, a group cut between micro-batches, groups that share one
SIZES = [(5, [3, 1, 7, 2]), (1, [1, 1, 2, 1]), (12, [4, 9, 4, 1]), (3, [20, 2, 1, 6])]


def make_group(prompt, responses, reward=None, **fields):
    """A Group of token ids; what a test does not name is made up."""
    size = len(responses)
    return Group(**dict(
        row={}, prompt=np.array(prompt), responses=[np.array(r) for r in responses],
        rollout_logp=[-np.array(r, dtype=np.float32) for r in responses], texts=[""] * size,
        reward=np.array(np.arange(size) % 2 if reward is None else reward, np.float32)) | fields)


def random_groups(vocab, sizes, prefix=0):
    """Groups of random tokens behind a common prefix. sizes: [(prompt's tokens, [responses'])]."""
    draw, common = np.random.default_rng(0).integers, range(10, 10 + prefix)
    return [make_group([*common, *draw(3, vocab, p)], [draw(3, vocab, r) for r in rs])
            for p, rs in sizes]


def batches_of(groups, budget=10_000):
    return [b for unit in pack_units(groups, budget) for b in unit.batches]


def gradient(policy, batches):
    logp = torch.cat([policy(b, 1.0)[0] for b in batches])
    loss = (logp * torch.linspace(-1, 2, len(logp))).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


@pytest.fixture(scope="module")
def short(small):
    return load_policy(small, torch.float32, "cpu")


def alone(model, groups, temperature):
    """From a pass of each prompt + response: states (R, d), logits (R, V), the tokens (R,)."""
    for g, r in ((g, r) for g in groups for r in g.responses):
        ids = torch.from_numpy(np.concatenate([g.prompt, r]).astype(np.int64))
        out, at = model(input_ids=ids[None], output_hidden_states=True), len(g.prompt) - 1
        yield out.hidden_states[-1][0, at:-1], out.logits[0, at:-1] / temperature, ids[at + 1:]


@torch.no_grad()
def one_by_one(*args):
    """(logp, entropy, lse) of every response token, see `alone`."""
    _, logits, y = map(torch.cat, zip(*alone(*args)))
    policy = Categorical(logits=logits)
    return policy.log_prob(y), policy.entropy(), logits.logsumexp(-1)


def test_packed_logprobs_are_those_of_single_sequences(small, short):
    texts = {"<|im_start|>user\nWhat is 23 + 45?": ("23 + 45 = 68.<|im_end|>", "68", "It is 70."),
             "<|im_start|>user\nHi": ("!", "<|im_end|>", " there<|im_end|>", ", how are you?"),
             "<|im_start|>user\nA colour.<|im_end|>\n": ("Blue.<|im_end|>", "One is red, or blue.")}
    encode = AutoTokenizer.from_pretrained(small).encode
    groups = [make_group(encode(p), [encode(r) for r in rs]) for p, rs in texts.items()]
    plain = AutoModelForCausalLM.from_pretrained(small, attn_implementation="eager").float()
    logp, entropy, lse = one_by_one(plain, groups, 0.7)
    assert groups[0].responses[0][-1] == 2 == plain.config.pad_token_id  # the end, = pad, counts
    for budget in (12, 40, 70, 10_000):
        batches = batches_of(groups, budget)
        assert any(b.prefix for b in batches) == (budget > 12)
        with torch.no_grad():
            *got, h, got_lse = (torch.cat(x) for x in zip(*(short(b, 0.7) for b in batches)))
        y = torch.cat([b.targets for b in batches])
        by_head = (h * plain.lm_head.weight[y]).sum(-1) / 0.7 - lse
        for x, want in zip((*got, got_lse, by_head), (logp, entropy, lse, logp)):
            assert x.shape == want.shape and (x - want).abs().max() < 1e-4


@pytest.mark.parametrize("budget", [1, 15, 30, 64, 1000])
def test_units_keep_order_and_budget(budget):
    groups = random_groups(100, [*SIZES, (50, [60, 1])])
    for i, g in enumerate(groups):
        g.weight, g.is_anchor = i / 4 + g.reward, g.reward == i % 2
    units = pack_units(groups, budget)
    batches = [b for unit in units for b in unit.batches]
    assert [id(g) for unit in units for g in unit.groups] == [id(g) for g in groups]
    for unit in units:
        size = max(len(g.prompt) + sum(g.lengths) for g in unit.groups)
        assert unit.early == (len(unit.batches) > 1) == (size > budget)  # cut only if it must be
    assert all(b.input_ids.numel() <= budget or len(b.right) == 1 for b in batches)
    for name in ("targets", "rollout_logp", "weight", "is_anchor", "right"):
        assert torch.cat([getattr(b, name) for b in batches]).equal(getattr(pack(groups), name))
    counts = [n for b in batches for n in b.response.bincount()]
    assert counts == [n for g in groups for n in g.lengths]


def test_layout_and_common_prefix_by_hand():
    anchor = dict(reward=[1, 1], is_anchor=np.array([True, False]), weight=[0.5, 0.25])
    b = pack([make_group([7, 8, 9], [[1, 2], [3]], **anchor), make_group([7, 8, 6], [[4]])])
    assert b.rollout_logp.tolist() == [-1, -2, -3, -4] and b.weight.tolist() == [0.5, 0.5, 0.25, 0]
    assert b.is_anchor.tolist() == [1, 1, 0, 0] and b.right.tolist() == [0, 1, 0]
    assert b.input_ids.tolist() == [[7, 8, 9, 1, 2, 3, 6, 4]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 2, 3]]
    assert b.predicts.tolist() == [2, 3, 2, 6] and b.targets.tolist() == [1, 2, 3, 4]
    assert b.response.tolist() == [0, 0, 1, 2] and (b.max_q, b.max_k) == (2, 5)
    assert b.cu_q.tolist() == [0, 2, 3, 5, 6, 7, 8] and b.cu_k.tolist() == [0, 2, 5, 10, 14, 17, 21]
    assert b.kv_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 6, 0, 1, 6, 7]
    groups = random_groups(100, [(1, [4, 4])] * 4, prefix=50)  # which counts once
    assert [b.input_ids.numel() for b in batches_of(groups, 50 + 2 * 9)] == [50 + 2 * 9] * 2
    assert [len(batches_of(groups, budget)) for budget in (50 + 9, 50 + 8)] == [4, 8]
    p = [np.array(x) for x in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 5, 4], [1], [2, 2])]
    assert [model_utils.common_prefix(x) for x in (p[:3], p[:2])] == [2, 2]  # one stays one's own
    assert [model_utils.common_prefix(x) for x in (p[:1], p[2:4], p[1:5:3], [])] == [0] * 4


@pytest.mark.parametrize("sdpa_tokens, calls", [(0, 4), (40, 2), (256, 1)])
@pytest.mark.parametrize("prefix", [0, 5])
def test_varlen_layout_is_the_same_attention(prefix, sdpa_tokens, calls, monkeypatch):
    """What varlen_attn is given (gathered keys, causal to the last one) equals the tree masks."""
    monkeypatch.setattr(model_utils, "SDPA_TOKENS", sdpa_tokens)
    b = pack(random_groups(100, SIZES, prefix))
    assert b.prefix == prefix and len(b.spans) - bool(prefix) == calls
    g, t = torch.Generator().manual_seed(0), b.input_ids.numel()
    q, k, v = (torch.randn(1, h, t, 8, generator=g, dtype=torch.float64) for h in (6, 2, 2))
    got = model_utils.packed_attention(None, q, k, v, None, 0.3, b, model_utils.tree_masks(b))[0][0]
    k, v = (x[0].repeat_interleave(3, 0)[:, b.kv_index] for x in (k, v))  # (H, K, D)
    for q0, q1, k0, k1 in zip(b.cu_q, b.cu_q[1:], b.cu_k, b.cu_k[1:]):
        scores = 0.3 * q[0, :, q0:q1] @ k[:, k0:k1].transpose(1, 2)
        future = torch.ones(q1 - q0, k1 - k0).triu(int(k1 - k0 - (q1 - q0)) + 1).bool()
        want = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, k0:k1]
        assert torch.allclose(got[q0:q1].transpose(0, 1), want, atol=1e-12)  # (H, tokens, D)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_head_gradients_are_autograds(chunk):
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 11, generator=g, dtype=torch.float64).requires_grad_() for n in (23, 37))
    y, up = torch.randint(37, (23,), generator=g), torch.randn(23, generator=g, dtype=torch.float64)
    logp, entropy, lse = HeadLogprob.apply(h, w, y, 0.6, chunk)
    d = (h @ w.T / 0.6).log_softmax(-1)
    want = d[torch.arange(23), y], -(d.exp() * d).sum(-1), (h @ w.T / 0.6).logsumexp(-1)
    grads = [torch.autograd.grad((x * up).sum(), (h, w)) for x in (logp, want[0])]
    for a, b in zip((logp, entropy, lse, *grads[0]), (*want, *grads[1])):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_gradient_is_the_same_every_time_and_however_it_is_computed(short, small):
    """Bit for bit every time, so that resumed runs repeat on a CPU: the prompt's last state
    predicts eight tokens, half in each of two threads' shares. Fillers add nothing."""
    batches = batches_of(random_groups(49152, [(9, [12] * 8)]))
    first, *others = (gradient(short, batches) for _ in range(3))
    assert all(torch.equal(other, first) for other in others)
    groups, filler = random_groups(49152, SIZES, prefix=4), pack([NOTHING])
    cut, want = batches_of(groups, 20), gradient(short, batches_of(groups))
    again = load_policy(small, torch.float32, "cpu", activation_checkpointing=True).train()
    for policy, batches in ((short, cut), (short, [filler, *cut, filler]), (again, cut)):
        assert len(batches) > 4 and (gradient(policy, batches) - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("count, cut", [(0, 0), (1, 2), (2, 2), (7, 2)])
def test_all_ranks_run_as_many_passes(count, cut, moved, on_ranks):
    groups = random_groups(100, [(5, [30, 9]), (3, [4]), (9, [8, 8]), (3, [2, 30]), (3, [1, 2, 40]),
                                 (3, [5]), (3, [7, 1])])[:count]
    ranks, early, passes = [], [], []
    for units in on_ranks(*[lambda: model_utils.pack_update(groups, 30, moved)] * 3):
        ranks.append([g for unit in units for g in unit.groups])
        early.append(sum(len(unit.batches) for unit in units if unit.early))
        passes.append(sum(len(unit.batches) for unit in units))
    assert len(set(early)) == len(set(passes)) == 1 <= passes[0]  # a filler, so that ranks step
    assert early[0] == (passes[0] if moved else cut) and passes[0] - cut >= 1
    assert sorted(id(g) for rank in ranks for g in rank) == sorted(map(id, groups))
    load = [sum(len(g.prompt) + sum(g.lengths) for g in rank) for rank in ranks]
    assert max(load) - min(load) <= 46  # the largest group


def test_lora_is_the_plain_model_with_products_added(small):
    """Log-probabilities and gradients of adapters are autograd's through W + B A."""
    policy, plain = (load_policy(small, torch.float32, "cpu", lora_rank=r) for r in (3, 0))
    [batch] = batches_of(random_groups(49152, SIZES))
    adapters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * 4 and all(".lora_" in name for name in adapters)
    for name, p in adapters.items():
        if ".lora_B." in name:
            assert not p.any()
            torch.nn.init.normal_(p, std=0.02)
    weights = dict(plain.named_parameters())
    for name, a in adapters.items():
        if ".lora_A." in name:
            b = adapters[name.replace("_A", "_B")]
            key = f"model.{name.split('.lora_')[0]}.weight"
            weights[key] = weights[key] + 32 / 3 * b @ a
    with torch.no_grad():
        before = plain(batch, 1.0)[0]
    want = torch.func.functional_call(plain, weights, (batch, 1.0))[0]
    got = policy(batch, 1.0)[0]
    assert torch.allclose(got, want, rtol=1e-5) and (got - before).abs().max() > 0.1
    assert torch.allclose(policy(batch, 1.0, adapted=False)[0], before, rtol=1e-5)
    grads = [torch.autograd.grad((x * x).sum(), [*adapters.values()]) for x in (got, want)]
    for x, y in zip(*grads):
        assert (x - y).norm() <= 1e-4 * y.norm() > 0
    merged = dict(model_utils.plain_weights(policy.model))
    for name, weight in weights.items():
        assert torch.allclose(merged[name.removeprefix("model.")], weight, atol=1e-6)


@pytest.mark.parametrize("lora_rank, parallel", [(3, "ddp"), (0, "fsdp")])
def test_a_checkpoint_is_a_plain_model_and_its_resume_goes_on(small, tmp_path, lora_rank, parallel):
    """To the bit; on a GPU, where sums have no order, to a fiftieth of what the update moves."""
    device = model_utils.setup_distributed()
    batches = [batch.to(device) for batch in batches_of(random_groups(49152, SIZES))]

    def trainer(path, resumed=None):
        policy = load_policy(path, torch.float32, "cpu" if parallel == "fsdp" else device,
                             lora_rank=lora_rank, resumed=resumed)
        net = model_utils.parallelize(policy, parallel, device)
        return net, policy, model_utils.make_optimizer(policy, 1e-2, 0.0)

    def update(net, policy, optimizer):
        for batch in batches:
            net(batch, 1.0)[0].sum().backward()
        model_utils.optimizer_step(net, optimizer, 1.0)
        return {name: w.clone() for name, w in model_utils.plain_weights(policy.model)}

    _, policy, optimizer = one = trainer(small)
    first = update(*one)
    assert len(optimizer.state) == (2 * 7 * 4 if lora_rank else 9 * 4 + 2)  # nothing of a base
    runs.save_checkpoint(tmp_path, dict(step=1), policy.model, AutoTokenizer.from_pretrained(small),
                         optimizer, dict(on_full_disk="stop", keep_ckpts=1))
    path, _ = runs.newest_checkpoint(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(p, first[name].cpu()) for name, p in saved.named_parameters())
    again = trainer(small if lora_rank else path, path)
    runs.load_optimizer(path, again[-1])
    resumed, second = update(*again), update(*one)
    for name, w in second.items():
        most = 0.02 * (w - first[name]).abs().mean() if device.type == "cuda" else 0
        assert (w - resumed[name]).abs().mean() <= most
    assert not torch.equal(*(w["model.layers.0.mlp.up_proj.weight"] for w in (first, second)))


def test_parameters_and_products_in_bfloat16(short, small, monkeypatch):
    """As of a reference model, and of a policy, in attention, too."""
    batch, = batches_of(random_groups(49152, SIZES[:1]))
    want = short(batch, 1.0)[0]
    seen, sdpa = set(), model_utils.F.scaled_dot_product_attention

    def watched(*qkv, **kwargs):
        seen.update(x.dtype for x in qkv)
        return sdpa(*qkv, **kwargs)

    monkeypatch.setattr(model_utils.F, "scaled_dot_product_attention", watched)
    reference = load_policy(small, torch.bfloat16, "cpu", param_dtype=torch.bfloat16)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    for policy in (reference, Policy(short.model, torch.bfloat16)):
        logp = policy(batch, 1.0)[0]
        assert logp.dtype == torch.float32 and 1e-6 < (logp - want).abs().mean() < 0.2
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("kind, changed, what", [
    ("granite", dict(logits_scaling=8.0), "logits_scaling"), ("cohere", {}, "logit_scale"),
    ("phi", {}, "a bias of the head"), ("gemma2", {}, "final_logit_softcapping"),
    ("mistral", dict(sliding_window=8), "sliding_window"), ("llama", {}, None), ("qwen2", {}, None),
    ("mistral", dict(sliding_window=None), None), ("lfm2", dict(layer_types=["conv"]), "conv")])
def test_models_whose_head_does_more_are_refused(kind, changed, what, dies, tmp_path):
    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, num_hidden_layers=1,
                                  num_attention_heads=4, pad_token_id=0, **changed)
    if what is None:
        model_utils.check_model("x", config)
    folder = "x" if what else tmp_path
    dies(f"models with {what or 'no *.safetensors'}", model_utils.check_model, folder, config)
