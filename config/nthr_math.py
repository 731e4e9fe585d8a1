# NTHR, Qwen2.5-Math-1.5B on MATH levels 3 to 5, the settings of the paper (arXiv 2505.18830) where it states them:
#   torchrun --nproc_per_node=4 train.py config/nthr_math.py
model = "Qwen/Qwen2.5-Math-1.5B"
dataset = "math"
eval_dataset = "math500"
eval_problems = 500
out_dir = "out/nthr_math"
variant = "nthr"              # --variant=grpo, pos_only, random: the other rows
nthr_beta = 1.0
group_size = 8                # not stated
temperature = 1.0
max_response_tokens = 3072    # the model's context of 4096 less a prompt
prompts_per_step = 256
prompts_per_update = 64
learning_rate = 1e-6
kl_coef = 1e-4
max_steps = 40
tokens_per_micro_batch = 16384
activation_checkpointing = True
