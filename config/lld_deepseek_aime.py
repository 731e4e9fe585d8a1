# DeepSeek-R1-Distill-Qwen-1.5B on AIME; sampled at 0.6 with beta = 0, as the paper trains it (its
# learning rate is not stated)
model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
dataset = "aime24"
split = "test"
out_dir = "out/lld_deepseek_aime"
questions = 30
oversample = 1.0
temperature = 0.6
max_response_tokens = 4000
nthr_beta = 0.0
learning_rate = 1e-6
activation_checkpointing = True
