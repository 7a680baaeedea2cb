"""The two models whose decode steps are compared: Llama's shape with random weights, which cost as much as trained ones."""

SHAPES = {
    "160m": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}  # fmt: skip
VOCABULARY = 32000
PROMPT = 64  # tokens read before the clock starts
