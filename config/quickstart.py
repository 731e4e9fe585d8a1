# SmolLM2-135M-Instruct learns two-digit addition on 2 CPU cores: make quickstart
out_dir = "out/quickstart"
dataset = "addition"
variant = "nthr"
max_steps = 22
prompts_per_step = 24       # sampled in one round; groups with both outcomes are trained on
prompts_per_update = 24
max_rounds = 1
group_size = 4              # more problems rather than more responses
temperature = 1.2
max_response_tokens = 28
tokens_per_micro_batch = 3000
learning_rate = 1.2e-5      # twelve times what a long run would bear
decay_steps = 22
eval_every = 11
eval_problems = 512
