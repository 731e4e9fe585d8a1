# One update a question and variant with SmolLM2-135M-Instruct on two-digit arithmetic: make lld
out_dir = "out/lld"
questions = 32
group_size = 8
max_response_tokens = 28
learning_rate = 1e-6        # the paper's for 1.5B and 3B
