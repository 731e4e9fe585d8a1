# Qwen2.5-Math-1.5B on MATH levels 3 to 5; its context leaves 3072 for a response, as in the paper
model = "Qwen/Qwen2.5-Math-1.5B"
dataset = "math"
out_dir = "out/lld_qwenmath_math"
questions = 100
max_response_tokens = 3072
learning_rate = 1e-6
activation_checkpointing = True
