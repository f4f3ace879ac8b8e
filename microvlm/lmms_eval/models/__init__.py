"""What lmms-eval finds by LMMS_EVAL_PLUGINS=lmms_eval_microvlm: module name -> class."""

AVAILABLE_MODELS = {"microvlm": "MicroVLM"}
