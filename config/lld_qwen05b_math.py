# Qwen2.5-0.5B-Instruct on MATH levels 3 to 5, the paper's learning rate for it; one GPU of 24 GB
model = "Qwen/Qwen2.5-0.5B-Instruct"
dataset = "math"
out_dir = "out/lld_qwen05b_math"
questions = 100
max_response_tokens = 2500
learning_rate = 5e-7
activation_checkpointing = True
