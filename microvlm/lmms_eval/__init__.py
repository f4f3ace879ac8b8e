"""Plug MicroVLM into lmms-eval: the model in `models`, a captioning task on `data/mini` in `tasks`."""
