"""List what lmms-eval finds by LMMS_EVAL_PLUGINS=microvlm.lmms_eval: module name -> class."""

AVAILABLE_MODELS = {"microvlm": "MicroVLM"}
