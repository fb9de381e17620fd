"""Configuration keys that name a backbone or a ControlNet, for error messages."""

KEY = "train.pretrained_model_name_or_path"
TOKENIZER_KEY = "train.tokenizer_name"
SINGLE_FILE_KEY = "train.single_file_config"
CONTROLNET_KEY = "train.controlnet_model_name_or_path"
