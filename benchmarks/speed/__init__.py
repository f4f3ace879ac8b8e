"""Speed, memory and bytes at full size, next to other captioners and llama.cpp."""
