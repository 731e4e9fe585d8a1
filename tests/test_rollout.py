"""The engine as real vLLM with the real model: what it samples, and from whose weights.

As a program (under torchrun) it prints what `sample` samples there."""
import copy
import gc
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # before torch, whose threads it sets

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import data
from configurator import print0
from model_utils import load_policy, pack_units, setup_distributed

PAIRS = ((12, 11), (7, 5), (31, 20), (10, 14), (21, 8), (40, 30), (5, 3))
ROWS = [{"problem": f"{a} + {b}", "answer": str(a + b)} for a, b in PAIRS]
HOW = {"seed": 7, "temperature": 1.0, "max_response_tokens": 24}


def content(groups):
    """A hash of the groups' problems, responses and rewards."""
    rows = [(g.row["problem"], list(map(list, g.responses)), list(g.reward)) for g in groups]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def sample(engine, tokenizer):
    """(groups accepted, position, hashes of all groups looked at and of generate_all_ranks')."""
    questions = tokenizer, ROWS, data.encode_prompts(tokenizer, ROWS, "arithmetic")
    groups, sampled, position, wasted = rollout.sample_batch(
        engine, *questions, 3, prompts_per_step=3, group_size=4, oversample=2.0, **HOW)
    answers = rollout.generate_all_ranks(engine, *questions, n=2, **HOW)
    mine = len(groups), position, content(sampled), content(answers)
    first, *others = data.of_ranks((*mine, wasted, content(groups)))
    assert all(other == first for other in others)
    return mine


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
    pushed(world, policy)


def pushed(world, policy):
    assert gap(policy, generate(world, n=2, max_response_tokens=8)) > 1e-2
    rollout.sync_weights(world[0], policy.model)
    assert gap(policy, generate(world, n=2, max_response_tokens=8)) < 1e-3


def test_weight_sync(world, model_dir):
    push(world, copy.deepcopy(world[-1]))
    adapted = load_policy(model_dir, torch.float32, "cpu", lora_rank=4)
    for name, p in adapted.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.01)
    pushed(world, adapted)
    pushed(world, world[-1])  # as it was


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
    assert len(batch(4, prompts=0.1)[1]) == 1  # one prompt at least
    assert [g.row for g in everything] == [ROWS[i] for i in data.data_order(3, 18, 7, 7)]
    mixed = [i for i, g in enumerate(everything) if 0 < g.reward.mean() < 1]
    for want, *how in ((1, 4.0), (4, 1.0), (3, np.inf, 8)):
        groups, sampled, _, wasted = batch(want, *how)
        assert content(sampled) == content(everything[:mixed[want - 1] + 1])
        assert content(groups) == content([everything[i] for i in mixed[:want]])
        assert wasted == 0 or how != [1.0]  # only what is in work beyond the missing ones
    assert content(batch(2, prompts=mixed[1])[0]) == content([everything[mixed[0]]])
    assert content(batch(3, wanted=lambda group: True)[0]) == content(everything[:3])


@pytest.mark.slow
def test_the_same_on_one_rank_and_two(world, run):
    here = sample(*world[:2])
    assert here[0] == 3 and here[1] > 6
    assert " ".join(map(str, here)) in run("tests/test_rollout.py", ranks=2).stdout


@pytest.mark.parametrize("hard_only", (False, True))
def test_demonstrations_join_groups_before_they_are_accepted(world, hard_only):
    texts = {row["problem"]: {f"{j}: \\boxed{{{row['answer']}}}": 0 for j in range(i)}
             for i, row in enumerate(ROWS)}
    groups, sampled, *_ = rollout.sample_batch(
        *world[:4], 0, prompts_per_step=7, max_rounds=1, group_size=4, anchors=2,
        anchor_texts=texts, end=world[1].eos_token_id, anchor_hard_only=hard_only, **HOW)
    assert len(sampled) == 7 and {bool(g.right.any()) for g in sampled} == {True, False}
    for g in sampled:
        known = [*texts[g.row["problem"]]][:2]
        joins = [] if hard_only and g.right.any() else known
        assert g.is_anchor.tolist() == [False] * (4 - len(joins)) + [True] * len(joins)
        assert g.texts[4 - len(joins):] == joins and g.reward[g.is_anchor].all()
        assert g.texts == [world[1].decode(ids, True) for ids in g.responses]
        assert any(g is k for k in groups) == (0 < g.reward.mean() < 1)


@pytest.fixture(scope="module")
def untied(world, small, tmp_path_factory):
    """A world of few layers and a head of its own. The last one here: an engine's end is the
    process group's."""
    if torch.cuda.is_available():
        pytest.skip("vLLM's sleep mode: one engine a process")
    path = str(tmp_path_factory.mktemp("untied"))
    AutoModelForCausalLM.from_pretrained(small, tie_word_embeddings=False).save_pretrained(path)
    world[1].save_pretrained(path)
    engine = rollout.build_engine(path, 160, 0, "float32")
    yield engine, *world[1:4], load_policy(path, torch.float32, "cpu")
    del engine
    gc.collect()


@pytest.mark.parametrize("changed", ["lm_head", ""])
def test_weight_sync_of_an_untied_head(untied, changed):
    push(untied, untied[-1], changed)


def test_more_prompts_than_an_engine_step_has_room_for(untied):
    """On a CPU vLLM cannot cut the prompt of a request with a seed: it has to wait instead."""
    rows = [{"problem": " + ".join(map(str, range(i, i + 25))), "answer": "0"} for i in range(60)]
    prompts = data.encode_prompts(untied[1], rows, "some.jsonl")
    assert max(map(len, prompts)) < 158 and sum(map(len, prompts)) > 4096 + 60 * 32
    groups = generate((*untied[:2], rows, prompts), n=2, max_response_tokens=2)
    assert [g.row for g in groups] == rows and all(g.lengths == [2, 2] for g in groups)


if __name__ == "__main__":
    setup_distributed()
    engine = rollout.build_engine("models/SmolLM2-135M-Instruct", 160, 0, "float32")
    mine = sample(engine, data.load_tokenizer("models/SmolLM2-135M-Instruct")[0])
    print0(" ".join(map(str, mine)))
    del engine  # its shutdown ends the process group
