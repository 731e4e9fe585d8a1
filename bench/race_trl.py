"""TRL's side of the race: .venv-race/bin/python bench/race_trl.py SPEC.json, as race.py starts it.

GRPOTrainer on the specification's prompts, in its order. Leaves in the specification's out_dir:
metrics.jsonl, a row a step under the names that train.py has (time/rollout, time/update, ... and,
of these, the finer phases); samples.jsonl; model/; result.json. It runs in TRL's environment, so of
this repository it imports nothing that needs vLLM.
"""
import importlib.util
import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# as train.py: the engine's memory counts as this process's
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from configurator import die
from grader import grade_all
from runs import write_jsonl, write_whole

if len(sys.argv) != 2 or not os.path.isfile(sys.argv[1]):
    die("one argument is needed, the specification that race.py writes")
with open(sys.argv[1], encoding="utf-8") as f:
    spec = json.load(f)
out_dir = spec["out_dir"]
os.makedirs(out_dir, exist_ok=True)

on_cuda = torch.cuda.is_available()
vllm = on_cuda and importlib.util.find_spec("vllm") is not None
if on_cuda and not vllm:
    print("note: vllm is not in this environment; TRL samples with transformers", flush=True)

options = dict(
    output_dir=out_dir, max_steps=spec["steps"], seed=spec["seed"], shuffle_dataset=False,
    # the loss that race.py writes out
    loss_type="dapo", scale_rewards="none", beta=0.0, epsilon=0.2, num_iterations=1,
    mask_truncated_completions=False,
    num_generations=spec["group_size"], max_completion_length=spec["max_response_tokens"],
    temperature=spec["temperature"], top_p=1.0, top_k=0,
    learning_rate=spec["learning_rate"], lr_scheduler_type="constant", warmup_steps=0,
    weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", adam_beta1=0.9,
    adam_beta2=0.999, adam_epsilon=1e-8, disable_dropout=True,
    # one generation and one optimizer update a step, in as many micro-batches as it takes
    per_device_train_batch_size=spec["trl_batch"],
    gradient_accumulation_steps=spec["prompts"] * spec["group_size"] // spec["trl_batch"],
    # TRL's default checkpoints activations, which costs a second forward pass, and has bf16 on a
    # CPU too, where train.py has float32. Weights are float32 in any case, as there
    gradient_checkpointing=False, bf16=on_cuda, model_init_kwargs=dict(dtype="float32"),
    dataloader_pin_memory=on_cuda,
    save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True)
if vllm:
    options |= dict(
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=spec["context"],
        # train.py has none; it would cost TRL one more forward pass
        vllm_importance_sampling_correction=False)
options |= spec["trl_options"]


# --------------------------------------------------------------------------------------------------
# seconds by phase

class Clock:
    """Seconds by phase, every moment counted once: a call inside a call stops the outer one's."""

    def __init__(self):
        self.phases, self.seconds, self.last = [], {}, 0.0

    def tick(self):
        if on_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.phases:
            phase = self.phases[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def enter(self, phase):
        self.tick()
        self.phases.append(phase)

    def leave(self):
        self.tick()
        self.phases.pop()

    def watch(self, owner, name, phase):
        """Count the time in owner's method `name` to `phase`."""
        function = getattr(owner, name)

        def run(*args, **kwargs):
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, run)


clock = Clock()
rows, samples, step = [], [], {}  # of the steps so far; the figures of this one


class Steps(TrainerCallback):
    """A row a step: from its first micro-batch to its update; without fetching prompts, logging."""

    def on_step_begin(self, args, state, control, **kwargs):
        clock.seconds.clear()
        clock.enter("optimizer")  # what no watched method has: clipping, AdamW, clearing gradients

    def on_step_end(self, args, state, control, **kwargs):
        clock.leave()
        s = dict(clock.seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if on_cuda:
            peak = torch.cuda.max_memory_allocated()
        row = dict(step, step=state.global_step)
        row |= {f"time/{phase}": seconds for phase, seconds in s.items()}
        row |= {  # as train.py
            "time/rollout": s.get("rollout", 0.0) + s.get("reward", 0.0),
            "time/sync": s.get("sync", 0.0),
            "time/update": s["forward"] + s["backward"] + s["optimizer"],
            "time/step": sum(s.values()),
            "perf/peak_memory_gib": peak / 2**30}
        rows.append(row)
        phases = " ".join(f"{phase} {seconds:.1f}" for phase, seconds in s.items())
        print(f"TRL step {state.global_step}/{spec['steps']}: reward {step['reward/mean']:.3f}, "
              f"{row['time/step']:.1f} s: {phases}", flush=True)


# --------------------------------------------------------------------------------------------------
# the run

def correct(completions, completion_ids, row, **kwargs):
    """train.py's reward: 1 if the boxed answer is right and the response not cut off, else 0."""
    first = len(rows) * spec["prompts"]
    meant = range(first, first + spec["prompts"])
    if row != [i for i in meant for _ in range(spec["group_size"])]:
        die(f"TRL's step {len(rows) + 1} does not have the specification's prompts in their order")
    cut = [ids[-1] not in trainer.eos_token_ids for ids in completion_ids]
    problems = [spec["problems"][i] for i in row]
    texts = ["" if is_cut else text for text, is_cut in zip(completions, cut)]
    rewards = [float(x) for x in grade_all(list(zip(texts, problems)))]
    lengths = [len(ids) for ids in completion_ids]
    step.update({
        "reward/mean": sum(rewards) / len(rewards), "rollout/response_tokens": sum(lengths),
        "rollout/mean_length": sum(lengths) / len(lengths),
        "rollout/truncated": sum(cut) / len(cut)})
    for problem, *others in zip(problems, completions, rewards, cut, completion_ids):
        keys = ("response", "reward", "truncated", "ids")
        samples.append(dict(step=len(rows) + 1, problem=problem["problem"],
                            answer=problem["answer"], **dict(zip(keys, others))))
    return rewards


tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
if tokenizer(text=spec["texts"])["input_ids"] != spec["ids"]:
    die("TRL's tokens of the prompts are not train.py's")
try:
    arguments = GRPOConfig(**options)
except (TypeError, ValueError) as e:
    die(f"trl_options: {e}")
given = dict(prompt=spec["texts"], row=list(range(len(spec["texts"]))))
trainer = GRPOTrainer(
    spec["model"], correct, arguments, processing_class=tokenizer, callbacks=[Steps()],
    train_dataset=Dataset.from_dict(given))
clock.watch(trainer, "training_step", "backward")
clock.watch(trainer, "compute_loss", "forward")
clock.watch(trainer, "_get_per_token_logps_and_entropies", "forward")
clock.watch(trainer, "_prepare_inputs", "rollout")
clock.watch(trainer, "_calculate_rewards", "reward")
if vllm:
    clock.watch(trainer.vllm_generation, "sync_weights", "sync")
trainer.remove_callback(PrinterCallback)  # a page of figures a step
trainer.train()

for log in trainer.state.log_history:
    if "grad_norm" in log:
        rows[log["step"] - 1] |= {"train/loss": log["loss"], "train/grad_norm": log["grad_norm"],
                                  "train/entropy": log["entropy"]}
write_jsonl(f"{out_dir}/metrics.jsonl", rows)
write_jsonl(f"{out_dir}/samples.jsonl", samples)
trainer.save_model(f"{out_dir}/model")
installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
names = ("trl", "torch", "transformers", "accelerate", "vllm")
write_whole(f"{out_dir}/result.json", json.dumps(dict(
    versions={name: installed.get(name) for name in names}, vllm=vllm, options=options,
    threads=torch.get_num_threads()), indent=1))
