# Qwen2.5-1.5B-Instruct on MATH levels 3 to 5; one GPU of 80 GB (weights twice, gradient and
# AdamW's state in float32: 31 GB)
model = "Qwen/Qwen2.5-1.5B-Instruct"
dataset = "math"
out_dir = "out/lld_qwen15b_math"
questions = 100
max_response_tokens = 4000
learning_rate = 1e-6
activation_checkpointing = True
