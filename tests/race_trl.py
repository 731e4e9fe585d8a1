"""TRL's side of the race: .venv-race/bin/python tests/race_trl.py SPEC.json, which race.py writes and starts.

GRPOTrainer on the specification's prompts, in its order. Leaves in the specification's out_dir: metrics.jsonl, a row a
step under the names that train.py has (time/rollout, time/update, ... and, of these, the finer phases); samples.jsonl;
model/; result.json. It runs in TRL's environment, so of this repository it imports nothing that needs vLLM.
"""
import importlib.util
import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import die
from runs import write_json
from grader import grade_all

if len(sys.argv) != 2 or not os.path.isfile(sys.argv[1]):
    die("one argument is needed, the specification that race.py writes")
with open(sys.argv[1], encoding="utf-8") as f:
    spec = json.load(f)
os.makedirs(spec["out_dir"], exist_ok=True)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as train.py: the engine's memory counts as this process's

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

# The one place that asks what the machine is.
cuda = torch.cuda.is_available()
vllm = cuda and importlib.util.find_spec("vllm") is not None
if cuda and not vllm:
    print("note: vllm is not in this environment; TRL samples with transformers", flush=True)

responses = spec["prompts"] * spec["group_size"]  # in a step
options = dict(
    output_dir=spec["out_dir"], max_steps=spec["steps"], seed=spec["seed"], shuffle_dataset=False,
    # the loss that race.py writes out
    loss_type="dapo", scale_rewards="none", beta=0.0, epsilon=0.2, num_iterations=1, mask_truncated_completions=False,
    num_generations=spec["group_size"], max_completion_length=spec["max_response_tokens"], temperature=spec["temperature"],
    top_p=1.0, top_k=0,
    learning_rate=spec["learning_rate"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
    optim="adamw_torch_fused", adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, disable_dropout=True,
    # one generation and one optimizer update a step, in as many micro-batches as it takes
    per_device_train_batch_size=spec["trl_batch"], gradient_accumulation_steps=responses // spec["trl_batch"],
    # TRL's default checkpoints activations, which costs a second forward pass, and has bf16 on a CPU too, where train.py
    # has float32. Weights are float32 in any case, as there
    gradient_checkpointing=False, bf16=cuda, model_init_kwargs=dict(dtype="float32"), dataloader_pin_memory=cuda,
    save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
) | (dict(
    use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_max_model_length=spec["context"],
    vllm_importance_sampling_correction=False,  # train.py has none; it would cost TRL one more forward pass
) if vllm else {}) | spec["trl_options"]

# ---------------------------------------------------------------------------------------------------------------------
# seconds by phase


class Clock:
    """Seconds by phase, every moment counted once: while a call inside a call runs, the outer one's phase stands still."""

    def __init__(self):
        self.phases, self.seconds, self.last = [], {}, 0.0

    def tick(self):
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.phases:
            self.seconds[self.phases[-1]] = self.seconds.get(self.phases[-1], 0.0) + now - self.last
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


clock, rows, step = Clock(), [], {}


class Steps(TrainerCallback):
    """A row a step: from its first micro-batch to its optimizer update; fetching prompts and logging are outside."""

    def on_step_begin(self, args, state, control, **kwargs):
        clock.seconds.clear()
        clock.enter("optimizer")  # what no watched method has: clipping, AdamW, clearing gradients

    def on_step_end(self, args, state, control, **kwargs):
        clock.leave()
        s = dict(clock.seconds)
        rows.append(dict(step, step=state.global_step, **{f"time/{k}": v for k, v in s.items()}) | {
            "time/rollout": s.get("rollout", 0.0) + s.get("reward", 0.0), "time/sync": s.get("sync", 0.0),  # as train.py
            "time/update": s["forward"] + s["backward"] + s["optimizer"], "time/step": sum(s.values()),
            "perf/peak_memory_gib": (torch.cuda.max_memory_allocated() if cuda else
                                     resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30})
        print(f"TRL step {state.global_step}/{spec['steps']}: reward {step['reward/mean']:.3f}, "
              f"{rows[-1]['time/step']:.1f} s: " + " ".join(f"{k} {v:.1f}" for k, v in s.items()), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the run


def correct(completions, completion_ids, row, **kwargs):
    """train.py's reward: 1 if the boxed answer is right, 0 if not or if the response was cut off. Also notes figures."""
    if row != [i for i in range(len(rows) * spec["prompts"], (len(rows) + 1) * spec["prompts"])
               for _ in range(spec["group_size"])]:
        die(f"TRL's step {len(rows) + 1} does not have the prompts of the specification in their order")
    cut = [ids[-1] not in trainer.eos_token_ids for ids in completion_ids]
    problems = [spec["problems"][i] for i in row]
    rewards = [float(x) for x in grade_all([("" if c else t, p) for t, c, p in zip(completions, cut, problems)])]
    lengths = [len(ids) for ids in completion_ids]
    step.update({"reward/mean": sum(rewards) / len(rewards), "rollout/response_tokens": sum(lengths),
                 "rollout/mean_length": sum(lengths) / len(lengths), "rollout/truncated": sum(cut) / len(cut)})
    with open(os.path.join(spec["out_dir"], "samples.jsonl"), "a", encoding="utf-8") as f:
        f.writelines(json.dumps(dict(step=len(rows) + 1, problem=p["problem"], answer=p["answer"], response=t, reward=r,
                                     truncated=c, ids=ids)) + "\n"
                     for p, t, r, c, ids in zip(problems, completions, rewards, cut, completion_ids))
    return rewards


tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
if tokenizer(text=spec["texts"])["input_ids"] != spec["ids"]:
    die("TRL's tokens of the prompts are not train.py's")
open(os.path.join(spec["out_dir"], "samples.jsonl"), "w").close()
try:
    arguments = GRPOConfig(**options)
except (TypeError, ValueError) as e:
    die(f"trl_options: {e}")
trainer = GRPOTrainer(
    spec["model"], correct, arguments, processing_class=tokenizer, callbacks=[Steps()],
    train_dataset=Dataset.from_dict(dict(prompt=spec["texts"], row=list(range(len(spec["texts"]))))))
for name, phase in (("training_step", "backward"), ("compute_loss", "forward"), ("_prepare_inputs", "rollout"),
                    ("_calculate_rewards", "reward"), ("_get_per_token_logps_and_entropies", "forward")):
    clock.watch(trainer, name, phase)
trainer.remove_callback(PrinterCallback)  # a page of figures a step
if vllm:
    clock.watch(trainer.vllm_generation, "sync_weights", "sync")
trainer.train()
for log in trainer.state.log_history:
    if "grad_norm" in log:
        rows[log["step"] - 1] |= {"train/loss": log["loss"], "train/grad_norm": log["grad_norm"],
                                  "train/entropy": log["entropy"]}
with open(os.path.join(spec["out_dir"], "metrics.jsonl"), "w", encoding="utf-8") as f:
    f.writelines(json.dumps(row) + "\n" for row in rows)
trainer.save_model(os.path.join(spec["out_dir"], "model"))
versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
write_json(os.path.join(spec["out_dir"], "result.json"), dict(
    versions={p: versions.get(p) for p in ("trl", "torch", "transformers", "accelerate", "vllm")}, vllm=vllm, options=options,
    threads=torch.get_num_threads()))
