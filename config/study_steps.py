# bench/study.py: sums of three in two steps, from a model that has about 40% of them right. Wrong
# answers share a right first step with right ones: the case of [NTHR]. Four updates a step as there
model = "out/study/start/step_000008"
dataset = "sums"
max_steps = 8
prompts_per_step = 8        # sampled in one round; groups with a signal are trained on
prompts_per_update = 2
max_rounds = 1
group_size = 8
max_response_tokens = 48
tokens_per_micro_batch = 3000
learning_rate = 5e-6
eval_every = 4
eval_problems = 64
keep_ckpts = 1
