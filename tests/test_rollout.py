"""The engine as real vLLM with the real model: what it samples, and from whose weights."""
import copy
import gc

import rollout

import numpy as np
import pytest
import torch
from sampling import HOW, ROWS, content, sample

import data
from model_utils import load_policy, pack_units, setup_distributed


@pytest.fixture(scope="module")
def world(model_dir):
    setup_distributed()
    tokenizer, _ = data.load_tokenizer(model_dir)
    questions = tokenizer, ROWS, data.encode_prompts(tokenizer, ROWS, "arithmetic")
    engine = rollout.build_engine(model_dir, 160, 0, "float32")
    yield engine, *questions, load_policy(model_dir, torch.float32, "cpu")
    del engine
    gc.collect()  # its memory is wanted by the runs of test_train.py


def generate(world, n=4, **how):
    return rollout.generate_all_ranks(*world[:4], n=n, **HOW | {"temperature": 0.8} | how)


@torch.no_grad()
def gap(policy, groups, temperature=0.8):
    return max((policy(batch, temperature)[0] - batch.rollout_logp).abs().max().item()
               for unit in pack_units(groups, 500) for batch in unit.batches)


def test_groups_line_up_with_the_trainer(world):
    _, tokenizer, rows, prompts, policy = world
    groups = generate(world)
    for g, row, prompt in zip(groups, rows, prompts, strict=True):
        assert g.row == row and np.array_equal(g.prompt, prompt) and max(g.lengths) <= 24
        assert g.texts == [tokenizer.decode(ids, True) for ids in g.responses]
        ended = [ids[-1] == tokenizer.eos_token_id for ids in g.responses]
        assert ended == (~g.truncated).tolist()  # the end is a token like any other
        verdicts = rollout.grade_all([(text, row) for text in g.texts])
        assert g.reward.tolist() == [v and not c for v, c in zip(verdicts, g.truncated)]
    assert not all(g.truncated.all() for g in groups) and 0 < data.accuracy(groups) < 1
    assert gap(policy, groups) < 1e-3
    assert gap(policy, groups, temperature=1.0) > 1e-2  # it is in vLLM's log-probabilities
    # a response depends on its place alone, not on what is sampled beside it
    for g, same in zip(groups, generate((*world[:2], rows[:2], prompts[:2]), n=2)):
        assert all(map(np.array_equal, g.responses, same.responses))
    assert len({tuple(ids) for g in groups for ids in g.responses}) > len(groups)
    for g in generate(world, n=2, max_response_tokens=3):
        assert g.truncated.all() and not g.reward.any() and g.lengths == [3, 3]


@torch.no_grad()
def push(world, policy, changed=""):
    """Perturb parameters and push all: vLLM's log-probabilities are the trainer's again."""
    torch.manual_seed(0)
    for name, p in policy.model.named_parameters():
        if name.startswith(changed):
            p += 0.05 * p.std() * torch.randn_like(p)
    assert gap(policy, generate(world, n=2)) > 1e-2
    rollout.sync_weights(world[0], policy.model)
    assert gap(policy, generate(world, n=2)) < 1e-3


def test_weight_sync(world, model_dir):
    push(world, copy.deepcopy(world[-1]))
    rollout.sync_weights(world[0], world[-1].model)  # a second time
    assert gap(world[-1], generate(world, n=2)) < 1e-3
    adapted = load_policy(model_dir, torch.float32, "cpu", lora_rank=4)
    for name, p in adapted.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.01)
    assert gap(adapted, generate(world, n=2)) > 1e-2
    rollout.sync_weights(world[0], adapted.model)
    assert gap(adapted, generate(world, n=2)) < 1e-3
    rollout.sync_weights(world[0], world[-1].model)


