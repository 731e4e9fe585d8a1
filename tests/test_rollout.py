"""Data and prompts by themselves; the engine as real vLLM with the real model."""
import gc

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import data
import rollout
from model_utils import load_policy, pack_all, plan_micro_batches, setup_distributed


def test_arithmetic_is_right_and_held_out_problems_are_unseen():
    train, test = data.load_problems("arithmetic", "train"), data.load_problems("arithmetic", "test")
    assert len(test) == 128 and len(train) > 8000
    for row in train + test:
        a, op, b = row["problem"].split()
        assert int(row["answer"]) == (int(a) + int(b) if op == "+" else int(a) - int(b)) and 10 <= int(b) <= 99
    key = lambda row: (row["problem"].split()[1], frozenset(row["problem"].split()[::2]))
    assert not {key(r) for r in train} & {key(r) for r in test}


def test_data_index_visits_every_row_once_an_epoch():
    epochs = [[data.data_index(e * 10 + i, 10, seed=3) for i in range(10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    assert data.data_index(13, 10, seed=3) == epochs[1][3]  # any position, in any order: a resume starts anywhere


def test_prompts_with_and_without_a_chat_template(model_dir, capsys):
    tok = AutoTokenizer.from_pretrained(model_dir)
    rows = [{"problem": "12 + 34", "answer": "46"}]
    ids = data.encode_prompts(tok, rows, "some.jsonl")[0]
    assert tok.decode(ids) == (f"<|im_start|>system\n{data.BOXED['system_prompt']}<|im_end|>\n<|im_start|>user\n12 + 34"
                               "<|im_end|>\n<|im_start|>assistant\n")
    text = tok.decode(data.encode_prompts(tok, rows, "arithmetic", system_prompt="Be brief.")[0])
    assert "Be brief." in text and text.count("\\boxed{") == 2
    tok.chat_template = None
    plain = tok.decode(data.encode_prompts(tok, rows, "x.jsonl", system_prompt="", few_shot=(("1 + 1", "2"),))[0])
    assert plain == "Question: 1 + 1\n\nAnswer: 2\n\nQuestion: 12 + 34\n\nAnswer:"
    assert "no chat template" in capsys.readouterr().out


# --- the engine ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(model_dir):
    setup_distributed()
    tok, _ = data.load_tokenizer(model_dir)
    rows = data.load_problems("arithmetic", "train")[:6]
    prompts = data.encode_prompts(tok, rows, "arithmetic")
    engine = rollout.build_engine(model_dir, 160, 0, "float32")
    yield engine, tok, rows, prompts, load_policy(model_dir, torch.float32, torch.device("cpu"))
    del engine
    gc.collect()  # its memory is wanted by the runs of test_train.py


def sample(world, n=4, temperature=0.8, length=24):
    engine, tok, rows, prompts, _ = world
    torch.manual_seed(1)
    return rollout.generate(engine, tok, rows, prompts, n=n, temperature=temperature, max_response_tokens=length)


def gap(world, groups, temperature):
    policy = world[-1]
    with torch.no_grad():
        logp = torch.cat([policy(b, temperature)[0] for b in pack_all(groups, plan_micro_batches(groups, 500), "cpu")])
    return (logp - torch.from_numpy(np.concatenate([l for g in groups for l in g["logprobs"]]))).abs().max().item()


def test_groups_line_up_with_the_trainer(world):
    groups = sample(world)
    again = sample(world)
    eos = world[1].eos_token_id
    for g, a in zip(groups, again):
        assert len(g["responses"]) == len(g["logprobs"]) == len(g["texts"]) == 4
        for r, l, cut, text, same in zip(g["responses"], g["logprobs"], g["truncated"], g["texts"], a["responses"]):
            assert len(r) == len(l) <= 24 and r.tolist() == same.tolist()
            assert (r[-1] == eos) != cut  # a finished response ends with the end-of-sequence token, a cut one does not
            assert text == world[1].decode(r, skip_special_tokens=True)
        verdicts = rollout.grade_all([(t, g) for t in g["texts"]])
        assert g["rewards"].tolist() == [float(v and not cut) for v, cut in zip(verdicts, g["truncated"])]
    assert not all(g["truncated"].all() for g in groups)
    assert gap(world, groups, 0.8) < 1e-3
    assert gap(world, groups, 1.0) > 1e-2  # the temperature is in vLLM's log-probabilities
    cut = sample(world, n=2, length=3)
    assert all(g["truncated"].all() and not g["rewards"].any() and len(g["responses"][0]) == 3 for g in cut)


def test_weight_sync(world):
    """Perturb every weight, push, and vLLM's log-probabilities are the trainer's again: the tied head's too."""
    engine, _, _, _, policy = world
    saved = {n: p.detach().clone() for n, p in policy.named_parameters()}
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * p.std() * torch.randn(p.shape, generator=g) if p.dim() > 1 else 0.02 * p.mean())
    stale = sample(world)
    assert gap(world, stale, 0.8) > 1e-2
    for _ in range(2):
        rollout.sync_weights(engine, policy.model)
        assert gap(world, sample(world), 0.8) < 1e-3
    with torch.no_grad():
        for n, p in policy.named_parameters():
            p.copy_(saved[n])
    rollout.sync_weights(engine, policy.model)
    assert gap(world, stale, 0.8) < 1e-3  # those were sampled before the first push


def test_dynamic_sampling_accepts_in_order(world):
    """Streaming, and in rounds, accept the groups that sampling everything first and taking the first mixed ones would; each
    response has its own seed here, so that it is the same however it is scheduled."""
    engine, tok, *_ = world
    rows = [dict(problem=f"{a} + {b}", answer=str(a + b)) for a, b in ((12, 11), (7, 5), (31, 20), (10, 14), (21, 8), (40, 30), (5, 3))]
    prompts = data.encode_prompts(tok, rows, "arithmetic")
    args = dict(n=4, temperature=1.0, max_response_tokens=24, keep_all=False, seeded=True)
    _, everything, position, wasted = rollout.sample_batch(engine, tok, rows, prompts, 3, 0, prompts_per_step=24, oversample=1.0,
                                                         max_prompts=24, streaming=False, **args)
    assert position == 3 + 24 and wasted == 0 and len(everything) == 24
    assert [g["problem"] for g in everything] == [rows[data.data_index(3 + i, 7, 0)]["problem"] for i in range(24)]
    mixed = [i for i, g in enumerate(everything) if 0 < g["rewards"].mean() < 1]
    lengths = [sum(map(len, g["responses"])) for g in everything]
    assert 5 < len(mixed) < 20 and len(set(lengths)) > 3
    totals = []
    same = lambda g, h: g["problem"] == h["problem"] and all(map(np.array_equal, g["responses"], h["responses"]))
    for want, oversample, streaming, seqs in ((1, 4.0, True, 256), (4, 1.0, True, 256), (4, 3.0, True, 8), (3, np.inf, True, 8),
                                              (5, 1.5, False, 256), (2, np.inf, False, 8)):
        limits = engine.llm_engine.vllm_config.scheduler_config
        kept, limits.max_num_seqs = limits.max_num_seqs, seqs
        groups, sampled, position, wasted = rollout.sample_batch(
            engine, tok, rows, prompts, 3, 0, prompts_per_step=want, oversample=oversample, max_prompts=24,
            streaming=streaming, **args)
        limits.max_num_seqs = kept
        cut = mixed[want - 1] + 1
        assert position == 3 + cut and len(sampled) == cut and all(map(same, sampled, everything))
        assert len(groups) == want and all(same(g, everything[i]) for g, i in zip(groups, mixed))
        assert not engine.llm_engine.has_unfinished_requests()
        assert 0 <= wasted <= sum(lengths[cut:]) and (wasted == 0 or oversample > 1)  # only what is in work beyond the missing ones
        totals.append(wasted)
    assert totals[0] > 0


def test_dynamic_sampling_is_the_same_on_one_rank_and_two(world, run):
    import sampling
    accepted, position, digest = sampling.sample(*world[:2])
    assert accepted == 3 and position > 6
    assert f"SAMPLED {accepted} {position} {digest}\n" in run("tests/sampling.py", ranks=2).stdout


def test_dynamic_sampling_has_a_limit(world):
    engine, tok, rows, prompts, _ = world
    args = dict(n=4, temperature=1.0, max_response_tokens=24, oversample=1.0)
    groups, sampled, position, wasted = rollout.sample_batch(engine, tok, rows, prompts, 0, 0, prompts_per_step=5, max_prompts=15,
                                                           keep_all=True, **args)
    assert len(groups) == len(sampled) == position == 5 and wasted == 0
    groups, sampled, position, wasted = rollout.sample_batch(engine, tok, rows, prompts, 0, 0, prompts_per_step=7, max_prompts=7,
                                                           keep_all=False, **args)
    assert position == len(sampled) == 7 and len(groups) < 7 and wasted == 0  # what there is


def test_demonstrations_join_groups_before_they_are_accepted(world):
    engine, tok, _, _, _ = world
    rows = data.load_problems("sums", "train")[:6]
    rows[1]["solution"] = "the answer is \\boxed{7}"       # wrong
    rows[2]["solution"] = "so " * 60 + rows[2]["solution"]  # too long
    prompts = data.encode_prompts(tok, rows, "sums", few_shot=())
    end = data.end_token(tok, "models/SmolLM2-135M-Instruct")
    counts = data.verify_demos(tok, rows, prompts, data.load_demos(rows, "sums"), 48, end)
    assert counts == dict(read=6, wrong=1, too_long=1, problems_without=1)
    assert [row["anchor"] for row in rows] == [True, False, False, True, True, True] and rows[1]["solution"] is None

    def batch(n=3, **kw):
        torch.manual_seed(5)
        return rollout.sample_batch(engine, tok, rows, prompts, 0, 0, prompts_per_step=6, oversample=1.0, max_prompts=6, n=n,
                                    temperature=1.0, max_response_tokens=48, end=end, **kw)

    for mode, hard_only in (("replace", False), ("add", False), ("replace", True), ("add", True)):
        groups, sampled, position, _ = batch(keep_all=False, anchors=mode, hard_only=hard_only)
        assert position == len(sampled) == 6
        for g in sampled:
            row = next(r for r in rows if r["problem"] == g["problem"])
            joins = row["anchor"] and not (hard_only and g["rewards"][~g["anchor"]].any())
            assert g["anchor"].tolist() == [False] * (3 if mode == "add" or not joins else 2) + [True] * joins
            assert len(g["responses"]) == len(g["rewards"]) == len(g["anchor"]) == len(g["texts"]) == len(g["logprobs"])
            if joins:
                assert g["texts"][-1] == row["solution"] == tok.decode(g["responses"][-1], skip_special_tokens=True)
                assert g["rewards"][-1] == 1 and not g["truncated"][-1]
            kept = any(g is k for k in groups)
            assert kept == (0 < g["rewards"].mean() < 1)
        # without examples the model finds none: only the demonstration makes a group worth training on
        assert [g["problem"] for g in groups if not g["anchor"].any()] == [] and len(groups) >= 3
    assert not any(g["anchor"].any() for g in batch(keep_all=True)[0])
    with pytest.raises(KeyError):  # not verified
        rollout.sample_batch(engine, tok, data.load_problems("sums", "train"), prompts, 0, 0, prompts_per_step=1, oversample=1.0,
                             max_prompts=1, keep_all=True, n=2, anchors="add", end=end, temperature=1.0, max_response_tokens=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's sleep mode is for one engine a process")
def test_weight_sync_of_an_untied_head(world, tmp_path):
    """The same with a head of its own, in an engine of its own: only the head is changed, then everything. The last
    one here: an engine's end is the process group's."""
    tok, rows, prompts, policy = world[1:]
    config = policy.model.config.to_dict() | dict(tie_word_embeddings=False)
    untied = type(policy.model)(type(policy.model.config)(**config))
    untied.load_state_dict(policy.model.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    untied.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    mine = load_policy(str(tmp_path), torch.float32, torch.device("cpu"))
    engine = rollout.build_engine(str(tmp_path), 160, 0, "float32")
    other = engine, tok, rows[:3], prompts[:3], mine
    g = torch.Generator().manual_seed(0)
    assert gap(other, sample(other, 2), 0.8) < 1e-3
    with torch.no_grad():
        for changed in ("lm_head", ""):
            for name, p in mine.model.named_parameters():
                if name.startswith(changed) and p.dim() > 1:
                    p.add_(0.05 * p.std() * torch.randn(p.shape, generator=g))
            assert gap(other, sample(other, 2), 0.8) > 1e-2
            rollout.sync_weights(engine, mine.model)
            assert gap(other, sample(other, 2), 0.8) < 1e-3
    del engine, other
    gc.collect()
