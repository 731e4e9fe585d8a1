# DaGRPO on 2 CPU cores: sums of three numbers, of which SmolLM2-135M-Instruct samples hardly a
# right one, learned from worked solutions as anchors: make dagrpo
out_dir = "out/dagrpo_quickstart"
dataset = "sums"
variant = "dagrpo"
judge = "rubric"
delta = 3.0
anchors = 1                 # three rollouts and a demonstration; --anchors=0: four rollouts
anchor_loss = "logp"        # in eight steps LUFFY's shaping moves it less: docs/RESULTS.md
advantage_norm = "mean"
loss_norm = "constant"
max_steps = 8
prompts_per_step = 16       # sampled in one round; with an anchor nearly all have both outcomes
prompts_per_update = 16
max_rounds = 1
group_size = 4
max_response_tokens = 48
tokens_per_micro_batch = 3000
learning_rate = 2e-5        # twenty times what a long run would bear
decay_steps = 12
eval_every = 4
