# DaGRPO, Qwen2.5-Math-7B on OpenR1-Math-46k-8192, the paper's settings (arXiv 2512.06337):
#   JUDGE_API_KEY=... torchrun --nproc_per_node=8 train.py config/dagrpo_math.py
#   ... --anchors=0                                                     the row "w/o off-policy"
#   ... --variant=grpo --anchors=0; ... --variant=grpo      GRPO; with anchors, nearest to LUFFY
# Qwen2.5-Math-7B, its context of 4096 made 16384 (rope_theta 40000), as for LUFFY
model = "Elliott/Qwen2.5-Math-7B-16k-think"
dataset = "openr1-math-46k-8192"  # the demonstrations are its R1 traces
eval_dataset = "math500"
eval_problems = 500
out_dir = "out/dagrpo_math"
variant = "dagrpo"
# 1,024 requests a step, each with a trace of up to 8192 tokens: look at the price first.
# --judge=rubric costs nothing; --judge=http://host:8000/v1 --judge_model=None is your own vLLM
judge = "https://api.openai.com/v1"
judge_model = "gpt-4o"
delta = 3.0
anchors = 1                   # 7 rollouts and a demonstration
advantage_norm = "mean"       # Dr.GRPO
loss_norm = "constant"
kl_coef = 0.0
group_size = 8
temperature = 1.0
max_response_tokens = 8192
prompts_per_step = 128
prompts_per_update = 64
learning_rate = 1e-6
max_steps = 500
oversample = 1.5
tokens_per_micro_batch = 32768
activation_checkpointing = True
parallel = "fsdp"