def test_dynamic_sampling_accepts_in_order(world, monkeypatch):
    """It accepts what sampling everything first and taking the first mixed groups would."""
    core = world[0].llm_engine

    def batch(want, oversample=1.0, max_num_seqs=256, prompts=18, **how):
        monkeypatch.setattr(core.vllm_config.scheduler_config, "max_num_seqs", max_num_seqs)
        how |= dict(HOW, oversample=oversample, max_rounds=prompts / want)
        found = rollout.sample_batch(*world[:4], 3, prompts_per_step=want, group_size=4, **how)
        assert not core.has_unfinished_requests() and found[2] == 3 + len(found[1])
        return found

    everything, sampled, _, wasted = batch(18, dynamic_sampling=False)
    assert len(sampled) == 18 == len({g.seed for g in everything}) and wasted == 0
    assert [g.row for g in everything] == [ROWS[i] for i in data.data_order(3, 18, 7, 7)]
    mixed = [i for i, g in enumerate(everything) if 0 < g.reward.mean() < 1]
    for want, *how in ((1, 4.0), (4, 1.0), (4, 3.0, 8), (3, np.inf, 8)):
        groups, sampled, _, wasted = batch(want, *how)
        assert content(sampled) == content(everything[:mixed[want - 1] + 1])
        assert content(groups) == content([everything[i] for i in mixed[:want]])
        assert wasted == 0 or how != [1.0]  # only what is in work beyond the missing ones
    assert len(batch(7, prompts=7)[0]) < 7  # what there is
    assert content(batch(3, wanted=lambda group: True)[0]) == content(everything[:3])


def test_more_prompts_than_an_engine_step_has_room_for(world):
    """On a CPU vLLM cannot cut the prompt of a request with a seed: it has to wait instead."""
    rows = [{"problem": " + ".join(map(str, range(i, i + 25))), "answer": "0"} for i in range(60)]
    prompts = data.encode_prompts(world[1], rows, "some.jsonl")
    assert max(map(len, prompts)) < 158 and sum(map(len, prompts)) > 4096 + 60 * 32
    groups = generate((*world[:2], rows, prompts), n=2, max_response_tokens=2)
    assert [g.row for g in groups] == rows and all(g.lengths == [2, 2] for g in groups)


@pytest.mark.slow
def test_the_same_on_one_rank_and_two(world, run):
    here = sample(*world[:2])
    assert here[0] == 3 and here[1] > 6
    assert " ".join(map(str, here)) in run("tests/sampling.py", ranks=2).stdout


@pytest.mark.parametrize("hard_only", (False, True))
def test_demonstrations_join_groups_before_they_are_accepted(world, hard_only):
    rows = data.load_problems("sums", "train")[:6]
    prompts = data.encode_prompts(world[1], rows, "sums")
    texts = {r["problem"]: {f"{j}{r['solution']}": 0 for j in range(i)} for i, r in enumerate(rows)}
    how = HOW | dict(anchor_hard_only=hard_only, max_response_tokens=48)
    groups, sampled, *_ = rollout.sample_batch(
        *world[:2], rows, prompts, 0, prompts_per_step=6, max_rounds=1, group_size=4, anchors=2,
        anchor_texts=texts, end=world[1].eos_token_id, **how)
    assert len(sampled) == 6 and len(groups) >= 3
    for g in sampled:
        known = [*texts[g.row["problem"]]][:2]
        joins = [] if hard_only and g.right.any() else known
        assert g.is_anchor.tolist() == [False] * (4 - len(joins)) + [True] * len(joins)
        assert g.texts[4 - len(joins):] == joins and g.reward[g.is_anchor].all()
        assert g.texts == [world[1].decode(ids, True) for ids in g.responses]
        assert any(g is k for k in groups) == (0 < g.reward.mean() < 1)
    assert all(g.is_anchor.any() for g in groups)  # the model by itself finds hardly any


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's sleep mode: one engine a process")
def test_weight_sync_of_an_untied_head(world, tmp_path):
    """The last one here: an engine's end is the process group's."""
    _, tokenizer, rows, prompts, tied = world
    config = copy.deepcopy(tied.model.config)
    config.tie_word_embeddings = False
    untied = type(tied.model)(config)
    untied.load_state_dict(tied.model.state_dict())
    untied.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = rollout.build_engine(str(tmp_path), 160, 0, "float32")
    policy = load_policy(str(tmp_path), torch.float32, "cpu")
    for changed in ("lm_head", ""):
        push((engine, tokenizer, rows[:3], prompts[:3]), policy, changed)
    del engine
    gc.collect()
