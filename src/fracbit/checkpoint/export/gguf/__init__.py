"""`gguf`: one file that llama.cpp runs. A new type of blocks is a line in block_types.py, a family one in architectures.py."""
