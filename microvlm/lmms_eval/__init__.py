"""MicroVLM for the harness lmms-eval: its model in `models`, a captioning task on `data/mini` in `tasks`. See docs/evaluation.md."""
