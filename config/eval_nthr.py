# [NTHR] section 5, Table 2: greedy, all models asked alike; the longest that was trained with
as_trained = False
data = "aime24,amc23,math500,minerva_math,olympiadbench"
max_response_tokens = 4000
